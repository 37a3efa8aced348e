"""Read a run folder: its series, its operations and its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.paths import is_file, reason
from jaxmorph.cli.text_file import read_text
from jaxmorph.cli.wording import listed
from jaxmorph.cli.yaml_file import read_yaml
from jaxmorph.report.run_lines import read_lines, read_thinned_lines
from jaxmorph.step.metrics import DEFAULT, METRIC_TABLE, Kind, Metric, table_from_json

_SIZES = ("n_layers", "d_model", "n_heads", "d_ff", "seq_len", "attn_lora_rank", "vocab_lora_rank")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # how a run logs numbers that JSON lacks


class Series(NamedTuple):
    """The finite values of one metric, and their steps (both 1-d, equally long)."""

    steps: np.ndarray
    values: np.ndarray


_NOTHING = Series(np.array([], int), np.array([], float))


@dataclass(frozen=True)
class FiredOperation:
    """An operation as logged in operations.jsonl; None: not in its line.

    Args:
      step: the update after which it fired.
      name: the operation's name.
      value: the operation's value.
      reason: which trigger fired it.
      val_loss_before: the newest validation loss when it fired.
      val_loss_after: the re-evaluated one.
      model_before: the architecture before it, as the fields of a ModelConfig.
      model_after: the architecture after it.
      params_before: number of parameters before it.
      params_after: number of parameters after it.
      moments: how many entries of the optimizer's state were transported, fresh or reset.
      function_delta: largest change of a logit, in RMS of the logits.
      seconds: how long it took.
    """

    step: int
    name: str
    value: Any = None
    reason: str | None = None
    val_loss_before: float | None = None
    val_loss_after: float | None = None
    model_before: dict[str, Any] | None = None
    model_after: dict[str, Any] | None = None
    params_before: int | None = None
    params_after: int | None = None
    moments: dict[str, int] | None = None
    function_delta: float | None = None
    seconds: float | None = None

    @property
    def value_in_words(self) -> str:
        """The value as a user would write it; "" if there is none."""
        if self.value is None:
            return ""
        if isinstance(self.value, list):
            return listed(self.value)
        return f"{self.value:.6g}" if isinstance(self.value, float) else str(self.value)

    @property
    def title(self) -> str:
        """The name and the value."""
        return f"{self.name} {self.value_in_words}".rstrip()

    @property
    def reshapes(self) -> bool:
        """Whether it changed the architecture."""
        known = self.model_before is not None and self.model_after is not None
        return known and self.model_before != self.model_after


@dataclass(frozen=True)
class RunRecord:
    """A run as read from its folder.

    Args:
      folder: the run folder.
      last_step: the newest step with a line.
      metrics: the metrics it was read with, and a plain one for each other number logged.
      series: the finite values of each metric by name, in the order of their lines; see `read_run`.
      lost: how many values of each were NaN or infinite.
      operations: the contents of operations.jsonl, in order.
      settings: the mapping in config.yaml.
    """

    folder: Path
    last_step: int
    metrics: tuple[Metric, ...]
    series: dict[str, Series]
    lost: dict[str, int]
    operations: list[FiredOperation]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name or str(self.folder)

    def total_at(self, total: str, steps: np.ndarray) -> np.ndarray:
        """Return a running total at `steps`, interpolated between the lines that have it."""
        known, values = self.series[total]
        return np.interp(steps, np.concatenate([[0], known]), np.concatenate([[0.0], values]))

    def of_kind(self, kind: Kind) -> list[Metric]:
        """Return its metrics of a kind."""
        return [metric for metric in self.metrics if metric.kind == kind]

    def best(self, metric: Metric) -> tuple[int, float] | None:
        """Return the step and the value of a metric's best, the first if tied."""
        steps, values = self.series[metric.name]
        if not len(values):
            return None
        at = values.argmax() if metric.best == "highest" else values.argmin()
        return int(steps[at]), float(values[at])

    def curve(self, metric: Metric) -> Series:
        """Return the series to draw for a metric: its values, or a running total's rate."""
        if metric.kind == "total":
            return throughput(self, metric)[0]
        return self.series[metric.name]


def read_run(run_dir: Path, metrics: Sequence[Metric] | None = None) -> RunRecord:
    """Read a run folder; the run may still be running and its last line incomplete.

    Of a long run, evenly spaced lines are read, with all that have a metric it is judged by or a value
    that is not finite.

    Args:
      run_dir: the folder.
      metrics: the known metrics; None: those the run folder names, else those of a language model.
        Other numbers in the lines are read too, by name; anything else is ignored.

    Raises:
      InputError: not a run folder, or a file in it that no run writes.
    """
    path, why = run_dir / "metrics.jsonl", ""
    try:
        found = is_file(path)
    except (OSError, ValueError) as error:
        found, why = False, f" ({reason(error)})"
    if not found:
        raise InputError(str(run_dir), "", None, f"a run folder, with metrics.jsonl in it{why}")
    known = {metric.name: metric for metric in metrics or _read_metric_table(run_dir)}
    columns = {name: _Column() for name in known}
    last_step = 0
    best = [f'"{metric.name}"' for metric in known.values() if metric.best]
    for number, line in read_thinned_lines(path, [*best, *(f'"{word}"' for word in _NOT_FINITE)]):
        where = f"{path}: line {number}"
        step = _step(where, line)
        last_step = max(last_step, step)
        for name, value in line.items():
            if name in known or (name != "step" and _is_number(value)):
                columns.setdefault(name, _Column()).add(step, _number(where, name, value))
    return RunRecord(
        folder=run_dir,
        last_step=last_step,
        metrics=tuple(known.get(name) or Metric(name, label=name) for name in columns),
        series={name: column.series() for name, column in columns.items()},
        lost={name: column.lost for name, column in columns.items()},
        operations=_read_operations(run_dir / "operations.jsonl"),
        settings=_read_settings(run_dir / "config.yaml"),
    )


def _read_metric_table(run_dir: Path) -> tuple[Metric, ...]:
    path = run_dir / METRIC_TABLE
    if not path.is_file():
        return DEFAULT
    try:
        return table_from_json(read_text(path))
    except ValueError as error:
        raise InputError(str(path), "", None, f"a table of metrics ({error})") from None


def throughput(run: RunRecord, total: Metric | None = None) -> tuple[Series, float]:
    """Return the rate per second of a running total, and the seconds of all steps.

    Rates are at the lines that have the total; None: the first of the run's totals. The logged step
    time is a mean over the steps since the previous line, so it is multiplied by their number. The
    first step, which compiles, counts as time but is excluded from the rates.
    """
    totals, times = [total] if total else run.of_kind("total"), run.of_kind("time")
    if not totals or not times:
        return _NOTHING, 0.0
    steps, amounts = run.series[totals[0].name]
    timed, seconds = run.series[times[0].name]
    if not len(steps) or not len(timed):
        return _NOTHING, 0.0
    interval = np.searchsorted(steps, timed, side="left")
    inside = interval < len(steps)
    counts = np.bincount(interval[inside], minlength=len(steps))
    sums = np.bincount(interval[inside], weights=seconds[inside], minlength=len(steps))
    spent = np.diff(steps, prepend=0) * sums / np.maximum(counts, 1)
    rated = (spent > 0) & (steps > 1)
    gained = np.diff(amounts, prepend=0.0)
    return Series(steps[rated], gained[rated] / spent[rated]), float(spent.sum())


@dataclass
class _Column:
    """The values of one metric as the lines are read."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    lost: int = 0

    def add(self, step: int, value: float | None) -> None:
        if value is None:
            return
        if not math.isfinite(value):
            self.lost += 1
            return
        self.steps.append(step)
        self.values.append(value)

    def series(self) -> Series:
        return Series(np.array(self.steps, int), np.array(self.values, float))


def _read_operations(path: Path) -> list[FiredOperation]:
    if not path.exists():
        return []
    return [_operation(f"{path}: line {line.number}", line.content) for line in read_lines(path)]


def _operation(where: str, line: dict[str, Any]) -> FiredOperation:
    name, reason, moments = line.get("name"), line.get("reason"), line.get("moments")
    if not isinstance(name, str):
        raise InputError(where, "name", name, "an operation's name")
    if reason is not None and not isinstance(reason, str):
        raise InputError(where, "reason", reason, "a word")
    return FiredOperation(
        step=_step(where, line),
        name=name,
        value=line.get("value"),
        reason=reason,
        val_loss_before=_number(where, "val_loss_before", line.get("val_loss_before")),
        val_loss_after=_number(where, "val_loss_after", line.get("val_loss_after")),
        model_before=_model(where, "model_before", line.get("model_before")),
        model_after=_model(where, "model_after", line.get("model_after")),
        params_before=_count(where, "params_before", line.get("params_before")),
        params_after=_count(where, "params_after", line.get("params_after")),
        moments=None if moments is None else _counts(where, "moments", moments),
        function_delta=_number(where, "function_delta", line.get("function_delta")),
        seconds=_number(where, "seconds", line.get("seconds")),
    )


def _model(where: str, key: str, model: object) -> dict[str, Any] | None:
    if model is None:
        return None
    if not isinstance(model, dict):
        raise InputError(where, key, model, "the fields of an architecture")
    for size in _SIZES:
        _count(where, f"{key}: {size}", model.get(size))
    return model


def _counts(where: str, key: str, counts: object) -> dict[str, int]:
    if not isinstance(counts, dict):
        raise InputError(where, key, counts, "counts by name")
    read = {str(name): _count(where, f"{key}: {name}", count) for name, count in counts.items()}
    return {name: count for name, count in read.items() if count is not None}


def _count(where: str, key: str, value: object) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value < 2**53):
        raise InputError(where, key, value, "a whole number ≥ 0")
    return value


def _read_settings(path: Path) -> dict[str, Any]:
    content = read_yaml(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise InputError(str(path), "", type(content).__name__, "a mapping of names to values")
    return content


def _step(where: str, line: dict[str, Any]) -> int:
    step = line.get("step")
    if type(step) is not int or not 0 <= step < 2**53:
        raise InputError(where, "step", step, "a whole number ≥ 0 in every line")
    return step


def _is_number(value: object) -> bool:
    """Whether a metric can have this value; `value` may be any JSON value."""
    if isinstance(value, str):
        return value in _NOT_FINITE
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(where: str, key: str, value: Any) -> float | None:
    """Return a metric's value; None where it is null."""
    if value is None:
        return None
    if not _is_number(value):
        raise InputError(where, key, value, "a number or null")
    try:
        return float(value)
    except OverflowError:
        return math.inf
