"""Arrays over named axes that are not parameters: their axes, and the value of a fresh entry.

The axes are those of the signatures. A change of shape changes such an array along with the
parameters: entries move with their layer or head, and a fresh layer or head is initialised to
`fresh`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedAxes:
    """The axes of an array that is not a parameter, and the initial value of fresh entries.

    Args:
      axes: names of the axes, in the order of the dimensions, separated by spaces: "layer head";
        "" for a scalar.
      fresh: the value of an entry without a source.
    """

    axes: str = ""
    fresh: float = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Return the axis of each dimension."""
        return tuple(self.axes.split())
