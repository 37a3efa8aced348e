"""Transport the state of an optax optimizer, leaf by leaf, along its parameters' axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from jaxmorph.cli.errors import InputError
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.morphs.moments import Kind, Place, places
from jaxmorph.morphs.motion import Motion
from jaxmorph.morphs.owners import Path
from jaxmorph.morphs.report import Line, lines_of
from jaxmorph.morphs.transforms import KEEP, PARAMETER, Power


@dataclass(frozen=True)
class Routes:
    """How the leaves of a state change.

    Args:
      motions: for leaves that mirror a parameter, by its path.
      declared: returns the motion of an array over named axes, given the axes, its shape and name.
      partial: parameters that the state covers only in part.
    """

    motions: Mapping[str, Motion]
    declared: Callable[[NamedAxes, tuple[int, ...], str], Motion]
    partial: frozenset[str] = frozenset()


def moved_state(
    routes: Routes,
    state: optax.OptState,
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    fields: Mapping[str, Kind],
) -> tuple[list[Line], optax.OptState]:
    """Return a report line per leaf of the new state, in tree order, and the state.

    Args:
      routes: how leaves change.
      state: the state before.
      optimizer: for the parameters after.
      params: the parameters after.
      fields: see `apply`.

    Raises:
      InputError: a leaf that no rule covers, or whose new shape would differ from the one that the
        optimizer's `init` gives it.
    """
    target = jax.eval_shape(optimizer.init, params)
    old = dict(jax.tree_util.tree_leaves_with_path(state))
    found = places(optimizer.update, target, routes.motions.keys(), fields)
    wanted = jax.tree.leaves(target)
    if odd := [keystr(path) for path in old.keys() ^ {place.path for place in found}]:
        raise InputError(
            "opt_state", min(odd), None, "the state that this optimizer makes for these parameters"
        )
    added = any(isinstance(place.kind, Power) and place.kind.added for place in found)
    begun = jax.tree.leaves(optimizer.init(params)) if added else [jnp.zeros(0)] * len(found)
    siblings = _sibling_means(found, old)
    lines, leaves = [], []
    for place, shape, start in zip(found, wanted, begun, strict=True):
        leaf, fresh = _moved_leaf(routes, place, old, shape, siblings, start)
        if leaf.shape != shape.shape:
            expected = f"the shape {shape.shape} that the optimizer gives it"
            raise InputError("optimizer state", str(place), leaf.shape, expected)
        leaves.append(leaf if leaf.dtype == shape.dtype else leaf.astype(shape.dtype))
        lines += lines_of(str(place), place.field, shape.shape, fresh)
    return lines, jax.tree.unflatten(jax.tree.structure(target), leaves)


def _moved_leaf(
    routes: Routes,
    place: Place,
    old: Mapping[Path, jax.Array],
    wanted: jax.ShapeDtypeStruct,
    siblings: Mapping[str, jax.Array],
    start: jax.Array,
) -> tuple[jax.Array, np.ndarray]:
    """Return one leaf of the new state, and which of its entries are fresh; it began at `start`."""
    leaf, nowhere = old[place.path], np.zeros([1] * wanted.ndim, bool)
    if isinstance(place.kind, NamedAxes):
        motion = routes.declared(place.kind, leaf.shape, f"optimizer state {place}")
        return motion.declared(leaf, place.kind.fresh), motion.fresh
    if place.kind == KEEP:
        return leaf, nowhere
    motion = routes.motions[place.parameter]
    factored = place.beside("v_row") in old and place.field in ("v", "v_row", "v_col")
    if leaf.shape != motion.shape and not factored:
        expected = f"the shape {motion.shape} of {place.parameter}'s covered entries"
        expected += " (`trained` says which layers a state covers)"
        raise InputError("optimizer state", str(place), leaf.shape, expected)
    if place.kind == PARAMETER:
        if place.parameter in routes.partial:
            expected = "a state without weights if it covers only some layers"
            raise InputError("optimizer state", str(place), None, expected)
        return motion.parameter(leaf), motion.fresh | motion.zero
    assert isinstance(place.kind, Power)
    sibling = siblings[place.field]
    if factored:
        return _moved_factor(motion, place, old, wanted, sibling)
    if place.kind.added and start.size:
        first = start.ravel()[0].astype(leaf.dtype)
        return motion.moment(
            leaf - first, place.kind, sibling - first
        ) + first, motion.fresh_moments
    return motion.moment(leaf, place.kind, sibling), motion.fresh_moments


def _moved_factor(
    motion: Motion,
    place: Place,
    old: Mapping[Path, jax.Array],
    wanted: jax.ShapeDtypeStruct,
    sibling: jax.Array,
) -> tuple[jax.Array, np.ndarray]:
    """Return a leaf of adafactor's second moments, and which of its entries are fresh."""
    if place.field == "v" and wanted.shape != motion.new_shape:
        return jnp.zeros(wanted.shape, old[place.path].dtype), np.zeros([1] * wanted.ndim, bool)
    parts = (old[place.beside(name)] for name in ("v", "v_row", "v_col"))
    assert isinstance(place.kind, Power)
    whole = motion.moment(_unfactored(motion.shape, *parts), place.kind, sibling)
    return _factor(motion, place.field, whole, wanted.shape)


def _unfactored(
    shape: tuple[int, ...], v: jax.Array, row: jax.Array, column: jax.Array
) -> jax.Array:
    """Return the second moments that adafactor's row and column means represent."""
    if v.shape == shape:
        return v
    d1, d0 = np.argsort(shape)[-2:]
    mean = jnp.mean(row, axis=d1 - (d1 > d0), keepdims=True)
    mean = jnp.where(mean > 0, mean, jnp.ones((), row.dtype))  # before the first update
    return jnp.expand_dims(row / mean, d0) * jnp.expand_dims(column, d1)


def _factor(
    motion: Motion, field: str, whole: jax.Array, wanted: tuple[int, ...]
) -> tuple[jax.Array, np.ndarray]:
    """Return the factor `field` of second moments, as adafactor factors the new shape."""
    fresh = motion.fresh_moments
    if field == "v":
        return whole, fresh
    if len(whole.shape) < 2 or wanted == (1,):
        return jnp.zeros((1,), whole.dtype), np.zeros(1, bool)
    d1, d0 = np.argsort(whole.shape)[-2:]
    away = int(d0 if field == "v_row" else d1)
    return jnp.mean(whole, axis=away), np.asarray(fresh.all(axis=away))


def _sibling_means(found: Sequence[Place], old: Mapping[Path, jax.Array]) -> dict[str, jax.Array]:
    """Return the mean entry of each field over all parameters."""
    means = {}
    for field in {place.field for place in found if isinstance(place.kind, Power)}:
        leaves = [old[p.path] for p in found if p.field == field and p.parameter]
        entries = sum(leaf.size for leaf in leaves)
        means[field] = sum(jnp.sum(leaf) for leaf in leaves) / max(1, entries)
    return means
