"""Sums with counts: measures on part of a batch, so that means over all parts are exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Mean(NamedTuple):
    """A mean before its division: a total and a count, both scalars."""

    total: Any
    count: Any

    @property
    def value(self) -> Any:
        """Return the mean."""
        return self.total / self.count


Measures = Mapping[str, Mean]  # by name
