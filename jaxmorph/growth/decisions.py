"""What an operation decides when it fires, from the state of the run, as no plan can know it before.

Until then the plan assumes the largest result, and knows the smallest. Once decided, the decision is
a part of the entry, the plan is made again with it, and every checkpoint records it: a resumed run
decides nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.run_shape import RunShape

Decided = tuple[tuple[int, ...], ...]  # lists of whole numbers, as JSON has them


@dataclass(frozen=True)
class Decision:
    """What an operation decides when it fires.

    Args:
      reads: names of the state's variables it is made from.
      decide: makes it, from their values, as nested lists, and the run's shape and mesh.
      after: returns the shape after the operation, given what was decided.
      least: returns the smallest shape it can lead to.
      bounds: says in words what it can lead to, from that shape and the largest.
    """

    reads: tuple[str, ...]
    decide: Callable[[Mapping[str, Any], RunShape, MeshShape], Decided]
    after: Callable[[RunShape, Decided], RunShape]
    least: Callable[[RunShape, MeshShape], RunShape]
    bounds: Callable[[RunShape, RunShape, MeshShape], str]


def decided(lists: Sequence[Sequence[int]]) -> Decided:
    """Return what was decided, from JSON's lists."""
    return tuple(tuple(row) for row in lists)


def kept_heads(variables: Mapping[str, Any], shape: RunShape, mesh: MeshShape) -> Decided:
    """Return the heads that each layer keeps where closed ones leave, in their order.

    All layers keep as many: the largest number of heads in any layer whose gate is not 0, at least 1.
    Elsewhere the first of the layer's closed ones stay. A head with a gate that is small but not 0
    still adds something, so it counts as open here.

    Args:
      variables: `head_gate`, [layer, head].
      shape: of the run.
      mesh: its tensor axis goes on dividing the number of heads if it does.
    """
    gates = variables["head_gate"]
    split = [
        ([head for head, gate in enumerate(row) if gate != 0],
         [head for head, gate in enumerate(row) if gate == 0])
        for row in gates
    ]  # fmt: skip
    most = max((len(open_) for open_, _ in split), default=shape.model.n_heads)
    count = _divisible(most, shape, mesh)
    return tuple(tuple(sorted((open_ + closed)[:count])) for open_, closed in split)


def with_kept_heads(shape: RunShape, kept: Decided) -> RunShape:
    """Return the run with only these heads in each layer."""
    return shape.with_model(n_heads=len(kept[0])) if kept else shape


def fewest_heads(shape: RunShape, mesh: MeshShape) -> RunShape:
    """Return the run with as few heads as may stay: with all that may be closed spread evenly."""
    closed, layers = shape.closed, shape.model.n_layers
    open_ = 0 if closed.controlled else shape.n_heads - closed.most
    return shape.with_model(n_heads=_divisible(-(-open_ // max(1, layers)), shape, mesh))


def bounds_of_heads(least: RunShape, most: RunShape, mesh: MeshShape) -> str:
    """Say how many heads may stay."""
    fewest, heads = least.model.n_heads, most.model.n_heads
    tensor = f"the mesh's tensor ({mesh.tensor})"
    if fewest == heads:
        return f"n_heads {heads}" + (f", as {tensor} divides no fewer" if mesh.tensor > 1 else "")
    by = f", so many that {tensor} divides them" if mesh.tensor > 1 else ""
    return f"n_heads {heads}, or fewer, down to {fewest}, once heads are closed{by}"


def _divisible(count: int, shape: RunShape, mesh: MeshShape) -> int:
    """Return a number of heads to keep, rounded up to one that the mesh divides."""
    heads, count = shape.model.n_heads, max(1, count)
    return min(heads, -(-count // mesh.tensor) * mesh.tensor)
