"""What triggers an operation: the validation loss, a plateau of it, or a longest wait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxmorph.config.settings import Count
from jaxmorph.growth.schedule import Entry

Reason = Literal["loss", "plateau", "timeout"]


@dataclass(frozen=True)
class LossTrend:
    """The course of the validation loss since the last operation, or since the start.

    Args:
      best: the loss at the last improvement; None before the first finite one.
      evaluations: how many in a row have not improved on it.
    """

    best: float | None = None
    evaluations: Count = 0

    @staticmethod
    def since_operation(loss: float | None = None) -> LossTrend:
        """Return the trend right after an operation.

        Args:
          loss: the re-evaluated loss; None if there is none or it is not finite.
        """
        return LossTrend(None if loss is None or not math.isfinite(loss) else loss)

    def after(self, loss: float | None, min_change: float) -> LossTrend:
        """Return the trend after one more evaluation.

        Args:
          loss: its result. A non-finite one, or None, is no improvement.
          min_change: the fraction of the best loss by which a new one must be lower to improve on it.
        """
        best = self.best
        enough = math.inf if best is None else best - min_change * abs(best)
        if loss is not None and math.isfinite(loss) and loss < enough:
            return LossTrend(loss)
        return LossTrend(self.best, self.evaluations + 1)


def due(
    entry: Entry, step: int, last_operation_step: int, val_loss: float | None, trend: LossTrend
) -> Reason | None:
    """Return why the next entry of the schedule fires now, or None if it does not.

    Args:
      entry: the entry.
      step: optimizer steps taken.
      last_operation_step: the step at which the last operation fired; 0 before the first.
      val_loss: the newest validation loss at an evaluation and right after an operation; None at
        other times, when only the longest wait can be over. A non-finite one is below no threshold.
      trend: of the validation loss since the last operation, including the newest evaluation.
    """
    threshold, patience, wait = entry.trigger_loss, entry.trigger_plateau, entry.max_wait_iters
    loss = val_loss if val_loss is not None and math.isfinite(val_loss) else math.inf
    if threshold is not None and loss < threshold:
        return "loss"
    if val_loss is not None and patience is not None and trend.evaluations >= patience:
        return "plateau"
    return "timeout" if wait is not None and step - last_operation_step >= wait else None
