"""The one transform behind every change of shape: parameters and optimizer state, by axis maps.

A parameter's signature says what role a changed axis has there, and the role gives two factors. What
consumes the axis takes `share` of the weights it copies, and its gradient stays as it is; what
produces it, or is a gain on it, copies the weights, and its gradient is shared out; what is stacked
on it just moves. A `scale` of the axis multiplies both gradients. Moments follow the gradient (see
`moments`). For models of any kind: nested dicts of arrays with a signature each, and any optax
optimizer of such parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.model.signatures import Signature, axis_sizes, check_coverage, parse_table
from jaxmorph.model.tree_paths import parameter_path
from jaxmorph.morphs.axis_map import AxisMap
from jaxmorph.morphs.moments import KEEP, PARAMETER, Kind, Path, Place, places
from jaxmorph.morphs.motion import FreshStart, Motion, Step

MOMENTS = ("provenance", "fresh", "restart")
Signatures = Mapping[str, str] | Mapping[str, Signature]
How = Literal["transported", "fresh", "reset"]


@dataclass(frozen=True)
class Line:
    """What became of one leaf, or of a part of it.

    Args:
      path: of the leaf in the new optimizer state, or of the parameter.
      field: the field of the optimizer's state (mu, nu, ...); "params" for a parameter.
      how: moved from the old state, begun anew, or set back to what the optimizer starts with.
      entries: how many entries.
    """

    path: str
    field: str
    how: How
    entries: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["errors"], meta_fields=["lines"])
@dataclass(frozen=True)
class Report:
    """What became of every leaf. A pytree, so that a jitted function may return it.

    Args:
      lines: what became of each leaf, or of each part of one; static.
      errors: by the path of a matrix that could only be approximated, the Frobenius norm of what was
        lost over that of what was there, of all layers together.
    """

    lines: tuple[Line, ...]
    errors: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def totals(self) -> dict[str, int]:
        """Return the entries of the new optimizer state by what became of them."""
        kinds: tuple[How, ...] = ("transported", "fresh", "reset")
        state = [line for line in self.lines if line.field != "params"]
        return {how: sum(line.entries for line in state if line.how == how) for how in kinds}

    def __str__(self) -> str:
        counts = ", ".join(f"{entries:,} {how}" for how, entries in self.totals.items())
        lost = {path: float(error) for path, error in self.errors.items()}
        worst = max(lost, key=lambda path: lost[path], default="")
        losses = f"; largest relative error {lost[worst]:.2g}, of {worst}" if lost else ""
        return f"optimizer state: {counts} entries{losses}"


def transport(
    signatures: Signatures,
    maps: Sequence[AxisMap],
    params: Any,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    *,
    fresh: Any = None,
    key: jax.Array | None = None,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
    fields: Mapping[str, Kind] | None = None,
) -> tuple[Any, optax.OptState, Report]:
    """Return parameters, optimizer state and a report after axes have changed. Pure and jittable.

    Fresh entries of producers come from `fresh`, those of consumers are zero. Their first moments are
    zero and their second moments the mean of their leaf's (of their layer's in the leaf, where it has
    any), so that their first steps are no larger than those of the entries beside them.

    Args:
      signatures: signature of every parameter, by path.
      maps: how axes change, one map an axis.
      params: nested dicts of arrays; the keys on the way to a leaf, joined by slashes, are its path.
      opt_state: the optimizer's state for `params`.
      optimizer: what made it.
      fresh: parameters of the new shapes, from an initialisation; None: matrices are drawn normal with
        the RMS of their leaf, gains are one and the rest is zero.
      key: PRNG key, where a map is random or fresh entries are drawn.
      moments: of entries that are copies: "provenance" of what they copy, "fresh" as of fresh
        entries; "restart": the whole state is that of `optimizer.init`.
      fresh_nu: second moments of fresh entries, in means of their leaf's.
      fields: how fields of the state that are not in `moments.FIELDS` move.

    Raises:
      InputError: an optimizer whose state cannot be moved, or part of a state that no rule covers.
      SignatureError: signatures that do not match the parameters.
    """
    by_path = None if fresh is None else _by_path(fresh)
    motions = _motions(signatures, maps, params, FreshStart(by_path, key, moments, fresh_nu))
    new_params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: motions[parameter_path(path)].parameter(leaf), params
    )
    lines = [
        line
        for path, motion in motions.items()
        for line in _lines(path, "params", motion.new_shape, motion.fresh | motion.zero)
    ]
    if moments == "restart":
        new_state = optimizer.init(new_params)
        leaves = jax.tree_util.tree_leaves_with_path(new_state)
        lines += [Line(keystr(path), _last(path), "reset", leaf.size) for path, leaf in leaves]
        return new_params, new_state, Report(tuple(lines))
    target = jax.eval_shape(optimizer.init, new_params)
    state_lines, leaves = _moved_state(motions, opt_state, target, fields or {})
    return (
        new_params,
        jax.tree.unflatten(jax.tree.structure(target), leaves),
        Report((*lines, *state_lines)),
    )


def _motions(
    signatures: Signatures, maps: Sequence[AxisMap], params: Any, start: FreshStart
) -> dict[str, Motion]:
    """Return how each parameter moves, by its path."""
    parsed = _parsed(signatures)
    shapes = {path: leaf.shape for path, leaf in _by_path(params).items()}
    check_coverage(parsed, shapes)
    if start.moments not in MOMENTS:
        near = nearest(start.moments, MOMENTS)
        raise InputError("moments", "", start.moments, f"one of {', '.join(MOMENTS)}{near}")
    sizes = axis_sizes(parsed, shapes)
    for change in maps:
        size = _size_of(sizes, change.axis)
        if size != change.old:
            raise InputError(change.axis, "size", change.old, f"the parameters' own, {size}")
    if len({change.axis for change in maps}) < len(maps):
        raise InputError("maps", "", [change.axis for change in maps], "one map an axis")
    return {
        path: Motion(path, signature, shapes[path], _steps(signature, maps), start)
        for path, signature in parsed.items()
    }


def _by_path(params: Any) -> dict[str, jax.Array]:
    """Return the leaves of nested dicts by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {parameter_path(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves) or "" in found:
        raise InputError("params", "", type(params).__name__, "nested dicts of arrays")
    return found


def axis_size(signatures: Signatures, params: Any, axis: str) -> int:
    """Return the size that an axis has in the parameters.

    Raises:
      InputError: no signature has the axis.
      SignatureError: signatures that do not match the parameters.
    """
    parsed = _parsed(signatures)
    shapes = {path: leaf.shape for path, leaf in _by_path(params).items()}
    check_coverage(parsed, shapes)
    return _size_of(axis_sizes(parsed, shapes), axis)


def _parsed(signatures: Signatures) -> dict[str, Signature]:
    return parse_table({path: str(signature) for path, signature in signatures.items()})


def _size_of(sizes: Mapping[str, int], axis: str) -> int:
    if axis not in sizes:
        expected = f"an axis of the signatures: {', '.join(sorted(sizes))}{nearest(axis, sizes)}"
        raise InputError("axis", "", axis, expected)
    return sizes[axis]


def _steps(signature: Signature, maps: Sequence[AxisMap]) -> tuple[Step, ...]:
    return tuple(
        Step(signature.axes.index(change.axis), signature.role(change.axis), change)
        for change in maps
        if change.axis in signature.axes
    )


def _moved_state(
    motions: Mapping[str, Motion],
    state: optax.OptState,
    target: optax.OptState,
    fields: Mapping[str, Kind],
) -> tuple[list[Line], list[jax.Array]]:
    """Return the leaves of the new state in the target's order, and what became of each."""
    old = dict(jax.tree_util.tree_leaves_with_path(state))
    found = places(target, motions.keys(), fields)
    wanted = jax.tree.leaves(target)
    if odd := [keystr(path) for path in old.keys() ^ {place.path for place in found}]:
        raise InputError(
            "opt_state", min(odd), None, "the state that this optimizer makes for these parameters"
        )
    siblings = _sibling_means(found, old)
    lines, leaves = [], []
    for place, shape in zip(found, wanted, strict=True):
        leaf, fresh = _moved_leaf(motions, place, old, shape, siblings)
        if leaf.shape != shape.shape:
            expected = f"the shape {shape.shape} that the optimizer gives it"
            raise InputError("optimizer state", str(place), leaf.shape, expected)
        leaves.append(leaf.astype(shape.dtype))
        lines += _lines(str(place), place.field, shape.shape, fresh)
    return lines, leaves


def _moved_leaf(
    motions: Mapping[str, Motion],
    place: Place,
    old: Mapping[Path, jax.Array],
    wanted: jax.ShapeDtypeStruct,
    siblings: Mapping[str, jax.Array],
) -> tuple[jax.Array, np.ndarray]:
    """Return one leaf of the new state, and which of its entries are fresh."""
    leaf, nowhere = old[place.path], np.zeros([1] * wanted.ndim, bool)
    if place.kind == KEEP:
        return leaf, nowhere
    motion = motions[place.parameter]
    if place.kind == PARAMETER:
        return motion.parameter(leaf), motion.fresh | motion.zero
    sibling = siblings[place.field]
    if place.beside("v_row") not in old or place.field not in ("v", "v_row", "v_col"):
        return motion.moment(leaf, int(place.kind), sibling), motion.fresh_moments
    if place.field == "v" and wanted.shape != motion.new_shape:
        return jnp.zeros(wanted.shape, leaf.dtype), nowhere
    parts = (old[place.beside(name)] for name in ("v", "v_row", "v_col"))
    whole = motion.moment(_unfactored(motion.shape, *parts), 2, sibling)
    return _factor(motion, place.field, whole, wanted.shape)


def _unfactored(
    shape: tuple[int, ...], v: jax.Array, row: jax.Array, column: jax.Array
) -> jax.Array:
    """Return the second moments that adafactor's row and column means stand for."""
    if v.shape == shape:
        return v
    d1, d0 = np.argsort(shape)[-2:]
    mean = jnp.mean(row, axis=d1 - (d1 > d0), keepdims=True)
    mean = jnp.where(mean > 0, mean, jnp.ones((), row.dtype))  # before the first update
    return jnp.expand_dims(row / mean, d0) * jnp.expand_dims(column, d1)


def _factor(
    motion: Motion, field: str, whole: jax.Array, wanted: tuple[int, ...]
) -> tuple[jax.Array, np.ndarray]:
    """Return the part `field` of second moments, factored as adafactor does by the new shape."""
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
    for field in {place.field for place in found if place.kind in (1, 2, 0)}:
        leaves = [old[p.path] for p in found if p.field == field and p.parameter]
        entries = sum(leaf.size for leaf in leaves)
        means[field] = sum(jnp.sum(leaf) for leaf in leaves) / max(1, entries)
    return means


def _lines(path: str, field: str, shape: tuple[int, ...], fresh: np.ndarray) -> list[Line]:
    """Return the lines of a leaf whose fresh entries a mask gives, 1 long where it does not matter."""
    entries = int(np.prod(shape))
    begun = int(fresh.sum()) * entries // max(1, fresh.size)
    parts: list[tuple[How, int]] = [("transported", entries - begun), ("fresh", begun)]
    return [Line(path, field, how, count) for how, count in parts if count or not entries]


def _last(path: Path) -> str:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""
