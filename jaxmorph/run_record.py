"""What a run folder says, read back: its series, its operations and its settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmorph.errors import InputError
from jaxmorph.yaml_file import read_yaml

_NUMBERS: tuple[str, ...] = (
    "train/loss", "train/learning_rate", "train/grad_norm", "step_seconds", "tokens", "flops",
    "params", "batch_size", "val/loss", "val/accuracy",
)  # fmt: skip
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # how a run writes what JSON has no number for


class Series(NamedTuple):
    """The finite values of one metric, and the steps they stand at (both 1-d, equally long)."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Args:
      folder: the run folder.
      last_step: the newest step with a line.
      series: the finite values of each known metric, in the order of their lines.
      lost: how many values of each were NaN or infinite.
      operations: the lines of operations.jsonl.
      settings: the mapping in config.yaml.
    """

    folder: Path
    last_step: int
    series: dict[str, Series]
    lost: dict[str, int]
    operations: list[dict[str, Any]]
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


def _read_operations(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    operations = []
    for where, line in _read_lines(path):
        if "name" not in line or not isinstance(line["name"], str):
            raise InputError(where, "name", None, "an operation's name")
        operations.append(line | {"step": _step(where, line)})
    return operations


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
