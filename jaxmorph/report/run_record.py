"""What a run folder says, read back: its series, its operations and its settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.yaml_file import read_yaml

_NUMBERS: tuple[str, ...] = (
    "train/loss", "train/learning_rate", "train/grad_norm", "step_seconds", "tokens", "flops",
    "params", "batch_size", "grad_accum_steps", "val/loss", "val/loss_after", "val/accuracy",
)  # fmt: skip
_SIZES = ("n_layers", "d_model", "n_heads", "d_ff", "seq_len", "attn_lora_rank", "vocab_lora_rank")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # how a run writes what JSON has no number for


class Series(NamedTuple):
    """The finite values of one metric, and the steps they stand at (both 1-d, equally long)."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class FiredOperation:
    """An operation as its line of operations.jsonl tells it; None: the line does not say.

    Args:
      step: the update after which it fired.
      name: the operation's.
      value: what it was given.
      reason: which trigger fired it.
      val_loss_before: the newest validation loss when it fired.
      val_loss_after: the re-evaluated one.
      model_before: the architecture it met, as the fields of a ModelConfig.
      model_after: the one it left.
      params_before: number of parameters it met.
      params_after: number it left.
      moments: how many entries of the optimizer's state met each fate, by its name.
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
        """The value as a user would write it; nothing where there is none."""
        if self.value is None:
            return ""
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
    """A run as its folder tells it.

    Args:
      folder: the run folder.
      last_step: the newest step with a line.
      series: the finite values of each known metric, in the order of their lines.
      lost: how many values of each were NaN or infinite.
      operations: what operations.jsonl tells, in the order of its lines.
      settings: the mapping in config.yaml.
    """

    folder: Path
    last_step: int
    series: dict[str, Series]
    lost: dict[str, int]
    operations: list[FiredOperation]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name or str(self.folder)

    def total_at(self, total: str, steps: np.ndarray) -> np.ndarray:
        """Return a running total ("tokens", "flops") at `steps`, between the lines that have it."""
        known, values = self.series[total]
        return np.interp(steps, np.concatenate([[0], known]), np.concatenate([[0.0], values]))


def read_run(run_dir: Path) -> RunRecord:
    """Read a run folder; the run may still be going, and its last line be half written.

    Raises:
      InputError: not a run folder, or a file in it that is not what a run writes.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise InputError(str(run_dir), "", None, "a run folder, with metrics.jsonl in it")
    columns: dict[str, tuple[list[int], list[float]]] = {key: ([], []) for key in _NUMBERS}
    lost = dict.fromkeys(_NUMBERS, 0)
    last_step = 0
    for where, line in _read_lines(metrics):
        step = _step(where, line)
        last_step = max(last_step, step)
        for key in columns.keys() & line.keys():
            value = _number(where, key, line[key])
            if value is None:
                continue
            if not math.isfinite(value):
                lost[key] += 1
                continue
            columns[key][0].append(step)
            columns[key][1].append(value)
    return RunRecord(
        folder=run_dir,
        last_step=last_step,
        series={k: Series(np.array(s, int), np.array(v, float)) for k, (s, v) in columns.items()},
        lost=lost,
        operations=_read_operations(run_dir / "operations.jsonl"),
        settings=_read_settings(run_dir / "config.yaml"),
    )


def throughput(run: RunRecord) -> tuple[Series, float]:
    """Return tokens per second between the lines that count tokens, and the seconds of all steps.

    `step_seconds` is a mean over the steps since the line before, so it is multiplied by their
    number. The first step, which compiles, counts as time but is left out of the rates.
    """
    steps, tokens = run.series["tokens"]
    timed, seconds = run.series["step_seconds"]
    if not len(steps) or not len(timed):
        return Series(np.array([], int), np.array([], float)), 0.0
    interval = np.searchsorted(steps, timed, side="left")
    inside = interval < len(steps)
    counts = np.bincount(interval[inside], minlength=len(steps))
    sums = np.bincount(interval[inside], weights=seconds[inside], minlength=len(steps))
    spent = np.diff(steps, prepend=0) * sums / np.maximum(counts, 1)
    rated = (spent > 0) & (steps > 1)
    gained = np.diff(tokens, prepend=0.0)
    return Series(steps[rated], gained[rated] / spent[rated]), float(spent.sum())


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, object) of each line; a last line without its newline may be half written."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(str(path), "", None, f"a readable file ({error.strerror})") from None
    read = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            line = None
        if not isinstance(line, dict):
            shown = text[:60].decode(errors="replace")
            raise InputError(str(path), f"line {number}", shown, "one JSON object per line")
        read.append((f"{path}: line {number}", line))
    return read


def _read_operations(path: Path) -> list[FiredOperation]:
    return [_operation(where, line) for where, line in _read_lines(path)] if path.exists() else []


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


def _number(where: str, key: str, value: object) -> float | None:
    """Return a metric's value; None where it is null."""
    convert: Callable[[Any], float] = float
    if value is None:
        return None
    if value in _NOT_FINITE or (isinstance(value, int | float) and not isinstance(value, bool)):
        try:
            return convert(value)
        except OverflowError:
            return math.inf
    raise InputError(where, key, value, "a number or null")
