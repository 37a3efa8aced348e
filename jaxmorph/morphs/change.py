"""Changes as values: how an axis changes, independently of any model or optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.morphs.axis_map import FRESH, AxisMap, cut

MOMENTS = ("provenance", "fresh", "restart")


@dataclass(frozen=True, eq=False)
class FreshStart:
    """How a change initialises fresh entries.

    Args:
      params: freshly initialised parameters of the new shapes, the source of fresh entries in
        parameters that produce the axis or are stacked on it. None: matrices are normal with the RMS
        of their leaf, gains are one and the rest is zero.
      moments: of copies: "provenance" copies them from the source, "fresh" treats them as fresh
        entries; "restart" resets the whole optimizer state to its `init`.
      nu: second moments of fresh entries, as a multiple of their leaf's mean.

    Raises:
      InputError: an unknown `moments`.
    """

    params: Any = None
    moments: str = "provenance"
    nu: float = 1.0

    def __post_init__(self) -> None:
        if self.moments not in MOMENTS:
            near = nearest(self.moments, MOMENTS)
            raise InputError("moments", "", self.moments, f"one of {', '.join(MOMENTS)}{near}")


@dataclass(frozen=True, eq=False)
class Change:
    """A change of one axis, for `apply`; `widen`, `deepen` and `keep` make them.

    Args:
      axis: its name in the signatures.
      from_size: returns the map of the axis, given its size.
      start: how fresh entries are initialised.
    """

    axis: str
    from_size: Callable[[int], AxisMap]
    start: FreshStart = FreshStart()


@dataclass(frozen=True)
class Trained:
    """Which entries of a stacked axis the optimizer's state covers; `trained` makes them.

    Args:
      axis: its name in the signatures.
      before: old entries that the state covers, in its order.
      after: new entries that it will cover.
    """

    axis: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Move:
    """A change with its sizes: how an axis changes, and how fresh entries are initialised."""

    map: AxisMap
    start: FreshStart


def by_map(
    change: AxisMap, *, fresh: Any = None, moments: str = "provenance", fresh_nu: float = 1.0
) -> Change:
    """Return the change that a map describes, with options for fresh entries and moments.

    Args:
      change: the map.
      fresh: parameters of the new shapes for fresh entries; see `FreshStart`.
      moments: of copies; see `FreshStart`.
      fresh_nu: second moments of fresh entries; see `FreshStart`.

    Raises:
      InputError: an unknown `moments`.
    """
    return Change(change.axis, lambda _: change, FreshStart(fresh, moments, fresh_nu))


def moves_of(changes: Sequence[Change | AxisMap], sizes: Mapping[str, int]) -> list[Move]:
    """Return changes with the sizes of the axes filled in.

    Args:
      changes: at most one per axis.
      sizes: of every axis of the signatures, before.

    Raises:
      InputError: no such axis, two changes of one axis, or a map that does not fit the sizes.
    """
    moves = []
    for change in changes:
        change = by_map(change) if isinstance(change, AxisMap) else change
        if not isinstance(change, Change):
            expected = "the result of widen, deepen, keep, trained or by_map, or an AxisMap"
            raise InputError("changes", "", type(change).__name__, expected)
        moves.append(Move(change.from_size(size_of(sizes, change.axis)), change.start))
    for map_ in (move.map for move in moves):
        if map_.old != sizes[map_.axis]:
            raise InputError(
                map_.axis, "size", map_.old, f"the parameters' own, {sizes[map_.axis]}"
            )
        if map_.over and len(map_.source) != size_of(sizes, map_.over):
            expected = f"one for each entry of {map_.over!r}, {sizes[map_.over]}"
            raise InputError(map_.axis, "rows", len(map_.source), expected)
    if len({move.map.axis for move in moves}) < len(moves):
        axes = [move.map.axis for move in moves]
        raise InputError("changes", "", axes, "one map per axis")
    return moves


def size_of(sizes: Mapping[str, int], axis: str) -> int:
    """Return the size of an axis.

    Raises:
      InputError: the signatures have no such axis.
    """
    if axis not in sizes:
        expected = f"an axis of the signatures: {', '.join(sorted(sizes))}{nearest(axis, sizes)}"
        raise InputError("axis", "", axis, expected)
    return sizes[axis]


def composed(moves: Sequence[Move]) -> list[Move]:
    """Return moves in the order to apply: whole axes first, then those with rows, rearranged.

    Raises:
      InputError: a map with rows over an axis whose own map has rows.
    """
    by_axis = {move.map.axis: move.map for move in moves}
    whole = [move for move in moves if not move.map.over]
    rows = [move for move in moves if move.map.over]
    return whole + [
        Move(move.map.rows_after(by_axis[move.map.over]), move.start)
        if move.map.over in by_axis
        else move
        for move in rows
    ]


def covered(moves: Sequence[Move], part: Trained, size: int) -> list[Move]:
    """Return how the axes of a state change that covers only some entries of one axis.

    Args:
      moves: of the parameters, composed.
      part: the entries it covers.
      size: size of that axis before.

    Raises:
      InputError: an entry out of range or named twice.
    """
    along = {move.map.axis: move for move in moves}
    whole = along.get(part.axis, Move(cut(part.axis, size, size), FreshStart()))
    if whole.map.over:
        expected = "a change of the whole axis, because only part of it is trained"
        raise InputError(part.axis, "over", whole.map.over, expected)
    for name, entries, most in (
        ("before", part.before, size),
        ("after", part.after, whole.map.new),
    ):
        if len(set(entries)) < len(entries) or not set(entries) <= set(range(most)):
            expected = f"entries of {part.axis!r} from 0 to {most - 1}, each once"
            raise InputError("trained", name, list(entries), expected)
    after = np.asarray(part.after, int)
    place = {entry: number for number, entry in enumerate(part.before)}
    restarted = whole.map.is_copy & (whole.start.moments == "fresh")
    source = np.where(restarted, FRESH, whole.map.source)[after]
    source = np.asarray([place.get(entry, FRESH) for entry in source.tolist()], int)
    silent = whole.map.silent[after]
    mine = AxisMap(part.axis, len(part.before), source, np.ones(len(after)), silent=silent)
    others = [
        Move(_rows(move.map, after), move.start) if move.map.over == part.axis else move
        for move in moves
        if move.map.axis != part.axis
    ]
    return [Move(mine, whole.start), *others]


def _rows(change: AxisMap, rows: np.ndarray) -> AxisMap:
    """Return a map with some of its rows."""
    tables = {name: getattr(change, name)[rows] for name in ("source", "share", "silent")}
    return dataclasses.replace(change, **tables)
