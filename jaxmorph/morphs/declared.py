"""Arrays over named axes that are not parameters: per-layer or per-head gates, counts and status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax

from jaxmorph.cli.errors import InputError
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.model.signatures import Arrow, Signature
from jaxmorph.morphs.axis_map import AxisMap
from jaxmorph.morphs.change import FreshStart, Move, composed, size_of
from jaxmorph.morphs.motion import Motion, Origin, steps_of


def moved(declared: NamedAxes, leaf: jax.Array, maps: Sequence[AxisMap]) -> jax.Array:
    """Return an array after axes have changed: its entries move with their layer, head, ...

    >>> import jax.numpy as jnp
    >>> from jaxmorph.morphs import NamedAxes, repeat
    >>> deeper = repeat("layer", 2, 3, fresh=True)
    >>> moved(NamedAxes("layer head", fresh=7), jnp.asarray([[1, 2], [3, 4]]), [deeper]).tolist()
    [[1, 2], [3, 4], [7, 7]]

    Args:
      declared: its axes, and the initial value of entries without a source.
      leaf: the array; its dtype is kept.
      maps: how axes change, at most one per axis; those of other axes are ignored.

    Raises:
      InputError: a shape that does not match its axes before, or a map with rows over an axis it does
        not have.
    """
    moves = composed([Move(change, FreshStart()) for change in maps])
    sizes = {change.axis: change.old for change in maps}
    sizes = dict(zip(declared.names, leaf.shape, strict=False)) | sizes
    motion = declared_motion(declared, leaf.shape, moves, sizes, f"array over {declared.axes!r}")
    return motion.declared(leaf, declared.fresh)


def declared_motion(
    declared: NamedAxes,
    shape: tuple[int, ...],
    moves: Sequence[Move],
    sizes: Mapping[str, int],
    name: str,
) -> Motion:
    """Return how an array that is not a parameter changes.

    Args:
      declared: its axes.
      shape: its shape before.
      moves: of all axes, composed.
      sizes: of all axes, before.
      name: of the array, for messages.

    Raises:
      InputError: no such axis, a shape that does not match its axes, or a map with rows over an axis
        it does not have.
    """
    if len(shape) != len(declared.names):
        raise InputError(name, "shape", shape, f"a dimension for each axis of {declared.axes!r}")
    wanted = tuple(size_of(sizes, axis) for axis in declared.names)
    if shape != wanted:
        raise InputError(name, "shape", shape, f"{wanted}, the sizes of {declared.axes!r}")
    stacked = Signature(declared.names, (), Arrow.PLAIN, ())
    return Motion(name, stacked, shape, steps_of(name, stacked, moves), Origin())
