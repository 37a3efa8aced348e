"""What a run records: one line a step in metrics.jsonl, the display, TensorBoard and W&B.

Device values are fetched two steps late, so that the host never waits for the step it has just
started.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.progress import Progress
from jaxmorph.config.settings import RunSettings
from jaxmorph.storage.run_folder import JsonLines

_STEPS_IN_FLIGHT = 2
# Peak dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by JAX's device kind.
_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


Totals = dict[str, int]


class DivergedError(RuntimeError):
    """The loss or the gradient stayed non-finite; the run cannot go on."""


@dataclass(frozen=True)
class Tracker:
    """Somewhere else that numbers go: `log(step, values)`, and `close()` to write what is held back."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


class StepLog:
    """Writes one line per step, each once it is complete, and shows the newest.

    Args:
      lines: the run's metrics.jsonl.
      trackers: TensorBoard, W&B.
      progress: the display.
      settings: intervals and limits.
      total_steps: the step the run ends at.
      peak_flops: of all devices together; None where it is not known.
    """

    def __init__(
        self,
        lines: JsonLines,
        trackers: list[Tracker],
        progress: Progress,
        settings: RunSettings,
        total_steps: int,
        peak_flops: float | None,
    ):
        self._lines, self._trackers, self._progress = lines, trackers, progress
        self._settings, self._total, self._peak = settings, total_steps, peak_flops
        self._pending: deque[tuple[Totals, dict[str, jax.Array]]] = deque()
        self._held: dict[str, Any] | None = None  # the newest line, in case an evaluation joins it
        self._then = time.monotonic()
        self._seconds, self._steps, self._tokens, self._flops = 0.0, 0, 0, 0
        self._pace: float | None = None  # seconds a step, smoothed; the compiling first left out

    def step(self, after: Totals, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of a step just started; write those of steps that have finished.

        Args:
          after: "step", running totals "tokens" and "flops" after it, and sizes to record beside.
          metrics: scalars on the device, as `programs.Programs.update` returns them.

        Raises:
          DivergedError: too many updates in a row were skipped.
        """
        self._pending.append((after, metrics))
        while len(self._pending) > _STEPS_IN_FLIGHT:
            self._fetch()

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Add an evaluation's values to the line of `step`, the newest one."""
        self.flush_to_held()
        self.restart_clock()
        if self._held is None:
            if self._lines.amend_last(step, values):  # written before the run was resumed
                return
            self._held = {"step": step}
        assert self._held["step"] == step
        self._held.update(values)

    def restart_clock(self) -> None:
        """Take the time from here on as the next step's: evaluations and operations are no steps."""
        self._then = time.monotonic()

    def flush(self) -> None:
        """Wait for every step started, and write all lines."""
        self.flush_to_held()
        self._write_held()

    def sync(self) -> None:
        """Write all lines and wait until the disk has them: a checkpoint must not outrun them."""
        self.flush()
        self._lines.sync()

    def flush_to_held(self) -> None:
        """Wait for every step started; write all lines but the newest."""
        while self._pending:
            self._fetch()

    def close(self) -> None:
        """Write everything out and close the trackers."""
        self.flush()
        self._lines.close()
        for tracker in self._trackers:
            tracker.close()

    def resume_totals(self, tokens: int, flops: int) -> None:
        """Begin at totals other than zero, so that the first rates shown are right."""
        self._tokens, self._flops = tokens, flops

    def _fetch(self) -> None:
        after, metrics = self._pending.popleft()
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self._write_held()
        self._take_time(after)
        self._held = {"step": after["step"]}
        if after["step"] % self._settings.log_interval == 0 or after["step"] in (1, self._total):
            self._held |= self._full_line(after, values)
        if values["skipped_in_a_row"] >= self._settings.max_nonfinite_steps:
            self._pending.clear()
            self._write_held()
            raise DivergedError(
                f"loss or gradient was not finite in {values['skipped_in_a_row']} steps in a row, "
                f"up to step {after['step']} (loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}); a lower learning_rate or a longer warmup may help"
            )

    def _take_time(self, after: Totals) -> None:
        now = time.monotonic()
        seconds, self._then = now - self._then, now
        self._seconds += seconds
        self._steps += 1
        if after["step"] > 1:
            self._pace = seconds if self._pace is None else 0.95 * self._pace + 0.05 * seconds

    def _full_line(self, after: Totals, values: dict[str, float]) -> dict[str, Any]:
        line = {f"train/{n}": values[n] for n in ("loss", "learning_rate", "grad_norm", "skipped")}
        line |= {"step_seconds": self._seconds / self._steps} | after
        tokens, flops = after["tokens"] - self._tokens, after["flops"] - self._flops
        rates = tokens / self._seconds, flops / self._seconds
        self._seconds, self._steps = 0.0, 0
        self._tokens, self._flops = after["tokens"], after["flops"]
        facts = f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}"
        facts += f"  {rates[0]:,.0f} tokens/s"
        if self._peak:
            facts += f"  MFU {rates[1] / self._peak:.1%}"
        if values["skipped"]:
            facts += f"  skipped {values['skipped']}"
        left = None if self._pace is None else (self._total - after["step"]) * self._pace
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


def peak_flops(devices: Sequence[Any], dtype: str) -> float | None:
    """Return the devices' peak FLOP/s in bfloat16; None where unknown or computing in another dtype."""
    kind = devices[0].device_kind
    known = [flops for name, flops in _PEAK_FLOPS.items() if kind.startswith(name)]
    return max(known) * len(devices) if known and dtype == "bfloat16" else None


def make_trackers(settings: RunSettings, run_dir: Path, values: dict[str, Any]) -> list[Tracker]:
    """Return the trackers the settings ask for.

    Args:
      settings: which ones.
      run_dir: where they write.
      values: all settings, shown beside the run.

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
