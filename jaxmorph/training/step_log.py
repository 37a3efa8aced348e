"""Log a run's steps: one line each in metrics.jsonl, the display, the trackers.

Device values are fetched two steps late, so that the host never blocks on the step it has just
dispatched.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmorph.cli.errors import FailedError
from jaxmorph.cli.progress import Progress
from jaxmorph.config.settings import RunSettings
from jaxmorph.growth.plan import Stage
from jaxmorph.step.metrics import Metric
from jaxmorph.storage.json_lines import JsonLines
from jaxmorph.training.time_left import TimeLeft
from jaxmorph.training.trackers import Tracker

_STEPS_IN_FLIGHT = 2
Totals = dict[str, int]


class DivergedError(FailedError):
    """The loss or the gradient stayed non-finite; the run cannot continue."""


class StepLog:
    """Write one line per step once it is complete, and show the newest.

    Args:
      lines: the run's metrics.jsonl.
      trackers: TensorBoard, W&B.
      progress: the display.
      settings: intervals and limits.
      time_left: the estimate of the time left, kept up to date here.
      peak_flops: of all devices together; None if unknown.
      loss: the metric shown as the loss.
    """

    def __init__(
        self,
        lines: JsonLines,
        trackers: list[Tracker],
        progress: Progress,
        settings: RunSettings,
        time_left: TimeLeft,
        peak_flops: float | None,
        loss: Metric,
    ):
        self._lines, self._trackers, self._progress = lines, trackers, progress
        self._settings, self._peak, self._loss = settings, peak_flops, loss
        self._time_left = time_left
        self._pending: deque[tuple[Totals, dict[str, jax.Array]]] = deque()
        self._held: dict[str, Any] | None = None  # the newest line, to which an evaluation may add
        self._then = time.monotonic()
        self._seconds, self._steps, self._tokens, self._flops = 0.0, 0, 0, 0
        self._flops_before = 0

    def step(self, after: Totals, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of a step just dispatched; write those of finished steps.

        Args:
          after: "step", running totals "tokens" and "flops" after it, and sizes to record as well.
          metrics: device scalars by name, as returned by `programs.Programs.update`.

        Raises:
          DivergedError: too many updates in a row were skipped.
        """
        self._pending.append((after, metrics))
        while len(self._pending) > _STEPS_IN_FLIGHT:
            self._fetch()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the line of `step`, the newest one."""
        self.flush_to_held()
        self.restart_clock()
        if self._held is None:  # the run has just begun, or was resumed at a line already written
            self._held = self._lines.take_back(step) or {"step": step}
        assert self._held["step"] == step
        self._held.update(values)

    def restart_clock(self) -> None:
        """Restart the step timer, to exclude evaluations and operations."""
        self._then = time.monotonic()

    def evaluated(self, seconds: float, stage: int) -> None:
        """Take the time of an evaluation, in stage number `stage`."""
        self._time_left.evaluated(seconds, stage)

    def operated(self, step: int, number: int, text: str, stages: Sequence[Stage]) -> None:
        """Take an operation that has fired after `step`.

        Args:
          step: the step.
          number: the operation's in the schedule.
          text: what it said.
          stages: of the plan, as it is now.
        """
        self._time_left.operated(step, stages)
        for tracker in self._trackers:
            tracker.operation(step, number, text)

    def flush(self) -> None:
        """Wait for every dispatched step, and write all lines, in trackers as well."""
        self.flush_to_held()
        self._write_held()
        for tracker in self._trackers:
            tracker.flush()

    def flush_to_held(self) -> None:
        """Wait for every dispatched step; write all lines but the newest."""
        while self._pending:
            self._fetch()

    def discard(self) -> None:
        """Forget the lines not yet written; trackers keep theirs, in files of this process."""
        self._pending.clear()
        self._held = None

    def close(self) -> None:
        """Write all lines and close the trackers."""
        self.flush()
        for tracker in self._trackers:
            tracker.close()

    def resume_totals(self, tokens: int, flops: int) -> None:
        """Set the initial totals, so that the first rates shown are correct."""
        self._tokens, self._flops, self._flops_before = tokens, flops, flops

    def _fetch(self) -> None:
        after, metrics = self._pending.popleft()
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self._write_held()
        self._take_time(after)
        self._held = {"step": after["step"]}
        step, interval = after["step"], self._settings.log_interval
        if step % interval == 0 or step in (1, self._time_left.total):
            self._held |= self._full_line(after, values)
        if values["skipped_in_a_row"] >= self._settings.max_nonfinite_steps:
            self._pending.clear()
            self._write_held()
            raise DivergedError(
                f"loss or gradient was not finite in {values['skipped_in_a_row']} steps in a row, "
                f"up to step {after['step']} (loss {values[self._loss.name]}, gradient norm "
                f"{values['train/grad_norm']})"
            )

    def _take_time(self, after: Totals) -> None:
        now = time.monotonic()
        seconds, self._then = now - self._then, now
        self._seconds += seconds
        self._steps += 1
        self._time_left.stepped(seconds, after["flops"] - self._flops_before)
        self._flops_before = after["flops"]

    def _full_line(self, after: Totals, values: dict[str, float]) -> dict[str, Any]:
        line = {name: value for name, value in values.items() if name != "skipped_in_a_row"}
        line |= {"step_seconds": self._seconds / self._steps} | after
        tokens, flops = after["tokens"] - self._tokens, after["flops"] - self._flops
        rates = tokens / self._seconds, flops / self._seconds
        self._seconds, self._steps = 0.0, 0
        self._tokens, self._flops = after["tokens"], after["flops"]
        loss = self._loss.written(values[self._loss.name])
        facts = f"loss {loss}  lr {values['train/learning_rate']:.2e}"
        facts += f"  {rates[0]:,.0f} tokens/s"
        if self._peak:
            facts += f"  MFU {rates[1] / self._peak:.1%}"
        if skipped := values["train/skipped"]:
            facts += f"  skipped {skipped}"
        left = self._time_left.seconds(after["step"], after["stage"])
        self._progress.update(after["step"], facts, left)
        return line

    def _write_held(self) -> None:
        if self._held is None:
            return
        self._lines.write(self._held)
        numbers = {k: v for k, v in self._held.items() if k != "step"}
        if numbers:
            for tracker in self._trackers:
                tracker.log(self._held["step"], numbers)
        self._held = None
