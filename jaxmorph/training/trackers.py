"""Trackers for a run's metrics: TensorBoard and Weights & Biases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmorph.cli.errors import InputError
from jaxmorph.config.settings import RunSettings


@dataclass(frozen=True)
class Tracker:
    """A destination for metrics: `log(step, values)`, and `close()` to flush."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def make_trackers(settings: RunSettings, run_dir: Path, values: dict[str, Any]) -> list[Tracker]:
    """Return the trackers the settings ask for.

    Args:
      settings: which ones.
      run_dir: where they write.
      values: all settings, shown with the run.

    Raises:
      InputError: the extra that a tracker needs is not installed.
    """
    trackers: list[Tracker] = []
    if settings.tensorboard:
        trackers.append(_tensorboard(run_dir))
    if settings.wandb != "off":
        trackers.append(_wandb(settings, run_dir, values))
    return trackers


def _tensorboard(run_dir: Path) -> Tracker:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(settings: RunSettings, run_dir: Path, values: dict[str, Any]) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    # On a full disk W&B's own log must not print a traceback for each line it cannot write.
    logging.raiseExceptions = False
    run = wandb.init(
        project=settings.wandb_project,
        name=run_dir.name,
        dir=str(run_dir),
        config=values,
        mode="online" if settings.wandb == "online" else "offline",
        settings=wandb.Settings(silent=True, console="off"),
    )
    return Tracker(lambda step, values: run.log(dict(values), step=step), run.finish)


def _missing(extra: str) -> InputError:
    return InputError(
        f"--{extra}", "", None, f"the extra '{extra}': pip install 'jaxmorph[{extra}]'"
    )
