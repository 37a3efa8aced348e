"""Read the operations of a run that have not fired, and what each waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.json_file import read_json

WAITING = "waiting.json"  # its file in a run folder, as of the newest checkpoint


class WaitingOperation(NamedTuple):
    """An operation that has not fired: its number in the schedule, its title, its triggers."""

    number: int
    operation: str
    waits_for: str


def read_waiting(run_dir: Path) -> tuple[int, list[WaitingOperation]]:
    """Return the operations that have not fired, and as of which step; none without a schedule.

    Raises:
      InputError: a file that no run writes.
    """
    path = run_dir / WAITING
    if not path.is_file():
        return 0, []
    content = read_json(path)
    try:
        step, rows = content["step"], content["operations"]
        waiting = [_operation(row) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(str(path), "", None, f"a run's waiting operations ({error})") from None
    if type(step) is not int:
        raise InputError(str(path), "step", step, "a whole number")
    return step, waiting


def _operation(row: Any) -> WaitingOperation:
    found = WaitingOperation(row["number"], row["operation"], row["waits_for"])
    wanted = (int, str, str)
    if tuple(map(type, found)) != wanted:
        raise ValueError(f"{found} are not a number and two texts")
    return found
