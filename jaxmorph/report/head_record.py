"""Read heads.jsonl: the gate, the status and the learning rate of each head over a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.paths import is_file, is_nothing, reason
from jaxmorph.report.run_lines import read_thinned_lines

HEADS = "heads.jsonl"  # its file in a run folder
_COLUMNS = 250  # lines of each kind that a long run keeps at least: more cannot be told apart
_OF_CONTROLLER = ("updated", "skipped")
_PER_HEAD = ("gates", "status", "multiplier")


class Heads(NamedTuple):
    """The heads at one step, each array [layer, head]; null in the line is NaN."""

    step: int
    gates: np.ndarray
    status: np.ndarray
    multiplier: np.ndarray


@dataclass(frozen=True)
class ControllerUpdate:
    """An update of the controller: its step, what came of it, and its numbers, as in the line."""

    step: int
    outcome: str
    rate: float
    mean_change: float
    unchanged: int
    has_stopped: bool


@dataclass(frozen=True)
class HeadRecord:
    """What a run recorded of its heads.

    Args:
      lines: by step, ascending; of a long run evenly spaced ones.
      last_update: the controller's last; None without one.
    """

    lines: list[Heads]
    last_update: ControllerUpdate | None

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Every (layer, head) that some line has, in order."""
        shapes = {line.gates.shape for line in self.lines}
        return sorted({at for shape in shapes for at in np.ndindex(*shape)})

    def grid(self, name: str) -> np.ndarray:
        """Return a number of each head over time, [row, line]; NaN where a line lacks the head.

        Args:
          name: "gates", "status" or "multiplier".
        """
        place = {at: row for row, at in enumerate(self.rows)}
        shapes = {line.gates.shape for line in self.lines}
        rows = {shape: [place[at] for at in np.ndindex(*shape)] for shape in shapes}
        found = np.full((len(place), len(self.lines)), np.nan)
        for column, line in enumerate(self.lines):
            found[rows[line.gates.shape], column] = getattr(line, name).ravel()
        return found


def read_heads(run_dir: Path) -> HeadRecord | None:
    """Read the record of a run's heads; None if the run keeps none.

    The run may still be running and its last line incomplete.

    Raises:
      InputError: a file that cannot be read, or that no run writes.
    """
    path = run_dir / HEADS
    try:
        if is_nothing(path):
            return None
        found, why = is_file(path), "no regular file"
    except (OSError, ValueError) as error:
        found, why = False, reason(error)
    if not found:
        raise InputError(str(path), "", None, f"a readable file ({why})")
    by_step, update = {}, None
    for number, line in read_thinned_lines(path, kind=_is_evaluation, fewest=_COLUMNS):
        where = f"{path}: line {number}"
        heads = _heads(where, line)
        by_step[heads.step] = heads  # of an update and an evaluation after one step, the later
        if line.get("status") in _OF_CONTROLLER:
            update = _update(where, heads.step, line)
    if not by_step:
        return None
    return HeadRecord([by_step[step] for step in sorted(by_step)], update)


def _is_evaluation(text: bytes) -> bool:
    """Whether a line is an evaluation's, not the controller's."""
    return b'"evaluated"' in text


def _heads(where: str, line: dict[str, Any]) -> Heads:
    step, heads = line.get("step"), line.get("heads")
    if type(step) is not int or not 0 <= step < 2**53:
        raise InputError(where, "step", step, "a whole number ≥ 0 in every line")
    if not isinstance(heads, dict):
        raise InputError(where, "heads", heads, f"{', '.join(_PER_HEAD)} of each head")
    arrays = [_per_head(where, name, heads.get(name)) for name in _PER_HEAD]
    for name, array in zip(_PER_HEAD, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise InputError(
                where,
                f"heads: {name}",
                "{} layers of {} heads".format(*array.shape),
                "{} layers of {} heads, like the gates".format(*arrays[0].shape),
            )
    return Heads(step, *arrays)


def _per_head(where: str, name: str, rows: Any) -> np.ndarray:
    """Return numbers [layer, head]."""
    wanted = InputError(
        where, f"heads: {name}", None, "as many numbers, or null, for each layer: [[1, 0], [1, 1]]"
    )
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise wanted
    if len({len(row) for row in rows}) > 1:
        raise wanted
    if not all(type(value) in (int, float, type(None)) for row in rows for value in row):
        raise wanted
    try:
        return np.array(rows, float).reshape(len(rows), -1 if rows and rows[0] else 0)
    except OverflowError:
        raise wanted from None


def _update(where: str, step: int, line: dict[str, Any]) -> ControllerUpdate:
    wanted: dict[str, tuple[type, ...]] = {
        "controller_lr": (int, float),
        "gate_changes": (int, float),
        "plateau_counter": (int,),
        "early_stopping_triggered": (bool,),
    }
    for name, types in wanted.items():
        if type(line.get(name)) not in types:
            kind = "true or false" if bool in types else "a number"
            raise InputError(where, name, line.get(name), kind)
    return ControllerUpdate(step, line["status"], *(line[name] for name in wanted))
