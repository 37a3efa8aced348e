"""The time a run still takes, from what its steps and evaluations have taken so far."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxmorph.growth.forecast import Span, evaluation_flops, stages_ahead, step_flops
from jaxmorph.growth.plan import Stage

_NEWEST = 0.05  # weight of the newest step in the smoothed speed


class TimeLeft:
    """Estimate the time left: the FLOPs ahead, those of later stages too, at the measured speed.

    Saving and the operations themselves are not counted.

    Args:
      stages: of the plan.
      total: the step the run ends at.
      last_operation_step: the step of the last operation; 0 before the first.

    Attributes:
      total: the step the run ends at.
    """

    def __init__(self, stages: Sequence[Stage], total: int, last_operation_step: int = 0):
        self.total = total
        self.operated(last_operation_step, stages)
        self._steps_seen = 0
        self._seconds_per_flop: float | None = None  # of training
        self._evaluating: float | None = None  # the same of evaluations; None: none measured yet

    def operated(self, step: int, stages: Sequence[Stage]) -> None:
        """Take the step of the last operation, and the plan's stages after it."""
        self._last_operation_step, self._stages = step, stages
        self._costs = functools.cache(self._costs_of)

    def stepped(self, seconds: float, flops: int) -> None:
        """Take the time of a step; the first is ignored, since it may include compiling."""
        self._steps_seen += 1
        if self._steps_seen == 1:
            return
        new, old = seconds / flops, self._seconds_per_flop
        self._seconds_per_flop = new if old is None else old + _NEWEST * (new - old)

    def evaluated(self, seconds: float, stage: int) -> None:
        """Take the time of an evaluation in stage number `stage`."""
        self._evaluating = seconds / self._costs(stage)[1]

    def seconds(self, step: int, stage: int) -> float | None:
        """Return the estimated seconds to the end of the run; None while no speed is known.

        Args:
          step: steps taken.
          stage: the number of the present stage.
        """
        if self._seconds_per_flop is None:
            return None
        ahead = stages_ahead(
            self._stages,
            self.total,
            stage=stage,
            step=step,
            last_operation_step=self._last_operation_step,
        )
        training, evaluating = 0, 0
        for span in ahead:
            step_cost, evaluation_cost = self._costs(span.stage.number)
            training += (span.end - span.begin) * step_cost
            evaluating += (
                self._evaluations(span, begins=span.stage.number > stage) * evaluation_cost
            )
        rate = self._seconds_per_flop
        return training * rate + evaluating * (self._evaluating or rate)

    def _evaluations(self, span: Span, *, begins: bool) -> int:
        """Return the number of evaluations in a span, with that right after its operation."""
        interval, entry = span.stage.shape.eval_interval, span.stage.entry
        count = span.end // interval - span.begin // interval
        count += span.begin < span.end == self.total and span.end % interval != 0
        return count + (begins and entry is not None and entry.reevaluate)

    def _costs_of(self, stage: int) -> tuple[int, int]:
        """Return the FLOPs of a step and of an evaluation."""
        shape = self._stages[stage].shape
        return step_flops(shape), evaluation_flops(shape, self._stages[0].shape.batch_size)
