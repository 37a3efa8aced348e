"""The operations that close and open attention heads: their options, and how many heads they change.

Which heads, other than those a schedule lists, is decided when an operation fires. Here is what can be
known before: that listed heads exist, and bounds of how many heads are closed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxmorph.config.closed_heads import CLOSED_GATE
from jaxmorph.config.run_shape import OperationError, RunShape, scaled_count
from jaxmorph.growth.changes import Options
from jaxmorph.growth.values import HeadList, Option

_CHOOSE = {
    "by": Option(
        "importance",
        "those that matter least, any of them, or those listed, in their order",
        ("importance", "random", "listed"),
        needs=("listed", "heads"),
    ),
    "heads": HeadList(None, "the heads the fraction is of", only=("by", "listed")),
}
SET_OPTIONS: Mapping[str, Option] = {"heads": HeadList(None, "the heads, instead of all of them")}
PRUNE_OPTIONS: Mapping[str, Option] = _CHOOSE
REGROW_OPTIONS: Mapping[str, Option] = {
    "by": dataclasses.replace(
        _CHOOSE["by"],
        effect="those with the largest gradient of the gate, any, or those listed, in their order",
    ),
    "heads": _CHOOSE["heads"],
    "weights": Option(
        "fresh",
        "new weights whose output begins at zero, or those that the head closed with",
        ("fresh", "kept"),
    ),
}


def set_gates(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with some gates, or all, at `value`."""
    listed, closed = _listed(shape, options), shape.closed
    count = shape.n_heads if listed is None else len(listed)
    faint = 0 < value <= CLOSED_GATE or (closed.faint and listed is not None)
    if value <= CLOSED_GATE:
        bounds = max(closed.fewest, count), min(shape.n_heads, closed.most + count)
    else:
        bounds = closed.fewest - count, min(closed.most, shape.n_heads - count)
    closed = dataclasses.replace(closed.bounded(*bounds), faint=faint)
    return dataclasses.replace(shape, closed=closed)


def prune_heads(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with a fraction of its open heads, or of those listed, closed."""
    listed, closed = _listed(shape, options), shape.closed
    layers, room = shape.model.n_layers, shape.model.n_heads - closed.least_open
    if listed is None:
        most, open_ = layers * room, shape.n_heads - closed.fewest
        count = min(open_, scaled_count(open_, value))
        if closed.fewest + count > most or not open_:
            raise OperationError(value, _smaller(shape, most - closed.fewest, open_))
        later = shape.n_heads - closed.most
        more = min(max(most, closed.most), closed.most + min(later, scaled_count(later, value)))
        bounds = closed.fewest + count, max(more, closed.fewest + count)
    else:
        count = scaled_count(len(listed), value)
        for layer, closing in Counter(layer for layer, _ in listed[:count]).items():
            if closing > room:
                wanted = f"at most {room} heads of layer {layer}, so that {_stays(shape)}"
                raise OperationError(closing, wanted, "options: heads")
        bounds = max(closed.fewest, count), min(shape.n_heads, closed.most + count)
    return dataclasses.replace(shape, closed=closed.bounded(*bounds))


def regrow_heads(shape: RunShape, value: float, options: Options) -> RunShape:
    """Return the run with a fraction of its closed heads, or of those listed, open again."""
    listed, closed = _listed(shape, options), shape.closed
    if not closed.most and not closed.controlled:
        wanted = "a head closed by then: set_gates or prune_heads before it, or --enable_controller"
        raise OperationError("regrow_heads", wanted, "name")
    if listed is None:
        fewest, most = (n - min(n, scaled_count(n, value)) for n in (closed.fewest, closed.most))
    else:
        fewest, most = closed.fewest - len(listed), closed.most
    return dataclasses.replace(shape, closed=closed.bounded(fewest, most))


def remove_heads(shape: RunShape, value: None, options: Options) -> RunShape:
    """Return the run where closed heads may have left: with as many as before, the largest case."""
    return dataclasses.replace(shape, closed=shape.closed.bounded(0, shape.closed.most))


def _listed(shape: RunShape, options: Options) -> Sequence[Sequence[int]] | None:
    """Return the heads that the options list, which the model must have; None: none are listed."""
    listed, model = options["heads"], shape.model
    for layer, head in listed or ():
        if layer >= model.n_layers or head >= model.n_heads:
            sizes = f"{model.n_layers} layers × {model.n_heads} heads"
            last = f"up to [{model.n_layers - 1}, {model.n_heads - 1}]"
            wanted = f"a head of the {sizes} there are by then, counted from 0, {last}"
            raise OperationError([layer, head], wanted, "options: heads")
    return listed


def _smaller(shape: RunShape, most: int, open_: int) -> str:
    """Return what is expected of a fraction that is too large.

    Args:
      shape: the run's, before.
      most: heads that may close.
      open_: heads that may be open.
    """
    wanted = f"a fraction that gives at most {max(0, most)} of {open_} open heads, so that "
    return wanted + _stays(shape)


def _stays(shape: RunShape) -> str:
    least, heads = shape.closed.least_open, shape.model.n_heads
    stay = "stays" if least == 1 else "stay"
    return f"{least} of the {heads} in each layer {stay} open (--min_heads_per_layer)"
