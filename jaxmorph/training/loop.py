"""The training loop: a run from its plan to its report, through any number of interruptions."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.printing import say, sentence
from jaxmorph.cli.progress import Progress, make_progress
from jaxmorph.config.fields import values_of, with_values
from jaxmorph.config.settings import Settings
from jaxmorph.config.settings_file import to_yaml
from jaxmorph.config.sources import Sources
from jaxmorph.growth.plan import Plan
from jaxmorph.growth.schedule import schedule_json
from jaxmorph.report.page import write_report
from jaxmorph.step.metrics import METRIC_TABLE, table_to_json
from jaxmorph.step.state import TrainState
from jaxmorph.storage.checkpoints import CheckpointError
from jaxmorph.storage.json_lines import JsonLines
from jaxmorph.storage.run_lock import RunLock
from jaxmorph.storage.start_log import record_start, software_facts
from jaxmorph.system.files import replace_text
from jaxmorph.system.peak_flops import peak_flops
from jaxmorph.system.signals import StopSignals
from jaxmorph.training.operate import OperationFailedError
from jaxmorph.training.position import Position
from jaxmorph.training.preparation import Setup, prepare
from jaxmorph.training.resume import resume
from jaxmorph.training.run import Run
from jaxmorph.training.step_log import DivergedError, StepLog
from jaxmorph.training.tables import Tables
from jaxmorph.training.trackers import make_trackers
from jaxmorph.training.turns import TURNS, Turn, check_turns, retry_operation, take_turns

_SCHEDULE = "schedule.json"  # the copy in the run folder


def train(
    plan: Plan,
    sources: Sources,
    tables: Tables | None = None,
    turns: Sequence[Turn] | None = None,
) -> int:
    """Train as planned, from the start or from the run folder's newest sound checkpoint.

    Args:
      plan: what is known about the run without corpus and devices; its settings have been checked.
      sources: where each setting came from.
      tables: the tables that define the run; None: the package's own.
      turns: what happens after each step, in this order, the last one "save"; None: `TURNS`.

    Returns:
      The exit status: 0 done, 1 failed, 143 or 130 stopped by a signal after saving.

    Raises:
      InputError: bad input, before the first step.
      ValueError: a table of turns that could not be resumed exactly.
    """
    tables, turns = tables or Tables(), turns or TURNS
    check_turns(turns)
    run_dir = _checked_folder(plan.settings)
    with _precision(plan.settings), RunLock(run_dir), StopSignals() as signals:
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        setup = prepare(plan, sources, run_dir, tables)
        with contextlib.closing(setup.checkpoints), contextlib.closing(setup.compiler):
            state, position, resumed = begin_or_resume(setup)
            if position.step >= setup.total_steps and position.pending is None:
                say(f"The run is finished: step {position.step} of {setup.total_steps}.")
                return 0
            _record_start(setup, position, resumed=resumed)
            try:
                status = run_steps(setup, state, position, signals, turns, resumed=resumed)
            except CheckpointError as error:
                say(f"error: {error}", file=sys.stderr)
                return 1
        say(f"Report: {write_report(run_dir)}")
        return status


def begin_or_resume(setup: Setup) -> tuple[TrainState, Position, bool]:
    """Return the state and position to start from, and whether the run is resumed.

    The run folder's logs are truncated to that position.
    """
    run_dir, checkpoints = setup.run_dir, setup.checkpoints
    step = checkpoints.latest_sound()
    if step is not None and not setup.settings.run.resume:
        raise InputError(
            "--no_resume", "", str(run_dir), "a folder without a run; give another --run_dir"
        )
    if step is None:
        state, position = setup.compiler.initial_state(), Position()
    else:
        state, position = resume(setup, step)
    checkpoints.remove_partial()  # only now: a refused run must stay unchanged
    _write_files(setup, position, kept=-1 if step is None else position.step)
    return state, position, step is not None


def run_steps(
    setup: Setup,
    state: TrainState,
    position: Position,
    signals: StopSignals,
    turns: Sequence[Turn] = TURNS,
    *,
    resumed: bool,
) -> int:
    """Train until the run is finished, fails or is asked to stop; return the exit status.

    Args:
      setup: what is constant during the run.
      state: the state to start from.
      position: its position.
      signals: signals that ask the run to stop.
      turns: what happens after each step, in this order.
      resumed: whether the run is resumed; if not, it starts with an evaluation and a checkpoint.
    """
    kind, checkpoints = setup.settings.run.progress, setup.checkpoints
    operations = JsonLines(setup.run_dir / "operations.jsonl")
    with make_progress(kind, position.step, setup.total_steps) as progress:
        log = _step_log(setup, position, progress)
        try:
            with contextlib.closing(operations), contextlib.closing(log):
                run = Run(setup, state, position, log, operations, progress, signals)
                _run_loop(run, turns, resumed=resumed)
        except (DivergedError, OperationFailedError) as error:
            checkpoints.wait()
            good = checkpoints.folder / str(checkpoints.newest())
            say(f"error: {error}. The last good checkpoint is {good}", file=sys.stderr)
            return 1
    checkpoints.wait()
    return 0 if signals.received is None else signals.exit_status


def _run_loop(run: Run, turns: Sequence[Turn], *, resumed: bool) -> None:
    after_step = functools.partial(take_turns, turns=turns)
    run.setup.compiler.prefetch_after(run.position.next_operation)
    run.log.restart_clock()
    if not resumed:
        after_step(run)
    elif run.position.pending is not None:
        retry_operation(run, turns)
    while not run.is_stopping:
        run.update_until_stage_changes(after_step)
    run.save()  # a signal may have come after the last step's own save


def _record_start(setup: Setup, position: Position, *, resumed: bool) -> None:
    software = software_facts(list(setup.mesh.devices.flat))
    for line in record_start(setup.run_dir, position.step, resumed, software):
        say(sentence(line))


def _step_log(setup: Setup, position: Position, progress: Progress) -> StepLog:
    settings = setup.settings
    log = StepLog(
        JsonLines(setup.run_dir / "metrics.jsonl"),
        make_trackers(settings.run, setup.run_dir, values_of(settings)),
        progress,
        settings.run,
        setup.total_steps,
        peak_flops(list(setup.mesh.devices.flat), settings.model.dtype),
        setup.tables.step.train_loss,
    )
    log.resume_totals(position.tokens, position.flops)
    return log


def _precision(settings: Settings) -> contextlib.AbstractContextManager:
    """Return the context of the run's computations: in float64 where the settings say so."""
    return jax.enable_x64(True) if settings.model.dtype == "float64" else contextlib.nullcontext()


def _checked_folder(settings: Settings) -> Path:
    """Return the run folder; refuse one that contains other files than a run's."""
    run_dir = Path(str(settings.run.run_dir))
    ours = ("config.yaml", "metrics.jsonl", _SCHEDULE, "tokenizer.json", "report.html")
    taken = [name for name in ours if (run_dir / name).exists()]
    if taken and not (run_dir / "checkpoints").is_dir():
        raise InputError(
            "--run_dir", "", str(run_dir), f"a run's folder or a new one (it has a {taken[0]})"
        )
    return run_dir


def _write_files(setup: Setup, position: Position, kept: int) -> None:
    """Write the run's settings and schedule, and truncate its logs to step `kept`."""
    run_dir = setup.run_dir
    # Relative to the file, so that it still names this run where the folder has been moved to.
    own = {"run_dir": "."} | ({"scaling_schedule_file": _SCHEDULE} if setup.plan.entries else {})
    replace_text(run_dir / "config.yaml", to_yaml(with_values(setup.settings, own)))
    replace_text(run_dir / "tokenizer.json", setup.corpus.tokenizer.to_json())
    replace_text(run_dir / METRIC_TABLE, table_to_json(setup.tables.step.metrics))
    if setup.plan.entries:
        replace_text(run_dir / _SCHEDULE, schedule_json(setup.plan.entries))
    (run_dir / "operations.jsonl").touch()
    with JsonLines(run_dir / "metrics.jsonl") as lines:
        lines.cut_back_to_step(kept)
    # By number, not by step: an operation that failed at the checkpoint's step may have come later.
    with JsonLines(run_dir / "operations.jsonl") as lines:
        lines.cut_back(lambda record: record["index"] < position.next_operation)
