"""How many attention heads of a run are closed, as far as its schedule says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# A head with a gate of CLOSED_GATE or less is closed, from OPEN_GATE on it is open; between the two it
# stays what it was.
CLOSED_GATE, OPEN_GATE = 0.1, 0.2


@dataclass(frozen=True)
class ClosedHeads:
    """The number of closed heads at one point of a schedule, which may not know it exactly.

    Args:
      fewest: heads, over all layers, that are closed at least.
      most: that are closed at most.
      controlled: whether the controller closes and opens heads too, so that any number may be closed.
      least_open: heads of each layer that stay open where heads are pruned.
      faint: whether the gates of some of them may be above 0, so that they still add a little.
    """

    fewest: int = 0
    most: int = 0
    controlled: bool = False
    least_open: int = 1
    faint: bool = False

    def bounded(self, fewest: int, most: int) -> ClosedHeads:
        """Return other bounds; with a controller there are none."""
        if self.controlled:
            return self
        fewest, most = max(0, fewest), max(0, most)
        return dataclasses.replace(self, fewest=fewest, most=most, faint=self.faint and most > 0)

    def resized(self, before: int, after: int) -> ClosedHeads:
        """Return the bounds where the model has another number of heads, some of them copies."""
        opened = before - self.most  # which stay, at least, if heads are added
        if after < before:
            return self.bounded(0, min(self.most, after))
        return self.bounded(self.fewest, after - opened if self.most else 0)


NONE_CLOSED = ClosedHeads()
