"""Trackers for a run's metrics and operations: TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmorph.cli.errors import InputError
from jaxmorph.config.settings import RunSettings
from jaxmorph.system.files import replace_text

WANDB_ID = "wandb_id"  # the file in a run folder that names its W&B run
_NUMBER, _TEXT = "operation/number", "operation/announcement"  # of an operation, as an event


@dataclass(frozen=True)
class Tracker:
    """A destination for metrics and operations.

    Args:
      log: takes the values of a step, once all of them are known; steps increase.
      operation: takes an operation that fired after a step, before the values of that step: the
        step, its number in the schedule, what it said.
      flush: what was taken so far survives a kill.
      close: nothing more comes.
    """

    log: Callable[[int, Mapping[str, float]], None]
    operation: Callable[[int, int, str], None]
    flush: Callable[[], object]
    close: Callable[[], object]


def make_trackers(
    settings: RunSettings, run_dir: Path, values: dict[str, Any], step: int
) -> list[Tracker]:
    """Return the trackers the settings ask for; the checked settings say that their extras are there.

    Args:
      settings: which ones.
      run_dir: where they write.
      values: all settings, shown with the run.
      step: where the run starts or goes on. What TensorBoard was told about later steps, before a
        kill, it is told to drop; W&B keeps it, and drops it when it is told again.

    Raises:
      InputError: the file that names the W&B run is damaged.
    """
    with contextlib.ExitStack() as opened:
        trackers: list[Tracker] = []
        if settings.tensorboard:
            trackers.append(_tensorboard(run_dir / "tensorboard", step))
            opened.callback(trackers[-1].close)
        if settings.wandb != "off":
            trackers.append(_wandb(settings, run_dir, values))
        opened.pop_all()  # all are there: the caller closes them
    return trackers


def _tensorboard(folder: Path, step: int) -> Tracker:
    from tensorboardX.event_file_writer import EventsWriter  # writes at once, without a thread
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.summary import scalar, text

    folder.mkdir(exist_ok=True)
    events: Any = event_pb2  # generated, without types
    summaries: Any = summary_pb2
    # Files are read in the order of their names, which have only the second.
    writer = EventsWriter(str(folder / "events"), f".{time.time_ns() % 10**9:09d}")

    def write(step: int, **content: Any) -> None:
        writer.write_event(events.Event(wall_time=time.time(), step=step, **content))

    def log(step: int, values: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in values.items()}
        rows = [row for item in values.items() for row in scalar(*item).value]
        write(step, summary=summaries.Summary(value=rows))

    def operation(step: int, number: int, said: str) -> None:
        write(step, summary=text(_TEXT, f"```\n{said}\n```"))
        write(step, summary=scalar(_NUMBER, number))

    start = events.SessionLog(status=events.SessionLog.START)
    write(step + 1, session_log=start)  # drops this step and later ones from earlier files
    return Tracker(log, operation, writer.flush, writer.close)


def _wandb(settings: RunSettings, run_dir: Path, values: dict[str, Any]) -> Tracker:
    import wandb

    # On a full disk W&B's own log must not print a traceback for each line it cannot write.
    logging.raiseExceptions = False
    run = wandb.init(
        project=settings.wandb_project,
        name=run_dir.name,
        id=_wandb_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        config=values,
        allow_val_change=True,
        mode="online" if settings.wandb == "online" else "offline",
        settings=wandb.Settings(silent=True, console="off"),
    )

    def log(step: int, values: Mapping[str, float]) -> None:
        run.log(dict(values), step=step, commit=True)

    def operation(step: int, number: int, said: str) -> None:
        run.log({_NUMBER: number, _TEXT: said}, step=step, commit=False)

    return Tracker(log, operation, lambda: None, run.finish)


def _wandb_id(run_dir: Path) -> str:
    """Return the id of the folder's W&B run, the same at every start."""
    path = run_dir / WANDB_ID
    if not path.exists():
        replace_text(path, f"{secrets.token_hex(4)}\n")
    name = path.read_text(errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        expected = "the id of a W&B run; delete the file to log to a new one"
        raise InputError(str(path), "", name[:80], expected)
    return name
