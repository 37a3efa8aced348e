"""The entry point: apply changes of shape to parameters and everything that mirrors them.

Works for any model whose parameters are nested dicts of arrays with a signature each, and for any
optax optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.tree_util import keystr

from jaxmorph.cli.errors import InputError
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.model.signatures import Signature, axis_sizes, check_coverage, parse_table
from jaxmorph.model.tree_paths import field_name, parameter_path
from jaxmorph.morphs.axis_map import AxisMap
from jaxmorph.morphs.change import Change, Move, Trained, composed, covered, moves_of, size_of
from jaxmorph.morphs.declared import declared_motion
from jaxmorph.morphs.moments import Kind
from jaxmorph.morphs.motion import Motion, Origin, steps_of
from jaxmorph.morphs.optimizer_state import Routes, moved_state
from jaxmorph.morphs.report import Line, Report, lines_of

Signatures = Mapping[str, str] | Mapping[str, Signature]


def apply(
    changes: Sequence[Change | Trained | AxisMap],
    signatures: Signatures,
    params: Any,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    *,
    key: jax.Array | None = None,
    other: Mapping[str, tuple[jax.Array, NamedAxes]] | None = None,
    fields: Mapping[str, Kind] | None = None,
) -> tuple[Any, optax.OptState, Report]:
    """Return parameters, optimizer state and a report after axes have changed. Pure and jittable.

    In parameters that produce an axis, fresh entries are random (or come from a change's `fresh`); in
    those that consume it they are zero. Their first moments are zero and their second moments the mean
    of their leaf's (of their layer's within the leaf, if it has layers), so that their first steps are
    no larger than their neighbours'. If several changes re-initialise an entry, the first one decides
    how; maps with per-entry rows (see `AxisMap`) are applied after the others.

    >>> import jax.numpy as jnp, optax
    >>> from jaxmorph import morphs
    >>> signatures = {"up": "layer | width -> hidden", "down": "layer | hidden +> width"}
    >>> params = {"up": jnp.ones((2, 3, 4)), "down": jnp.ones((2, 4, 3))}
    >>> optimizer = optax.adam(1e-3)
    >>> params, opt_state, report = morphs.apply(
    ...     [morphs.widen("hidden", to=6, recipe="even"), morphs.deepen(to=3, identity=True)],
    ...     signatures, params, optimizer.init(params), optimizer,
    ...     other={"age": (jnp.asarray([8, 9]), morphs.NamedAxes("layer"))},
    ... )
    >>> params["up"].shape, opt_state[0].nu["down"].shape, report.other["age"].tolist()
    ((3, 3, 6), (3, 6, 3), [8, 9, 8])
    >>> print(report)
    optimizer state: 181 transported, 36 fresh, 0 reset entries

    Args:
      changes: results of `widen`, `deepen`, `keep` and `trained`, or axis maps; at most one per
        axis.
      signatures: signature of every parameter, by path.
      params: nested dicts of arrays; a leaf's path is its keys joined by slashes.
      opt_state: the optimizer's state for `params`; it may omit parameters.
      optimizer: the optimizer; if it covers other layers afterwards (see `trained`), the new one.
      key: PRNG key, needed if a change or fresh entries are random.
      other: further arrays over named axes, by name; returned in the report's `other`.
      fields: how fields of the optimizer's state change, by name or by place ("[1].trace"), where
        `transforms` has no rule or another one: the power of the gradient that a field holds, entry
        by entry; PARAMETER or KEEP; or a NamedAxes if it mirrors no parameter.

    Raises:
      InputError: changes that do not fit the parameters or each other, an optimizer whose state
        cannot be transported, or a leaf of the state that no rule covers.
      SignatureError: signatures that do not match the parameters.
    """
    old = _by_path(params)
    layout = _layout(signatures, {path: leaf.shape for path, leaf in old.items()}, changes)
    origin = Origin(_given(layout.moves), key)
    motions = _motions(layout, layout.moves, origin)
    new_params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: motions[parameter_path(path)].parameter(leaf), params
    )
    lines = [
        line
        for path, motion in motions.items()
        for line in lines_of(path, "params", motion.new_shape, motion.fresh | motion.zero)
    ]
    moved_other = {
        name: layout.declared(axes, leaf.shape, name).declared(leaf, axes.fresh)
        for name, (leaf, axes) in (other or {}).items()
    }
    if any(move.start.moments == "restart" for move in layout.moves):
        new_state = optimizer.init(new_params)
        state_lines = _reset(new_state)
    else:
        state_lines, new_state = moved_state(
            _routes(layout, origin), opt_state, optimizer, new_params, fields or {}
        )
    return new_params, new_state, Report((*lines, *state_lines), other=moved_other)


@dataclass(frozen=True)
class _Layout:
    """A table of signatures, the shapes it describes, and how its axes change."""

    signatures: Mapping[str, Signature]
    shapes: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    moves: Sequence[Move]
    parts: Sequence[Trained]

    def declared(self, axes: NamedAxes, shape: tuple[int, ...], name: str) -> Motion:
        """Return how an array that is not a parameter changes."""
        return declared_motion(axes, shape, self.moves, self.sizes, name)


def _layout(
    signatures: Signatures,
    shapes: Mapping[str, tuple[int, ...]],
    changes: Sequence[Change | Trained | AxisMap],
) -> _Layout:
    parsed = parse_table({path: str(signature) for path, signature in signatures.items()})
    check_coverage(parsed, shapes)
    sizes = axis_sizes(parsed, shapes)
    parts = [change for change in changes if isinstance(change, Trained)]
    if len({part.axis for part in parts}) < len(parts):
        raise InputError("trained", "axis", [part.axis for part in parts], "each axis once")
    for part in parts:
        size_of(sizes, part.axis)
    rest = [change for change in changes if not isinstance(change, Trained)]
    return _Layout(parsed, shapes, sizes, composed(moves_of(rest, sizes)), parts)


def _by_path(params: Any) -> dict[str, jax.Array]:
    """Return the leaves of nested dicts by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {parameter_path(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves) or "" in found:
        raise InputError("params", "", type(params).__name__, "nested dicts of arrays")
    return found


def _given(moves: Sequence[Move]) -> dict[str, jax.Array] | None:
    """Return by path the parameters that fresh entries are taken from, if a change gives any."""
    given = [move.start.params for move in moves if move.start.params is not None]
    if any(params is not given[0] for params in given):
        expected = "parameters from one change, of the shapes after all of them"
        raise InputError("fresh", "", f"{len(given)} sets of parameters", expected)
    return _by_path(given[0]) if given else None


def _motions(layout: _Layout, moves: Sequence[Move], origin: Origin) -> dict[str, Motion]:
    """Return how each parameter, or the part of it in the state, changes."""
    sizes = {**layout.sizes} | {move.map.axis: move.map.old for move in moves}
    return {
        path: Motion(
            path, signature, signature.shape(sizes), steps_of(path, signature, moves), origin
        )
        for path, signature in layout.signatures.items()
    }


def _routes(layout: _Layout, origin: Origin) -> Routes:
    """Return how the optimizer's state changes."""
    moves = functools.reduce(
        lambda moves, part: covered(moves, part, layout.sizes[part.axis]),
        layout.parts,
        layout.moves,
    )
    motions = _motions(layout, moves, origin)
    partial = frozenset(
        path
        for path, signature in layout.signatures.items()
        if any(part.axis in signature.axes for part in layout.parts)
    )
    return Routes(motions, layout.declared, partial)


def _reset(state: optax.OptState) -> list[Line]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [Line(keystr(path), field_name(path), "reset", leaf.size) for path, leaf in leaves]
