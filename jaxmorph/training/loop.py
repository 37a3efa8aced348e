"""The training loop: a run from its settings to its report, through any number of interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Generator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.progress import Progress, make_progress
from jaxmorph.config.resolve import Sources, to_yaml, values_of
from jaxmorph.config.settings import Settings
from jaxmorph.growth.schedule import due, schedule_json
from jaxmorph.model.tree_paths import leaves_by_path
from jaxmorph.report.page import write_report
from jaxmorph.step.sharding import place_batch
from jaxmorph.step.state import TrainState
from jaxmorph.storage.checkpoints import CheckpointError
from jaxmorph.storage.run_folder import JsonLines, RunLock, write_text_atomically
from jaxmorph.system.crash_points import crash_point
from jaxmorph.system.signals import StopSignals
from jaxmorph.training.metrics import DivergedError, StepLog, make_trackers, peak_flops
from jaxmorph.training.orchestrator import (
    OperationFailedError,
    Performed,
    Reason,
    announcement,
    failure,
    perform,
)
from jaxmorph.training.preparation import Setup, Stint, prepare
from jaxmorph.training.resume import (
    CheckpointRecord,
    Position,
    check_schedule,
    check_unchanged,
    finite_or_none,
    restore_state,
    same_json,
    schedule_record,
    with_total_steps,
)


def train(settings: Settings, sources: Sources) -> int:
    """Train as the settings say, from the start or from the run folder's newest sound checkpoint.

    Returns:
      The exit status: 0 done, 1 diverged or an operation failed, 143 or 130 stopped by a signal after
      saving.

    Raises:
      InputError: bad input, before the first step.
    """
    x64 = jax.enable_x64(True) if settings.model.dtype == "float64" else contextlib.nullcontext()
    run_dir = Path(str(settings.run.run_dir))
    _check_folder(run_dir)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    with x64, RunLock(run_dir), StopSignals() as signals:
        setup = prepare(settings, sources, run_dir)
        with contextlib.closing(setup.checkpoints), contextlib.closing(setup.compiler):
            state, position, resumed = begin_or_resume(setup)
            if position.step >= setup.total_steps and position.pending is None:
                print(f"The run is finished: step {position.step} of {setup.total_steps}.")
                return 0
            try:
                status = Loop(setup, state, position, resumed).run(signals)
            except CheckpointError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
        print(f"Report: {write_report(run_dir)}")
        return status


def _check_folder(run_dir: Path) -> None:
    """Refuse to write into a folder that holds someone's files rather than a run."""
    if (run_dir / "checkpoints").is_dir() or not run_dir.exists():
        return
    ours = ("config.yaml", "metrics.jsonl", "schedule.json", "tokenizer.json", "report.html")
    if taken := [name for name in ours if (run_dir / name).exists()]:
        raise InputError(
            "--run_dir", "", str(run_dir), f"a run's folder or a new one (it has a {taken[0]})"
        )


def begin_or_resume(setup: Setup) -> tuple[TrainState, Position, bool]:
    """Return state and position to go on from, and whether the run had begun before.

    The run folder's files are cut back to that position.
    """
    run_dir, checkpoints = setup.run_dir, setup.checkpoints
    checkpoints.remove_partial()
    step = checkpoints.latest_sound()
    if step is not None and not setup.settings.run.resume:
        raise InputError(
            "--no_resume", "", str(run_dir), "a folder without a run; give another --run_dir"
        )
    if step is None:
        state, position = setup.compiler.initial_state(), Position()
    else:
        state, position = _resume(setup, step)
    write_text_atomically(run_dir / "config.yaml", to_yaml(setup.settings))
    write_text_atomically(run_dir / "tokenizer.json", setup.corpus.tokenizer.to_json())
    if setup.plan.entries:
        write_text_atomically(run_dir / "schedule.json", schedule_json(setup.plan.entries))
    kept = -1 if step is None else position.step
    (run_dir / "operations.jsonl").touch()
    with JsonLines(run_dir / "metrics.jsonl") as lines:
        lines.cut_back_to_step(kept)
    # By number, not by step: an operation that failed at the checkpoint's step may have come later.
    with JsonLines(run_dir / "operations.jsonl") as lines:
        lines.cut_back(lambda record: record["index"] < position.next_operation)
    return state, position, step is not None


def _resume(setup: Setup, step: int) -> tuple[TrainState, Position]:
    record = CheckpointRecord.from_meta(setup.checkpoints.read_meta(step))
    settings, now = setup.settings, same_json(values_of(setup.settings))
    changes = check_unchanged(record, now, setup.corpus.sha256, str(setup.run_dir))
    changes += check_schedule(
        record,
        setup.plan.entries,
        str(settings.growth.scaling_schedule_file or "--scaling_schedule_file"),
        settings.growth.allow_schedule_change,
    )
    programs = setup.compiler.lazy(record.position.next_operation)
    state = restore_state(
        setup.checkpoints, step, programs.abstract_state, programs.state_shardings
    )
    print(f"Resuming at step {step}." + "".join(f"\n  changed {line}" for line in changes))
    return with_total_steps(state, setup.total_steps), record.position


class Loop:
    """A run under way: its state, where it stands and what it works with.

    Args:
      setup: what stays the same.
      state: to go on from.
      position: where that is.
      resumed: whether the run had begun before; if not, it begins with an evaluation and a checkpoint.
    """

    def __init__(self, setup: Setup, state: TrainState, position: Position, resumed: bool):
        self._setup, self._settings, self._resumed = setup, setup.settings, resumed
        self._state, self._position = state, position
        self._operations = JsonLines(setup.run_dir / "operations.jsonl")
        self._log: StepLog
        self._progress: Progress
        self._stint: Stint

    def run(self, signals: StopSignals) -> int:
        """Step until the run is done, fails or is asked to stop; return the exit status."""
        setup, run = self._setup, self._settings.run
        trackers = make_trackers(run, setup.run_dir, values_of(self._settings))
        lines = JsonLines(setup.run_dir / "metrics.jsonl")
        peak = peak_flops(list(setup.mesh.devices.flat), self._settings.model.dtype)
        with make_progress(run.progress, self._position.step, setup.total_steps) as progress:
            self._progress = progress
            self._log = StepLog(lines, trackers, progress, run, setup.total_steps, peak)
            self._log.resume_totals(self._position.tokens, self._position.flops)
            try:
                with contextlib.closing(self._operations), contextlib.closing(self._log):
                    self._begin()
                    self._steps(signals)
            except (DivergedError, OperationFailedError) as error:
                setup.checkpoints.wait()
                good = setup.checkpoints.folder / str(setup.checkpoints.newest())
                print(f"error: {error}. The last good checkpoint is {good}", file=sys.stderr)
                return 1
        setup.checkpoints.wait()
        return 0 if signals.received is None else signals.exit_status

    def _begin(self) -> None:
        self._stint = self._setup.stint(self._position.next_operation)
        self._setup.compiler.prefetch_after(self._position.next_operation)
        self._log.restart_clock()
        if self._resumed:
            self._retry()
            return
        self._evaluate()
        self._operate_while_due(self._position.val_loss)
        self._save()

    def _retry(self) -> None:
        """Do what could not be done when the checkpoint was saved, and save in its place."""
        if self._position.pending is None:
            return
        self._position = dataclasses.replace(self._position, pending=None)
        self._operate_while_due(self._position.val_loss)
        self._setup.checkpoints.discard(self._position.step)
        self._save()

    def _steps(self, signals: StopSignals) -> None:
        while self._position.step < self._setup.total_steps and signals.received is None:
            with contextlib.closing(self._batches()) as batches:
                self._steps_of_stint(batches, signals)
        self._save()  # a signal may have come after the last step's own

    def _batches(self) -> Generator[np.ndarray, None, None]:
        return self._stint.stream.batches(self._position.examples, self._stint.shape.batch_size)

    def _steps_of_stint(
        self, batches: Generator[np.ndarray, None, None], signals: StopSignals
    ) -> None:
        """Step until an operation has changed what the loop works with, or the run ends."""
        stint, programs, mesh = self._stint, self._stint.programs, self._setup.mesh
        sums, micro_batches = programs.zero_sums(), np.int32(stint.shape.grad_accum_steps)
        while stint is self._stint:
            crash_point("step")
            for index in range(stint.shape.grad_accum_steps):
                batch = place_batch(mesh, next(batches))
                sums = programs.accumulate(self._state, sums, batch, np.int32(index))
            self._state, sums, metrics = programs.update(self._state, sums, micro_batches)
            self._position = stint.after_step(self._position)
            last = self._position.last_operation_step
            if self._position.next_operation and self._position.step == last + 1:
                crash_point("first_step")
            self._log.step(stint.totals(self._position), metrics)
            if self._after_step(signals):
                return

    def _after_step(self, signals: StopSignals) -> bool:
        """Evaluate, operate and save as the step just done asks for; return whether to stop."""
        step, run = self._position.step, self._settings.run
        last, heard = step == self._setup.total_steps, None
        if last or step % self._stint.shape.eval_interval == 0:
            self._evaluate()
            heard = self._position.val_loss
        self._operate_while_due(heard)
        stop = last or signals.received is not None
        if stop or step % (run.checkpoint_interval or self._stint.shape.eval_interval) == 0:
            self._save()
        return stop

    def _operate_while_due(self, heard: float | None) -> None:
        """Perform every operation that is due, one after the other.

        Args:
          heard: the validation loss just evaluated; None where there was no evaluation.
        """
        entries = self._setup.plan.entries
        while (index := self._position.next_operation) < len(entries):
            position = self._position
            reason = due(entries[index], position.step, position.last_operation_step, heard)
            if reason is None:
                return
            self._operate(reason)
            heard = self._position.val_loss

    def _operate(self, reason: Reason) -> None:
        """Perform the next operation, record it, and go on with what it leads to.

        Raises:
          OperationFailedError: it could not be done; a checkpoint of the state before it is saved.
        """
        self._log.flush_to_held()  # no step is under way from here on
        before = self._state, self._position, self._stint
        entry = self._setup.plan.entries[self._position.next_operation]
        try:
            done = self._perform(reason)
            if entry.reevaluate:
                self._evaluate(again=True)
        except Exception as error:  # whatever it is, the run is to end as it was before
            self._state, position, self._stint = before
            self._position = dataclasses.replace(position, pending=reason)
            self._save()
            raise OperationFailedError(failure(entry, error)) from error
        self._operations.write(done.line(self._position.val_loss if entry.reevaluate else None))
        crash_point("operation_recorded")
        self._setup.compiler.prefetch_after(self._position.next_operation)
        self._log.restart_clock()

    def _perform(self, reason: Reason) -> Performed:
        """Change the state by the next operation, and work with the stage it leads to."""
        setup, position, old = self._setup, self._position, self._stint
        self._state, done = perform(
            setup.plan,
            setup.compiler,
            self._state,
            position,
            reason,
            old.validation[0][:, :-1],
            self._settings.optimizer.allow_warmup_past_end,
        )
        index = position.next_operation + 1
        self._stint = setup.stint(index)
        position = dataclasses.replace(
            position, next_operation=index, last_operation_step=position.step
        )
        self._position = setup.moved(position, old, self._stint)
        self._progress.note(announcement(done, len(setup.plan.entries)))
        return done

    def _evaluate(self, again: bool = False) -> None:
        """Evaluate on the validation batches and record it; after an operation, `again`."""
        self._log.flush_to_held()
        stint, mesh = self._stint, self._setup.mesh
        results = []
        for batch in stint.validation:
            placed = place_batch(mesh, batch)
            results.append(stint.programs.evaluate(self._state.params, self._state.gates, placed))
            crash_point("reevaluation" if again else "evaluation")
        loss, accuracy = (
            math.fsum(float(result[name]) for result in results) / len(results)
            for name in ("loss", "accuracy")
        )
        if jax.process_count() > 1:  # what is due must be due for all processes alike
            loss = float(multihost_utils.broadcast_one_to_all(np.float64(loss)))
        step = self._position.step
        if again:
            self._log.evaluation(step, {"val/loss_after": loss})
            self._progress.note(f"step {step}: validation loss after it {loss:.4f}")
        else:
            self._log.evaluation(step, {"val/loss": loss, "val/accuracy": accuracy})
            self._progress.note(f"step {step}: validation loss {loss:.4f}, accuracy {accuracy:.1%}")
            value = np.asarray(loss, self._state.plateau.avg_value.dtype)
            self._state = stint.programs.observe(self._state, value)
        self._position = dataclasses.replace(self._position, val_loss=finite_or_none(loss))

    def _save(self) -> None:
        """Start a checkpoint. The lines up to its step are written before it can commit."""
        self._log.sync()
        self._operations.sync()
        position, setup = self._position, self._setup
        record = CheckpointRecord(
            position,
            self._stint.shape.model,
            values_of(self._settings),
            setup.corpus.sha256,
            schedule_record(setup.plan.entries),
        )
        setup.checkpoints.save(
            position.step, leaves_by_path(self._state), record.to_meta(), score=position.val_loss
        )
