"""The position of a run, as counted on the host; part of every checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from jaxmorph.config.settings import Count, Within
from jaxmorph.growth.triggers import LossTrend, Reason

Total = Annotated[int, Within(low=0)]


@dataclass(frozen=True)
class Position:
    """The position of a run.

    Args:
      step: optimizer steps taken.
      examples: sequences read from the training stream of the current context length.
      tokens: tokens trained on.
      flops: floating-point operations spent on training.
      val_loss: newest validation loss; None before the first, or if it was not finite.
      trend: of the validation loss since the last operation.
      next_operation: how many entries of the schedule have fired.
      last_operation_step: the step at which the last one fired; 0 before the first.
      pending: the trigger of an operation that could not be done; a resumed run retries it first.
      turns: what the loop's turns remember between calls, by name; JSON values.
    """

    step: Count = 0
    examples: Total = 0
    tokens: Total = 0
    flops: Total = 0
    val_loss: float | None = None
    trend: LossTrend = field(default_factory=LossTrend)
    next_operation: Count = 0
    last_operation_step: Count = 0
    pending: Reason | None = None
    turns: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Position:
        """Return the position that `dataclasses.asdict` wrote."""
        return Position(**{**fields, "trend": LossTrend(**fields["trend"])})

    def evaluated(self, loss: float, min_change: float) -> Position:
        """Return the position after an evaluation.

        Args:
          loss: the validation loss, finite or not.
          min_change: see `LossTrend.after`.
        """
        trend = self.trend.after(loss, min_change)
        return dataclasses.replace(self, val_loss=_finite_or_none(loss), trend=trend)

    def evaluated_again(self, loss: float) -> Position:
        """Return the position after an operation's re-evaluation."""
        trend = LossTrend.since_operation(loss)
        return dataclasses.replace(self, val_loss=_finite_or_none(loss), trend=trend)

    def after_operation(self) -> Position:
        """Return the position after the next operation, in the same stream of examples."""
        return dataclasses.replace(
            self,
            next_operation=self.next_operation + 1,
            last_operation_step=self.step,
            trend=LossTrend.since_operation(),
        )


def _finite_or_none(value: float) -> float | None:
    """Return a loss as stored in a checkpoint."""
    return value if math.isfinite(value) else None
