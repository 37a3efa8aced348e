"""A run in progress: its state, its position, and the actions available to the loop's turns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmorph.cli.printing import say
from jaxmorph.cli.progress import Progress
from jaxmorph.growth.plan import Stage
from jaxmorph.growth.schedule import Entry
from jaxmorph.growth.triggers import Reason, due
from jaxmorph.model.measures import Mean
from jaxmorph.model.tree_paths import leaves_by_path
from jaxmorph.step.sharding import place_batch
from jaxmorph.step.state import TrainState
from jaxmorph.step.task import Batch
from jaxmorph.system import processes
from jaxmorph.system.crash_points import crash_point
from jaxmorph.system.signals import StopSignals
from jaxmorph.training.active_stage import ActiveStage
from jaxmorph.training.announcement import announcement
from jaxmorph.training.ending import record_waiting
from jaxmorph.training.head_log import Status, head_line
from jaxmorph.training.head_meter import Head
from jaxmorph.training.operate import OperationFailedError, OperationResult, failure, perform
from jaxmorph.training.position import Position
from jaxmorph.training.preparation import Setup
from jaxmorph.training.resume import CheckpointRecord
from jaxmorph.training.room import may_be_too_large
from jaxmorph.training.step_log import StepLog


class Run:
    """A run in progress.

    Args:
      setup: what is constant during the run.
      state: the state to start from.
      position: its position.
      log: the log of its steps.
      progress: the display.
      signals: signals that ask the run to stop.

    Attributes:
      state: the run's state.
      position: its position.
      active: the objects of the active stage.
      new_loss: the loss that triggers may fire on: the one evaluated after the last step, then the
        newest after each operation there; None if nothing was evaluated.
      boosted: the active stage for which the boosts of its layers have been set, in this process.
    """

    def __init__(
        self,
        setup: Setup,
        state: TrainState,
        position: Position,
        log: StepLog,
        progress: Progress,
        signals: StopSignals,
    ):
        self.setup, self.state, self.position = setup, state, position
        self.active: ActiveStage = setup.activate(position.next_operation)
        self.new_loss: float | None = None
        self._loss: float | None = None  # of the state as it is; None: not measured
        self.log, self.progress, self._signals = log, progress, signals
        self.boosted: ActiveStage | None = None
        self._saved = position  # the newest position that a checkpoint may have

    @property
    def step(self) -> int:
        """Return the number of updates so far."""
        return self.position.step

    @property
    def stage(self) -> Stage:
        """Return the active stage of the plan."""
        return self.active.stage

    @property
    def is_last(self) -> bool:
        """Return whether the last step was the run's final one."""
        return self.step >= self.setup.total_steps

    @property
    def is_stopping(self) -> bool:
        """Return whether the run ends here, finished or interrupted."""
        return self.is_last or self._signals.received is not None

    @property
    def is_good(self) -> bool:
        """Return whether the last update was not skipped, and the loss is finite after it."""
        if int(self.state["skipped_in_a_row"]):
            return False
        if self._loss is None:  # neither evaluated nor re-evaluated: one batch tells
            task, batches = self.setup.tables.step.task, self.active.validation[:1]
            self._loss = self._measured(batches)[task.loss]
        return math.isfinite(self._loss)

    @property
    def checkpoint_interval(self) -> int:
        """Return the steps between checkpoints."""
        return self.setup.settings.run.checkpoint_interval or self.stage.shape.eval_interval

    def remember(self, name: str, value: Any) -> None:
        """Store a JSON value for a turn's next call, under its name.

        Raises:
          TypeError: JSON has no such value.
        """
        turns = {**self.position.turns, name: json.loads(json.dumps(value))}
        self.position = dataclasses.replace(self.position, turns=turns)

    def recall(self, name: str, first: Any) -> Any:
        """Return what a turn has stored, or `first` if nothing yet."""
        return self.position.turns.get(name, first)

    def update_until_stage_changes(self, after_step: Callable[[Run], None]) -> None:
        """Run steps, and `after_step` after each, until the stage changes or the run stops."""
        active = self.active
        stream = active.stream.batches(self.position.examples, active.stage.shape.batch_size)
        sums = active.programs.zero_sums()
        try:
            while self.active is active and not self.is_stopping:
                crash_point("step")
                self.setup.lock.check()
                sums = self._update(stream, sums)
                after_step(self)
        finally:
            stream.close()

    def _update(self, stream: Generator[Batch, None, None], sums: Any) -> Any:
        """Run one step; return zero sums."""
        active, mesh = self.active, self.setup.mesh
        for index in range(active.stage.shape.grad_accum_steps):
            batch = place_batch(mesh, next(stream))
            sums = active.programs.accumulate(self.state, sums, batch, np.int32(index))
        self.state, sums, metrics = active.programs.update(self.state, sums)
        self.position, self.new_loss = active.after_step(self.position), None
        self._loss = None
        if self.position.next_operation and self.step == self.position.last_operation_step + 1:
            crash_point("first_step")
        self.log.step(active.totals(self.position), metrics)
        return sums

    def evaluate(self) -> None:
        """Evaluate on the validation batches and record the result."""
        means = self._measured(self.active.validation, "evaluation")
        task = self.setup.tables.step.task
        loss = means[task.loss]
        self.record({f"val/{name}": value for name, value in means.items()})
        shown = [(metric, means.get(metric.name.removeprefix("val/"))) for metric in task.metrics]
        words = [
            f"{metric.label} {metric.written(mean)}" for metric, mean in shown if mean is not None
        ]
        self.progress.note(f"step {self.step}: {', '.join(words)}")
        value = np.asarray(loss, self.state["plateau"].avg_value.dtype)
        self.state = self.active.programs.observe(self.state, value)
        min_change = self.setup.settings.growth.plateau_min_change
        self.position = self.position.evaluated(loss, min_change)
        self.new_loss = self._loss = loss
        self.record_heads("evaluated", {})

    def record_heads(
        self,
        status: Status,
        measured: Mapping[str, np.ndarray],
        gates_before: np.ndarray | None = None,
    ) -> None:
        """Write a line of heads.jsonl, in a run that has it; see `head_log.head_line`."""
        if (log := self.setup.logs.heads) is not None:
            heads = self.setup.settings.heads
            where = self.state, self.position
            log.write(head_line(heads, *where, status, measured, gates_before))

    def head_measures(self) -> dict[str, np.ndarray]:
        """Return the measures of each head, [layer, head] by name; see `HeadMeter.measures`."""
        with self._measuring_heads():
            return self.active.heads.measures(self.state)

    def ablation(self, heads: Iterable[Head]) -> np.ndarray:
        """Return by how much the loss rises without each of these heads; see `HeadMeter.ablation`."""
        with self._measuring_heads():
            return self.active.heads.ablation(self.state, heads)

    def record(self, values: dict[str, float]) -> None:
        """Add values to the line of the last step, by metric name."""
        self.log.record(self.step, values)

    def operation_due(self) -> Reason | None:
        """Return why the next operation is due now; None if it is not, or there is none."""
        entries, position = self.setup.plan.entries, self.position
        if position.next_operation >= len(entries):
            return None
        entry = entries[position.next_operation]
        last = position.last_operation_step
        return due(entry, position.step, last, self.new_loss, position.trend)

    def operate_while_due(self) -> None:
        """Perform every due operation, one after the other.

        Raises:
          OperationFailedError: one could not be done; a checkpoint of the state before it is saved.
        """
        while (reason := self.operation_due()) is not None:
            self._operate(reason)
            self.new_loss = self.position.val_loss

    def look_again(self) -> None:
        """Let triggers see the newest loss again; an operation that failed there was not tried."""
        self.position = dataclasses.replace(self.position, pending=None)
        loss = self.position.val_loss
        self.new_loss = math.nan if loss is None else loss

    def save(self, *, provisional: bool = False) -> None:
        """Start saving a checkpoint. The log lines up to its step are written before it can commit.

        One of this step at another position is replaced: an operation has been done since.

        Args:
          provisional: an operation is still to be done at this step.

        Raises:
          RunLockLostError: the run folder may be another process's by now; nothing is written.
        """
        self.setup.lock.check()
        checkpoints = self.setup.checkpoints
        if self.step == self._saved.step and self.position != self._saved:
            checkpoints.discard(self.step)  # first, as it does not know the lines to come
        self._saved = self.position
        with self.progress.doing("saving"):
            self.log.flush()
            record_waiting(self.setup, self.position)
            checkpoints.save(
                self.step,
                leaves_by_path(self.state),
                CheckpointRecord.of(self.setup, self.position).to_meta(),
                score=self.position.val_loss if self.is_good else None,
                provisional=provisional,
            )

    def _operate(self, reason: Reason) -> None:
        self.log.flush_to_held()  # no step is in flight from here on
        entry = self.setup.plan.entries[self.position.next_operation]
        if entry.operation.kind == "morph":
            self._prepare_for(entry, reason)
        before, plan = (self.state, self.position, self.active, self._loss), self.setup.plan
        try:
            result = self._perform(reason)
            if entry.reevaluate:
                self._evaluate_again()
        except Exception as error:  # whatever it is, the run must end in its previous state
            self.state, position, self.active, self._loss = before
            self.setup.compiler.replan(plan)
            self.position = dataclasses.replace(position, pending=reason)
            self.save(provisional=True)
            raise OperationFailedError(failure(entry, error)) from error
        self.setup.logs.operations.write(
            result.record(self.position.val_loss if entry.reevaluate else None)
        )
        crash_point("operation_recorded")
        words = self._announcement(result)
        self.log.operated(self.step, entry.number, words, self.setup.plan.stages)
        self.setup.compiler.prefetch_after(self.position.next_operation)
        self.log.restart_clock()

    def _prepare_for(self, entry: Entry, reason: Reason) -> None:
        """Name the morph that begins, and save before one that may end the process for lack of memory.

        The checkpoint says that the operation is pending, so a run that is killed by it tries it again.
        """
        setup, index = self.setup, self.position.next_operation + 1
        words = f"step {self.step}: operation {entry.number}, {entry.title}, begins"
        if setup.checkpoints.newest() != self.step and may_be_too_large(
            setup.plan, setup.mesh, index
        ):
            position = self.position
            self.position = dataclasses.replace(position, pending=reason)
            self.save(provisional=True)
            self.position = position
            setup.checkpoints.wait()
            words += f"; checkpoint {self.step} is saved, as it may need more memory than there is"
        say(words, file=sys.stderr)

    def _perform(self, reason: Reason) -> OperationResult:
        """Apply the next operation to the state, and activate the stage after it."""
        setup, before = self.setup, self.active
        probe = setup.tables.step.task.inputs(before.validation[0])
        self.state, result = perform(
            setup.compiler,
            self.state,
            self.position,
            reason,
            probe,
            self.progress.doing,
            self.head_measures,
        )
        self._loss = None
        position = self.position.after_operation()
        self.active = setup.activate(position.next_operation)
        self.position = self.active.moved_from(before, position)
        self.progress.note(self._announcement(result))
        return result

    def _announcement(self, result: OperationResult) -> str:
        return announcement(result, len(self.setup.plan.entries))

    def _evaluate_again(self) -> None:
        """Evaluate right after an operation."""
        task = self.setup.tables.step.task
        loss = self._loss = self._measured(self.active.validation, "reevaluation")[task.loss]
        metric = task.metric(f"val/{task.loss}")
        self.progress.note(f"step {self.step}: {metric.label} after it {metric.written(loss)}")
        self.position = self.position.evaluated_again(loss)
        self.record({f"{metric.name}_after": loss})  # last: a failed operation leaves no trace

    @contextlib.contextmanager
    def _measuring_heads(self) -> Iterator[None]:
        """Say that heads are measured; no step takes the time for it."""
        self.log.flush_to_held()
        with self.progress.doing("measuring heads"):
            yield
        self.log.restart_clock()

    def _measured(self, batches: Sequence[Batch], crash: str = "") -> dict[str, float]:
        """Return the mean of each of the task's measures over validation batches."""
        self.log.flush_to_held()
        results, start = [], time.monotonic()
        with self.progress.doing("evaluating"):
            for batch in batches:
                placed = place_batch(self.setup.mesh, batch)
                results.append(self.active.programs.evaluate(self.state, placed))
                if crash:
                    crash_point(crash)
            parts, task = jax.device_get(results), self.setup.tables.step.task
        if crash:
            self.log.evaluated(time.monotonic() - start, self.stage.number)
        sums = {
            name: Mean(*(np.float64(math.fsum(part[name][k] for part in parts)) for k in (0, 1)))
            for name in parts[0]
        }
        with np.errstate(invalid="ignore", divide="ignore"):  # a count of 0 gives NaN
            means = {name: float(mean) for name, mean in task.means(sums).items()}
        # What is due must be the same on all processes.
        return means | {task.loss: processes.agreed(means[task.loss])}
