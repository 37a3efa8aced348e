"""What a change did to every leaf."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

How = Literal["transported", "fresh", "reset"]


@dataclass(frozen=True)
class Line:
    """What happened to one leaf, or to part of it.

    Args:
      path: of the leaf in the new optimizer state, or of the parameter.
      field: the field of the optimizer's state (mu, nu, ...); "params" for a parameter.
      how: transported from the old state, fresh, or reset to the optimizer's `init`.
      entries: number of entries.
    """

    path: str
    field: str
    how: How
    entries: int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["errors", "other"], meta_fields=["lines"]
)
@dataclass(frozen=True)
class Report:
    """What happened to every leaf. A pytree, so that a jitted function can return it.

    Args:
      lines: what happened to each leaf, or to each part of one; static.
      errors: relative error in the Frobenius norm of each matrix that could only be approximated, by
        path, over all layers together.
      other: each array of `apply`'s `other` after the change, by name.
    """

    lines: tuple[Line, ...]
    errors: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    other: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def totals(self) -> dict[str, int]:
        """Return how many entries of the new optimizer state were transported, fresh or reset."""
        kinds: tuple[How, ...] = ("transported", "fresh", "reset")
        state = [line for line in self.lines if line.field != "params"]
        return {how: sum(line.entries for line in state if line.how == how) for how in kinds}

    def of_part(self, part: int, whole: int) -> Report:
        """Return the report where only `part` of `whole` equal parts of what is fresh is."""
        lines: list[Line] = []
        for line in self.lines:
            fresh = line.entries * part // whole if line.how == "fresh" else line.entries
            rest = line.entries - fresh
            lines += [dataclasses.replace(line, entries=fresh)] * (fresh > 0 or not rest)
            lines += [dataclasses.replace(line, how="transported", entries=rest)] * (rest > 0)
        return dataclasses.replace(self, lines=tuple(lines))

    def __str__(self) -> str:
        counts = ", ".join(f"{entries:,} {how}" for how, entries in self.totals.items())
        lost = {path: float(error) for path, error in self.errors.items()}
        worst = max(lost, key=lambda path: lost[path], default="")
        losses = f"; largest relative error {lost[worst]:.2g}, of {worst}" if lost else ""
        return f"optimizer state: {counts} entries{losses}"


def lines_of(path: str, field: str, shape: tuple[int, ...], fresh: np.ndarray) -> list[Line]:
    """Return the lines of one leaf.

    Args:
      path: see `Line`.
      field: see `Line`.
      shape: its shape after.
      fresh: which entries are fresh, bool, of size 1 along axes that do not matter.
    """
    entries = int(np.prod(shape))
    begun = int(fresh.sum()) * entries // max(1, fresh.size)
    parts: list[tuple[How, int]] = [("transported", entries - begun), ("fresh", begun)]
    return [Line(path, field, how, count) for how, count in parts if count or not entries]
