"""The ways an operation can change a run's shape, from a checked value and all options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxmorph.config.run_shape import (
    LARGEST_COUNT,
    OperationError,
    RunShape,
    check_seq_len,
    scaled_count,
    scaled_number,
    scaled_rank_size,
    scaled_size,
)

# Each takes a shape, a checked value and all options, and
# raises OperationError where the value does not suit the shape.
Options = Mapping[str, Any]
Change = Callable[[RunShape, Any, Options], RunShape]


def multiplied_count(field: str) -> Change:
    """Return the change that multiplies a count, rounding down."""
    return lambda shape, value, _: dataclasses.replace(
        shape, **{field: scaled_count(getattr(shape, field), value)}
    )


def multiplied_number(field: str) -> Change:
    """Return the change that multiplies a number."""
    return lambda shape, value, _: dataclasses.replace(
        shape, **{field: scaled_number(getattr(shape, field), value)}
    )


def replaced(field: str) -> Change:
    """Return the change that sets a field to the value."""
    return lambda shape, value, _: dataclasses.replace(shape, **{field: value})


def unchanged(shape: RunShape, value: None, options: Options) -> RunShape:
    """Return the shape as it is."""
    return shape


def set_learning_rate(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with the multiplier that makes `value` its peak learning rate."""
    multiplier = scaled_number(1.0, value / shape.learning_rate)
    return dataclasses.replace(shape, lr_multiplier=multiplier)


def grown(field: str) -> Change:
    """Return the change that multiplies an axis of the model, which must become larger."""

    def change(shape: RunShape, value: float, options: Options) -> RunShape:
        size = getattr(shape.model, field)
        new = scaled_size(field, size, value, least=size + 1, most=LARGEST_COUNT)
        return shape.with_model(**{field: new})

    return change


def stacked_layers(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with `value` times as many layers; with `value` layers where it has none."""
    if shape.model.n_layers:
        return grown("n_layers")(shape, value, options)
    if value != int(value):
        raise OperationError(value, "a whole number of layers, as there are none to multiply")
    return shape.with_model(n_layers=int(value))


def widened_embed(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with `value` times the width, a whole multiple."""
    if value != int(value):
        near = " or ".join(repr(n) for n in (math.floor(value), math.ceil(value)))
        raise OperationError(value, f"a whole multiple, as d_model has even shares only: {near}")
    return grown("d_model")(shape, value, options)


def scaled_rank(field: str) -> Change:
    """Return the change that multiplies a LoRA rank, up to d_model.

    Alpha stays: it serves the attention's and the embedding's adapters alike. The morph gives B the
    factor by which alpha / rank falls or rises, so that what the adapter adds stays as it is.
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
