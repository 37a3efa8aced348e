"""Axis maps: where each entry of a changed axis comes from, and what its consumers take of it.

Duplicated units after Chen et al. 2015 (Net2Net, arXiv 1511.05641), with unequal shares after Wang et
al. 2023 (LEMON, arXiv 2310.07999); fresh units with consumers at zero after Gesmundo & Maile 2023
(arXiv 2308.06103).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from jaxmorph.cli.errors import InputError, nearest

FRESH = -1  # the source of an entry that comes from nowhere
ORDERS = ("stack", "interleave", "middle")


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How one axis changes.

    Args:
      axis: its name in the signatures.
      old: its size before.
      source: int [new], the old entry that each new one is a copy of, or FRESH.
      share: float [new], what consumers of an entry take of the original's weights. The shares of the
        copies of one source sum to 1 where the function is to stay as it is.
      spread: half-width of the uniform random part of a share, drawn for each weight of a consumer;
        the first copy takes what the others leave of 1. 0: every share as `share` says.
      noise: standard deviation of the noise on matrices that produce a copy, in standard deviations
        of their entries; the first copy gets none.
      silent: bool [new], entries that add nothing to the residual stream: what adds to it and is
        stacked on the axis is zero there.
      scale: by how much the model multiplies what passes through the axis after the change, over
        before; 1 but where it divides by the axis's size, as an adapter does with alpha / rank. The
        function stays as it is where shares make up for it.
    """

    axis: str
    old: int
    source: np.ndarray
    share: np.ndarray
    spread: float = 0.0
    noise: float = 0.0
    silent: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.silent.size:
            object.__setattr__(self, "silent", np.zeros(self.new, bool))
        assert self.source.shape == self.share.shape == self.silent.shape
        assert ((self.source >= FRESH) & (self.source < self.old)).all(), self.source

    @property
    def new(self) -> int:
        """Return the size after."""
        return len(self.source)

    @property
    def is_fresh(self) -> np.ndarray:
        """Return which entries come from nowhere, bool [new]."""
        return self.source == FRESH

    @property
    def is_copy(self) -> np.ndarray:
        """Return which entries have a source that an entry before them has too, bool [new]."""
        first = np.zeros(self.new, bool)
        first[np.unique(self.source, return_index=True)[1]] = True
        return ~first & ~self.is_fresh


def duplicate(axis: str, old: int, new: int, *, spread: float = 0.0, noise: float = 0.0) -> AxisMap:
    """Return the map that fills an axis up with copies: 0 … old-1, then 0, 1, … again.

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
      scale: see `AxisMap`; consumers make up for it.
    """
    _check_growth(axis, old, new, least=0)
    source = np.concatenate([np.arange(old), np.full(new - old, FRESH)])
    return AxisMap(axis, old, source, np.full(new, 1 / scale), scale=scale)


def renew(axis: str, size: int) -> AxisMap:
    """Return the map that puts fresh units in the place of all; nothing passes through them yet."""
    return AxisMap(axis, size, np.full(size, FRESH), np.ones(size))


def cut(axis: str, old: int, new: int) -> AxisMap:
    """Return the map that keeps the first `new` entries, or all, and drops the others.

    Raises:
      InputError: more entries than there are.
    """
    if new > old:
        raise InputError(axis, "new size", new, f"at most its size now, {old}")
    return AxisMap(axis, old, np.arange(new), np.ones(new))


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
      old: its size before; from 0 all entries are fresh.
      new: its size after.
      order: `stack` 0 1 0 1, `interleave` 0 0 1 1, or `middle`, which repeats the middle half,
        0 1 2 1 2 3.
      fresh: fresh entries where the copies would go.
      silent: the new entries add nothing to the residual stream.

    Raises:
      InputError: an unknown order, or no growth.
    """
    _check_growth(axis, old, new, least=0)
    if order not in ORDERS:
        expected = f"one of {', '.join(ORDERS)}{nearest(order, ORDERS)}"
        raise InputError("order", "", order, expected)
    source = _repeated(old, new, order) if old else np.full(new, FRESH)
    is_new = AxisMap(axis, old, source, np.ones(new)).is_copy if old else np.ones(new, bool)
    if fresh:
        source = np.where(is_new, FRESH, source)
    return AxisMap(axis, old, source, np.ones(new), silent=is_new if silent else is_new & False)


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
