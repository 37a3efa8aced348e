"""The training loop: a run from its plan to its report, through any number of interruptions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import jax

from jaxmorph.cli.errors import FailedError, InputError, system_error_in_words
from jaxmorph.cli.printing import say, sentence
from jaxmorph.cli.progress import Progress, make_progress
from jaxmorph.config.fields import values_of, with_values
from jaxmorph.config.settings import Settings
from jaxmorph.config.settings_file import to_yaml
from jaxmorph.config.sources import Sources
from jaxmorph.growth.plan import Plan
from jaxmorph.growth.schedule import schedule_json
from jaxmorph.report.page import report_is_current, write_report
from jaxmorph.step.metrics import METRIC_TABLE, table_to_json
from jaxmorph.step.state import TrainState
from jaxmorph.storage.checkpoint_folder import make_folder
from jaxmorph.storage.checkpoints import CheckpointError, Checkpoints
from jaxmorph.storage.run_lock import RunLock, RunLockLostError
from jaxmorph.storage.start_log import record_start, software_facts
from jaxmorph.system.files import refusing_bad_paths, replace_text
from jaxmorph.system.peak_flops import peak_flops
from jaxmorph.system.signals import StopSignals
from jaxmorph.training.divergence import after_divergence
from jaxmorph.training.ending import ending, is_finished, not_fired
from jaxmorph.training.operate import OperationFailedError
from jaxmorph.training.position import Position
from jaxmorph.training.preparation import Setup, prepare
from jaxmorph.training.resume import open_checkpoints, resume
from jaxmorph.training.run import Run
from jaxmorph.training.run_logs import NO_LINES
from jaxmorph.training.step_log import DivergedError, StepLog
from jaxmorph.training.tables import Tables
from jaxmorph.training.time_left import TimeLeft
from jaxmorph.training.trackers import make_trackers
from jaxmorph.training.turns import (
    TURNS,
    Turn,
    catch_up,
    check_turns,
    retry_operation,
    take_turns,
)

_SCHEDULE = "schedule.json"  # the copy in the run folder
# As config.yaml has them: it goes on with the run, and permits nothing that was permitted once.
_GOES_ON = {"resume": True, "accept_damaged_log": False, "allow_schedule_change": False}


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
      The exit status: 0 done, 1 failed, 143, 130 or 129 stopped by a signal after saving.

    Raises:
      InputError: bad input, before the first step.
      ValueError: a table of turns that could not be resumed exactly.
    """
    tables, turns = tables or Tables(), turns or TURNS
    check_turns(turns)
    run_dir = _checked_folder(plan.settings)
    with _precision(plan.settings), RunLock(run_dir) as lock, StopSignals() as signals:
        make_folder(run_dir / "checkpoints")
        kept = plan.settings.run.keep_checkpoints, plan.settings.run.keep_best
        checkpoints = open_checkpoints(run_dir, *kept, lock.check)
        setup = prepare(plan, sources, lock, checkpoints, tables)
        with _closing(checkpoints), _closing(setup.compiler), _closing(setup.logs):
            state, position, resumed = begin_or_resume(setup)
            with _failing_in_one_message(setup):
                if is_finished(setup, position):
                    status = _say_finished(setup, position)
                else:
                    _record_start(setup, position, resumed=resumed)
                    status = run_steps(setup, state, position, signals, turns, resumed=resumed)
        lock.check()
        _report_if_missing(run_dir)
        return status


def begin_or_resume(setup: Setup) -> tuple[TrainState, Position, bool]:
    """Return the state and position to start from, and whether the run is resumed.

    The run folder's logs are cut back to that position.
    """
    run_dir, checkpoints = setup.run_dir, setup.checkpoints
    step = checkpoints.latest_sound()
    if step is not None and not setup.settings.run.resume:
        raise InputError(
            "--no_resume", "", str(run_dir), "a folder without a run; give another --run_dir"
        )
    if step is None:
        state, position = setup.compiler.initial_state(), Position()
        setup.logs.check(position, NO_LINES, accept=False)
    else:
        state, position = resume(setup, step)
    checkpoints.remove_partial()  # only now: a refused run must stay unchanged
    with refusing_bad_paths():
        _write_files(setup)
        setup.logs.cut()
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
    kind = setup.settings.run.progress
    with (
        make_progress(kind, position.step, setup.total_steps) as progress,
        _closing(_step_log(setup, position, progress)) as log,
    ):
        with progress.doing("compiling"):
            run = Run(setup, state, position, log, progress, signals)
        _run_loop(run, turns, resumed=resumed)
        with progress.doing("saving"):
            setup.checkpoints.wait()
    for line in ending(setup, run.position, signals):
        say(line)
    stopped = signals.received is not None and not is_finished(setup, run.position)
    return signals.exit_status if stopped else 0


def _say_finished(setup: Setup, position: Position) -> int:
    """Say that nothing is left to do; return the exit status.

    Raises:
      DivergedError: the loss is not finite; a process that was killed did not come to say so.
    """
    if not setup.checkpoints.is_good(position.step):
        raise _ended_badly(position.step)
    say(f"The run is finished: step {position.step} of {setup.total_steps}.")
    for line in not_fired(setup, position):
        say(line)
    return 0


def _ended_badly(step: int) -> DivergedError:
    return DivergedError(f"the run ended at step {step} with a loss that is not finite")


@contextlib.contextmanager
def _failing_in_one_message(setup: Setup) -> Iterator[None]:
    """Raise a FailedError for what may fail in a run, with the checkpoint it goes on from."""
    try:
        yield
    except BrokenPipeError:  # of stdout: who read it has had enough
        raise
    except (DivergedError, OperationFailedError) as error:
        with contextlib.suppress(InputError, OSError):
            _report_if_missing(setup.run_dir)
        diverged = isinstance(error, DivergedError)
        left = after_divergence(setup) if diverged else _last_good(setup.checkpoints)
        raise FailedError(f"{error}. {left}") from error
    except CheckpointError as error:
        raise FailedError(f"{error}. {_last_good(setup.checkpoints)}") from error
    except OSError as error:
        words = system_error_in_words(error)
        raise FailedError(f"{words}. {_last_good(setup.checkpoints)}") from error


def _last_good(checkpoints: Checkpoints) -> str:
    """Name the last good checkpoint, after reading and verifying all of it."""
    with contextlib.suppress(CheckpointError):  # it is not what failed first
        checkpoints.wait()
    try:
        step = checkpoints.latest_sound(on_corrupt=lambda step, problem: None)
    except InputError as error:
        return f"No checkpoint is good: {error}"
    if step is None:
        return "There is no checkpoint yet"
    return f"Verified: the last good checkpoint is {checkpoints.folder / str(step)}"


def _report_if_missing(run_dir: Path) -> None:
    """Write the report, unless it is there and of the run's present logs.

    A process may have been killed, or the disk full, between the last checkpoint and the report.
    """
    if not report_is_current(run_dir):
        say(f"Report: {write_report(run_dir)}")


class _Closable(Protocol):
    def close(self) -> None: ...


_Thing = TypeVar("_Thing", bound=_Closable)


@contextlib.contextmanager
def _closing(thing: _Thing) -> Iterator[_Thing]:
    """Close a thing at the end; after an error, whatever else fails then adds nothing to it."""
    try:
        yield thing
    except BaseException:
        with contextlib.suppress(Exception):
            thing.close()
        raise
    thing.close()


def _run_loop(run: Run, turns: Sequence[Turn], *, resumed: bool) -> None:
    after_step = functools.partial(take_turns, turns=turns)
    run.setup.compiler.prefetch_after(run.position.next_operation)
    run.log.restart_clock()
    try:
        if not resumed:
            after_step(run)
        elif run.position.pending is not None:
            retry_operation(run, turns)
        else:
            catch_up(run, turns)
        while not run.is_stopping:
            run.update_until_stage_changes(after_step)
        run.save()  # a signal may have come after the last step's own save
        if run.is_last and not run.is_good:
            raise _ended_badly(run.step)
    except RunLockLostError:
        run.log.discard()  # closing it must write nothing
        raise


def _record_start(setup: Setup, position: Position, *, resumed: bool) -> None:
    software = software_facts(list(setup.mesh.devices.flat))
    for line in record_start(setup.run_dir, position.step, resumed, software):
        say(sentence(line))


def _step_log(setup: Setup, position: Position, progress: Progress) -> StepLog:
    settings = setup.settings
    log = StepLog(
        setup.logs.metrics,
        make_trackers(settings.run, setup.run_dir, values_of(settings), position.step),
        progress,
        settings.run,
        TimeLeft(setup.plan.stages, setup.total_steps, position.last_operation_step),
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


def _write_files(setup: Setup) -> None:
    """Write the run's settings, tokenizer, metric table and schedule."""
    run_dir = setup.run_dir
    # Relative to the file, so that it still names this run where the folder has been moved to.
    own = {"run_dir": "."} | ({"scaling_schedule_file": _SCHEDULE} if setup.plan.entries else {})
    own |= _GOES_ON
    replace_text(run_dir / "config.yaml", to_yaml(with_values(setup.settings, own)))
    replace_text(run_dir / "tokenizer.json", setup.corpus.tokenizer.to_json())
    replace_text(run_dir / METRIC_TABLE, table_to_json(setup.tables.step.metrics))
    if setup.plan.entries:
        replace_text(run_dir / _SCHEDULE, schedule_json(setup.plan.entries))
