"""Logs of one JSON object per line, which a killed process or a power cut may leave unfinished.

Non-finite numbers are written as the strings "NaN", "Infinity" and "-Infinity", so that every line
is strict JSON and nothing is lost; `float(value)` reads these back as it does plain numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

from jaxmorph.cli.errors import InputError
from jaxmorph.system.files import replace_file, replace_text


class JsonLines:
    """Append objects to a file, one per line, without buffering.

    The first write opens the file, and removes an incomplete last line left by a killed process.

    Args:
      path: the file; created if missing.
    """

    def __init__(self, path: Path):
        self._path = Path(path)
        self._file: BinaryIO | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object as strict JSON; non-finite numbers become strings (see the module)."""
        line = json.dumps(_plain(record), allow_nan=False, ensure_ascii=False)
        if self._file is None:
            cut_torn_line(self._path)
            self._file = open(self._path, "ab")  # noqa: SIM115, it stays open
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the lines are on disk, as a checkpoint that relies on them must."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def cut_back(self, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Keep only the lines whose object `keep` accepts (see the function of the same name)."""
        self.close()
        return cut_back(self._path, keep)

    def cut_back_to_step(self, step: int) -> int:
        """Keep the lines whose `step` is at most `step`; return how many were dropped.

        Raises:
          InputError: a line without a step, or an unreadable one before a line to keep.
        """

        def keep(record: dict[str, Any]) -> bool:
            if "step" not in record:
                raise InputError(str(self._path), "step", record, "a step in every line")
            return record["step"] <= step

        return self.cut_back(keep)

    def amend_last(self, step: int, values: Mapping[str, Any]) -> bool:
        """Atomically add values to the last line if it is of `step`; return whether it was."""
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
        last: dict[str, Any] = json.loads(lines[-1]) if lines else {"step": None}
        if last["step"] != step:
            return False
        self.close()
        lines[-1] = json.dumps(_plain({**last, **values}), allow_nan=False, ensure_ascii=False)
        replace_text(self._path, "\n".join(lines) + "\n")
        return True

    def close(self) -> None:
        """Close the file; the next write reopens it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """Convert `value` to strict JSON types; NumPy scalars count as numbers."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    raise TypeError(f"no JSON for a {type(value).__name__}: {value!r}")


def cut_back(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Keep only the lines whose object `keep` accepts, byte for byte, by one atomic replacement.

    Unreadable lines (the incomplete last one of a killed process; more after a power cut) are dropped
    too, unless a line to keep follows them.

    Args:
      path: a JSON-lines file that nobody has open for writing; a missing one counts as empty.
      keep: whether to keep an object.

    Returns:
      How many lines were dropped.

    Raises:
      InputError: a line that is not a JSON object before one to keep.
    """
    path = Path(path)
    lines = _lines(path)
    kept = [line for line, _ in _kept(path, lines, keep)]
    if len(kept) < len(lines):
        replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a log, without unreadable lines at its end; none if it is missing.

    Raises:
      InputError: a line that is not a JSON object before one that is.
    """
    path = Path(path)
    return [record for _, record in _kept(path, _lines(path), lambda record: True)]


def cut_torn_line(path: Path) -> None:
    """Remove everything after the last line end, if the file exists."""
    path = Path(path)
    if not path.exists():
        return
    data = path.read_bytes()
    if not data.endswith(b"\n") and data:
        replace_file(path, data[: data.rfind(b"\n") + 1])


def _lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    with open(path, "rb") as file:
        return file.readlines()


def _kept(
    path: Path, lines: list[bytes], keep: Callable[[dict[str, Any]], bool]
) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines whose object `keep` accepts, and the objects; refuse unreadable ones before them."""
    kept, unreadable = [], 0
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            unreadable = unreadable or number
        elif keep(record):
            if unreadable:
                raise _broken_line(path, unreadable, lines[unreadable - 1])
            kept.append((line, record))
    return kept


def _record(line: bytes) -> dict[str, Any] | None:
    """The object on a complete line; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _broken_line(path: Path, number: int, line: bytes) -> InputError:
    got = line[:60].decode("utf-8", "replace").rstrip("\n")
    expected = "one JSON object per line; fix or delete the line, then start again"
    return InputError(str(path), f"line {number}", got, expected)
