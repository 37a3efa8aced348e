"""The ways an operation can change a run's shape, from a checked value and all options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxmorph.cli.wording import repeatable
from jaxmorph.config.run_shape import (
    OperationError,
    RunShape,
    scaled_count,
    scaled_number,
    whole_product,
)
from jaxmorph.config.settings import LARGEST_COUNT, ModelConfig

# Each takes a shape, a checked value and all options, and
# raises OperationError if the value does not suit the shape.
Options = Mapping[str, Any]
Change = Callable[[RunShape, Any, Options], RunShape]


@dataclass(frozen=True)
class MultipliedCount:
    """The change that multiplies a count, rounding down.

    Args:
      field: the name of the count in RunShape.
    """

    field: str

    def __call__(self, shape: RunShape, value: float, options: Options) -> RunShape:
        """Return the run with `value` times the count."""
        count = scaled_count(getattr(shape, self.field), value)
        return dataclasses.replace(shape, **{self.field: count})


def multiplied_number(field: str) -> Change:
    """Return the change that multiplies a number."""
    return lambda shape, value, _: dataclasses.replace(
        shape, **{field: scaled_number(getattr(shape, field), value)}
    )


def replaced(field: str) -> Change:
    """Return the change that sets a field to the value."""
    return lambda shape, value, _: dataclasses.replace(shape, **{field: value})


def unchanged(shape: RunShape, value: None, options: Options) -> RunShape:
    """Return the shape unchanged."""
    return shape


def set_learning_rate(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with the multiplier that makes `value` its peak learning rate."""
    multiplier = scaled_number(1.0, value / shape.learning_rate)
    return dataclasses.replace(shape, lr_multiplier=multiplier)


def grown(field: str) -> Change:
    """Return the change that multiplies the size of a model axis, which must grow."""

    def change(shape: RunShape, value: float, options: Options) -> RunShape:
        size = getattr(shape.model, field)
        new = scaled_size(field, size, value, least=size + 1, most=LARGEST_COUNT)
        return shape.with_model(**{field: new})

    return change


def stacked_layers(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with `value` times as many layers, or with `value` layers if it has none."""
    if shape.frozen_layers:
        raise OperationError(value, "a run that trains all its layers")
    if shape.model.n_layers:
        return grown("n_layers")(shape, value, options)
    if value != int(value):
        raise OperationError(value, "a whole number of layers, as there are none to multiply")
    return shape.with_model(n_layers=int(value))


def widened_embed(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with `value` times the width, an integer multiple."""
    if value != int(value):
        near = " or ".join(repr(n) for n in (math.floor(value), math.ceil(value)))
        raise OperationError(value, f"a whole multiple, as d_model has even shares only: {near}")
    return grown("d_model")(shape, value, options)


def scaled_rank(field: str) -> Change:
    """Return the change that multiplies a LoRA rank, up to d_model.

    Alpha stays: attention and embedding adapters share it. The morph scales B to compensate for the
    change of alpha / rank, so that the adapter's contribution is unchanged.
    """

    return lambda shape, value, _: shape.with_model(
        **{field: scaled_rank_size(shape.model, field, value)}
    )


def scaled_seq_len(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with `value` times the context length."""
    new = scaled_size("seq_len", shape.model.seq_len, value, least=1, most=LARGEST_COUNT)
    return _with_seq_len(shape, new, value)


def set_seq_len(shape: RunShape, value: int, options: Options) -> RunShape:
    """Return the run with a context of `value` tokens."""
    return _with_seq_len(shape, value, value)


def _with_seq_len(shape: RunShape, seq_len: int, value: float) -> RunShape:
    check_seq_len(shape.model, seq_len, value)
    return shape.with_model(seq_len=seq_len)


def scaled_size(noun: str, size: int, factor: float, least: int, most: int) -> int:
    """Return size × factor, the new size of an axis.

    Args:
      noun: the name of the size, for the message.
      size: the current size.
      factor: the multiplier.
      least: the smallest size allowed.
      most: the largest.

    Raises:
      OperationError: the product is not an integer in range; names the nearest factors that work.
    """
    product = whole_product(size, factor)
    if product is not None and least <= product <= most:
        return product
    exact = size * factor
    near = {min(max(n, least), most) for n in (math.floor(exact), math.ceil(exact))}
    works = ", ".join(f"{repeatable(n / size)} gives {n}" for n in sorted(near) if n != size)
    span = f"from {least} to {most}" if most < LARGEST_COUNT else f"of at least {least}"
    wanted = f"a factor that gives a whole {noun} {span} ({size} × {factor:g} = {exact:g})"
    raise OperationError(factor, f"{wanted}; {works}" if works else wanted)


def scaled_rank_size(config: ModelConfig, field: str, factor: float) -> int:
    """Return a LoRA rank × factor, up to d_model.

    Args:
      config: the architecture.
      field: the name of the rank in ModelConfig.
      factor: the multiplier.

    Raises:
      OperationError: no such adapters, or a product that is not an integer in range.
    """
    rank = getattr(config, field)
    if not rank:
        raise OperationError(factor, f"adapters: {field} is 0")
    return scaled_size(field, rank, factor, least=1, most=max(rank, config.d_model))


def check_seq_len(config: ModelConfig, seq_len: int, value: float) -> None:
    """Check that the model has positions for a context of `seq_len` tokens.

    Args:
      config: the architecture before.
      seq_len: the context length after.
      value: the operation's value, for the message.

    Raises:
      OperationError: more than its learned positions.
    """
    if config.positions == "learned" and seq_len > config.seq_len:
        wanted = (
            f"at most the {config.seq_len} learned positions (positions rotary has no such limit)"
        )
        raise OperationError(value, f"a seq_len, here {seq_len}, of {wanted}")
