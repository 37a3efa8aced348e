"""Axis maps: the source of each entry of a changed axis, and the share its consumers take of it.

Duplicated units after Chen et al. 2015 (Net2Net, arXiv 1511.05641), with unequal shares after Wang et
al. 2023 (LEMON, arXiv 2310.07999); fresh units with consumers at zero after Gesmundo & Maile 2023
(arXiv 2308.06103).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmorph.cli.errors import InputError, nearest

FRESH = -1  # the source of a fresh entry
# Entries to keep: indices, or with `over` a list of them per entry of that axis.
Entries = Sequence[int] | Sequence[Sequence[int]] | np.ndarray
ORDERS = ("stack", "interleave", "middle")


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How one axis changes.

    Args:
      axis: its name in the signatures.
      old: its size before.
      source: int [new], the old entry that each new one copies, or FRESH. With `over`, here and in
        `share` and `silent`, [size of `over`, new].
      share: float [new], the factor on the consumers' weights of the source entry. To preserve the
        function, the shares of all copies of one source must sum to 1.
      spread: half-width of the uniform random part of a share, drawn per weight of a consumer; the
        first copy gets the remainder to 1. 0: shares exactly as in `share`.
      noise: standard deviation of the noise on matrices that produce a copy, in standard deviations
        of their entries; the first copy gets none.
      silent: bool [new], entries that add nothing to the residual stream: parameters with `+>` that
        are stacked on the axis are zero there. Empty: none.
      scale: ratio, after over before, of the factor by which the model multiplies activations along
        the axis; 1 unless it depends on the axis's size, as an adapter's alpha / rank does. The
        function is preserved if the shares compensate for it.
      over: the stacked axis with one row of the map per entry, for example if layer 0 drops other
        heads than layer 1. Rows are counted before the call; if that axis changes in the same call,
        each row moves with its entry. "": the same map everywhere.

    Raises:
      InputError: arrays whose shapes do not match, a source out of range, or random shares or noise
        with `over`.
    """

    axis: str
    old: int
    source: np.ndarray
    share: np.ndarray
    spread: float = 0.0
    noise: float = 0.0
    silent: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    scale: float = 1.0
    over: str = ""

    def __post_init__(self) -> None:
        for name, dtype in (("source", int), ("share", float), ("silent", bool)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        if not self.silent.size:
            object.__setattr__(self, "silent", np.zeros(self.source.shape, bool))
        shapes = [self.source.shape, self.share.shape, self.silent.shape]
        if len(set(shapes)) > 1 or self.source.ndim != (2 if self.over else 1):
            wanted = f"[size of {self.over}, new]" if self.over else "[new]"
            raise InputError(
                self.axis, "source, share and silent", shapes, f"one shape, {wanted}, for all three"
            )
        if ((self.source < FRESH) | (self.source >= self.old)).any():
            raise InputError(
                self.axis,
                "source",
                self.source.tolist(),
                f"each from 0 to {self.old - 1}, or FRESH",
            )
        for name in ("spread", "noise"):
            if self.over and getattr(self, name):
                wanted = f"0, because every entry of {self.over!r} has its own source"
                raise InputError(self.axis, name, getattr(self, name), wanted)

    @property
    def new(self) -> int:
        """Return the size after."""
        return self.source.shape[-1]

    @property
    def is_fresh(self) -> np.ndarray:
        """Return which entries are fresh, bool, shaped like `source`."""
        return self.source == FRESH

    @property
    def is_copy(self) -> np.ndarray:
        """Return which entries repeat the source of an earlier one in their row, shaped likewise."""
        repeated = np.ones(self.source.shape, bool)
        for row, source in zip(np.atleast_2d(repeated), np.atleast_2d(self.source), strict=True):
            row[np.unique(source, return_index=True)[1]] = False
        return repeated & ~self.is_fresh

    def rows_after(self, stacked: AxisMap) -> AxisMap:
        """Return the map with its rows rearranged for a change of the axis `over`.

        A fresh entry of `over` copies nothing along this axis, so its row does not matter.

        Args:
          stacked: how `over` changes.

        Raises:
          InputError: `stacked` has rows of its own.
        """
        if stacked.over:
            expected = f"no rows, because {self.axis!r} has a row for each of its entries"
            raise InputError(stacked.axis, "over", stacked.over, expected)
        plain = AxisMap(
            self.axis, self.old, np.arange(self.new) % max(1, self.old), np.ones(self.new)
        )
        nowhere = [len(self.source)] * stacked.new  # the row after the last one
        rows = np.where(stacked.is_fresh, nowhere, stacked.source)
        tables = {
            name: np.concatenate([getattr(self, name), getattr(plain, name)[None]])[rows]
            for name in ("source", "share", "silent")
        }
        return dataclasses.replace(self, **tables)


def duplicate(axis: str, old: int, new: int, *, spread: float = 0.0, noise: float = 0.0) -> AxisMap:
    """Return the map that fills an axis with copies: 0 … old-1, then 0, 1, … again.

    The copies of a unit share its consumers' weights evenly, or randomly around that with `spread`.

    Args:
      axis: its name.
      old: its size before.
      new: its size after.
      spread: see `AxisMap`.
      noise: see `AxisMap`.
    """
    _check_growth(axis, old, new)
    source = np.arange(new) % old
    share = 1.0 / np.bincount(source)[source]
    return AxisMap(axis, old, source, share, spread, noise)


def pad(axis: str, old: int, new: int, *, scale: float = 1.0) -> AxisMap:
    """Return the map that appends fresh units: their producers are fresh, their consumers zero.

    Args:
      axis: its name.
      old: its size before.
      new: its size after.
      scale: see `AxisMap`; consumers compensate for it.
    """
    _check_growth(axis, old, new, least=0)
    source = np.concatenate([np.arange(old), np.full(new - old, FRESH)])
    return AxisMap(axis, old, source, np.full(new, 1 / scale), scale=scale)


def renew(axis: str, size: int) -> AxisMap:
    """Return the map that replaces all units with fresh ones, whose consumers are zero."""
    return AxisMap(axis, size, np.full(size, FRESH), np.ones(size))


def cut(axis: str, old: int, new: int) -> AxisMap:
    """Return the map that keeps the first `new` entries, or all, and drops the others.

    Raises:
      InputError: `new` is larger than `old`.
    """
    if new > old:
        raise InputError(axis, "new size", new, f"at most its size now, {old}")
    return AxisMap(axis, old, np.arange(new), np.ones(new))


def kept(axis: str, old: int, entries: Entries, over: str) -> AxisMap:
    """Return the map that keeps some entries, in the given order, and drops the others.

    Args:
      axis: its name.
      old: its size before.
      entries: indices to keep; with `over`, a list of them per entry of that axis.
      over: see `AxisMap`.

    Raises:
      InputError: an entry out of range or named twice, or lists of different lengths.
    """
    rows: list[Any] = [np.asarray(row).tolist() for row in entries]  # of lists or of NumPy's
    if any(isinstance(row, list) != bool(over) for row in rows):
        wanted = f"a list for each entry of {over!r}" if over else "a flat list, or `over`"
        raise InputError(axis, "entries", rows, wanted)
    rows = rows if over else [rows]
    if len({len(row) for row in rows}) > 1:
        raise InputError(axis, "entries", rows, f"as many for each entry of {over!r}")
    for row in rows:
        if len(set(row)) < len(row) or not set(row) <= set(range(old)):
            raise InputError(axis, "entries", row, f"numbers from 0 to {old - 1}, each once")
    source = np.asarray(rows if over else rows[0], int)
    return AxisMap(axis, old, source, np.ones(source.shape), over=over)


def repeat(
    axis: str,
    old: int,
    new: int,
    *,
    order: str = "stack",
    fresh: bool = False,
    silent: bool = False,
) -> AxisMap:
    """Return the map that repeats the entries of a stacked axis.

    Args:
      axis: its name.
      old: its size before; if 0, all entries are fresh.
      new: its size after.
      order: `stack` 0 1 0 1, `interleave` 0 0 1 1, or `middle`, which repeats the middle half,
        0 1 2 1 2 3.
      fresh: add fresh entries instead of copies.
      silent: the new entries add nothing to the residual stream.

    Raises:
      InputError: an unknown order, or no growth.
    """
    _check_growth(axis, old, new, least=0)
    check_order(order)
    source = _repeated(old, new, order) if old else np.full(new, FRESH)
    return arranged(axis, old, source, fresh=fresh, silent=silent)


def arranged(
    axis: str,
    old: int,
    source: Sequence[int] | np.ndarray,
    *,
    fresh: bool = False,
    silent: bool = False,
) -> AxisMap:
    """Return the map that copies the given entries of a stacked axis; the first copy is the old entry.

    Args:
      axis: its name.
      old: its size before.
      source: the entry that each new one copies, or FRESH.
      fresh: see `repeat`.
      silent: see `repeat`.

    Raises:
      InputError: a source out of range.
    """
    copied = AxisMap(axis, old, np.asarray(source, int), np.ones(len(source)))
    is_new = copied.is_copy | copied.is_fresh
    source = np.where(is_new & fresh, FRESH, copied.source)
    return dataclasses.replace(copied, source=source, silent=is_new & silent)


def check_order(order: str) -> None:
    """Check that `order` is one of ORDERS.

    Raises:
      InputError: it is not.
    """
    if order not in ORDERS:
        expected = f"one of {', '.join(ORDERS)}{nearest(order, ORDERS)}"
        raise InputError("order", "", order, expected)


def _repeated(old: int, new: int, order: str) -> np.ndarray:
    """Return the source of each of `new` layers."""
    if order == "stack":
        return np.arange(new) % old
    if order == "interleave":
        return np.arange(new) * old // new
    window = min(new - old, max(1, old // 2))
    start = (old - window) // 2
    inserted = start + np.arange(new - old) % window
    layers = np.arange(old)
    return np.concatenate([layers[: start + window], inserted, layers[start + window :]])


def _check_growth(axis: str, old: int, new: int, least: int = 1) -> None:
    if old < least:
        raise InputError(axis, "size", old, "at least 1 entry to copy")
    if new <= old:
        raise InputError(axis, "new size", new, f"more than its size now, {old}")
