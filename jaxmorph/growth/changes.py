"""The ways an operation can change a run's shape, from a checked value and all options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmorph.cli.wording import listed, repeatable
from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.run_shape import (
    OperationError,
    RunShape,
    scaled_count,
    scaled_number,
    whole_product,
)
from jaxmorph.config.settings import LARGEST_COUNT

# Each takes a shape, a checked value and all options, and
# raises OperationError if the value does not suit the shape.
Options = Mapping[str, Any]
Change = Callable[[RunShape, Any, Options], RunShape]

# By size, the flag that makes it smaller at the start.
_SMALLER_BY = {
    "n_layers": "--n_layer_divisor",
    "d_model": "--d_model",
    "n_heads": "--n_heads",
    "d_ff": "--n_hidden_divisor",
}


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


def set_size(field: str) -> Change:
    """Return the change that sets the size of a model axis, which must not shrink."""

    def change(shape: RunShape, value: int, options: Options) -> RunShape:
        check_not_smaller(field, getattr(shape.model, field), value)
        return shape.with_model(**{field: value})

    return change


def stacked_layers(shape: RunShape, value: float | tuple[int, ...], options: Options) -> RunShape:
    """Return the run with `value` times as many layers, or with the listed copies of its layers.

    Without layers to multiply, it gets `value` fresh ones.
    """
    _check_all_trained(shape, value)
    old = shape.model.n_layers
    if not isinstance(value, float | int):
        check_layers(old, value, in_order=options["recipe"] != "copy")
        return shape.with_model(n_layers=len(value))
    if old:
        return grown("n_layers")(shape, value, options)
    if value != int(value):
        raise OperationError(value, "a whole number of layers, as there are none to multiply")
    return shape.with_model(n_layers=int(value))


def set_layers(shape: RunShape, value: int, options: Options) -> RunShape:
    """Return the run with `value` layers."""
    _check_all_trained(shape, value)
    return set_size("n_layers")(shape, value, options)


def _check_all_trained(shape: RunShape, value: object) -> None:
    if shape.frozen_layers:
        raise OperationError(value, "a run that trains all its layers")


def widened_embed(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with `value` times the width, an integer multiple."""
    if value != int(value):
        near = " or ".join(repr(n) for n in (math.floor(value), math.ceil(value)))
        raise OperationError(value, f"a whole multiple, as all of d_model is duplicated: {near}")
    return grown("d_model")(shape, value, options)


def set_embed(shape: RunShape, value: int, options: Options) -> RunShape:
    """Return the run with the width `value`, an integer multiple of the present one."""
    width = shape.model.d_model
    check_not_smaller("d_model", width, value)
    if value % width:
        near = " or ".join(str(n * width) for n in (value // width, value // width + 1))
        raise OperationError(
            value,
            f"a multiple of the {width} that d_model is by then, all of it duplicated: {near}",
        )
    return shape.with_model(d_model=value)


def scaled_rank(field: str) -> Change:
    """Return the change that multiplies a LoRA rank, up to d_model.

    Alpha stays: attention and embedding adapters share it. The morph scales B to compensate for the
    change of alpha / rank, so that the adapter's contribution is unchanged.
    """

    return lambda shape, value, _: shape.with_model(
        **{field: scaled_rank_size(shape.model, field, value)}
    )


def set_rank(field: str) -> Change:
    """Return the change that sets a LoRA rank, up to d_model; see `scaled_rank`."""

    def change(shape: RunShape, value: int, options: Options) -> RunShape:
        most = max(getattr(shape.model, field), shape.model.d_model)
        if value > most:
            raise OperationError(value, f"a rank of at most d_model ({most})")
        return shape.with_model(**{field: value})

    return change


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


def check_not_smaller(field: str, size: int, value: int) -> None:
    """Check that a model axis would not shrink.

    Args:
      field: the name of its size in ModelConfig.
      size: its size.
      value: its new size.

    Raises:
      OperationError: it would; names the flag that makes it smaller from the start.
    """
    if value < size:
        way = f"start smaller ({_SMALLER_BY[field]}), as the axes of a model only grow"
        raise OperationError(value, f"at least the {size} that {field} is by then; {way}")


def check_layers(count: int, layers: Sequence[int], *, in_order: bool) -> None:
    """Check a list of layers to copy.

    Args:
      count: the number of layers there are.
      layers: the source of each layer after.
      in_order: whether the old layers must stay in their order, as they do if the copies add nothing.

    Raises:
      OperationError: no such layer, one that would be lost, no more than there are, or another order.
    """
    if not count:
        raise OperationError(list(layers), "a number of layers, as there are none to copy")
    there = f"the {count} layer{'s' * (count > 1)} there are by then"
    if unknown := [layer for layer in layers if layer >= count]:
        raise OperationError(unknown[0], f"one of {there}, 0 to {count - 1}")
    if lost := sorted(set(range(count)) - set(layers)):
        wanted = f"each of {there} at least once, as none is dropped (missing: {listed(lost)})"
        raise OperationError(listed(layers), wanted)
    if len(layers) <= count:
        raise OperationError(listed(layers), f"more than {there}")
    if in_order and list(dict.fromkeys(layers)) != list(range(count)):
        wanted = (
            "the layers first in their order, 0, 1, …, so that the function stays; or recipe copy"
        )
        raise OperationError(listed(layers), wanted)
