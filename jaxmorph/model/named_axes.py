"""Arrays over named axes that are no parameters: what they are over, and how a new entry begins.

The axes are those of the signatures. A change of shape moves such an array along with the parameters:
an entry goes where its layer or its head goes, and a layer or head that comes from nowhere begins
with `fresh`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedAxes:
    """The axes of an array that is no parameter, and what an entry without a predecessor begins with.

    Args:
      axes: names of the axes, in the order of the dimensions, separated by spaces: "layer head";
        "" for a scalar.
      fresh: the value of an entry that no old one becomes.
    """

    axes: str = ""
    fresh: float = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Return the axis of each dimension."""
        return tuple(self.axes.split())
