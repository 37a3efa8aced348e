"""Logs of one JSON object per line, which a killed process or a power cut may leave unfinished.

Non-finite numbers are written as the strings "NaN", "Infinity" and "-Infinity", so that every line
is strict JSON and nothing is lost; `float(value)` reads these back as it does plain numbers.

A log counts and hashes its lines as it writes them. Its `mark` says what has been written so far;
who keeps the mark can later tell whether the file still begins so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

from jaxmorph.cli.errors import InputError
from jaxmorph.system.files import naming, open_to_append, replace_file, sync_open, write_all

_BLOCK = 1 << 16
Record = dict[str, Any]


@dataclass(frozen=True)
class LogMark:
    """The first lines of a log: how many, their bytes together, and the SHA-256 of these."""

    lines: int
    size: int
    sha256: str

    @staticmethod
    def of(lines: Iterable[bytes]) -> LogMark:
        """Return the mark of complete lines."""
        count, size, digest = 0, 0, hashlib.sha256()
        for line in lines:
            digest.update(line)
            count, size = count + 1, size + len(line)
        return LogMark(count, size, digest.hexdigest())


class JsonLines:
    """Append objects to a file, one per line, without buffering.

    The first write opens the file, and removes an incomplete last line left by a killed process.

    Args:
      path: the file; created if missing.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._descriptor: int | None = None
        self._lines: _Lines | None = (
            None  # what the file begins with; the rest goes at the next write
        )
        self._takes_back = False  # whether the next write replaces the last line

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object as strict JSON; non-finite numbers become strings (see the module)."""
        line = _line(record)
        lines = self._known()
        if self._takes_back:
            self.close()
            lines.drop_last()
            self._takes_back = False
        try:
            if self._descriptor is None:
                self._descriptor = open_to_append(self.path, lines.size)
            with naming(self.path):
                write_all(self._descriptor, line)
        except OSError:
            self.close()
            self._lines = None  # a part of the line may be there
            raise
        lines.append(line)

    def take_back(self, step: int) -> Record | None:
        """Return the last line's object if it is of `step`; the next write then replaces that line."""
        record = _record(self._known().last)
        if record is None or record.get("step") != step:
            return None
        self._takes_back = True
        return record

    def sync(self) -> None:
        """Wait until the lines are on disk, as a checkpoint that relies on them must."""
        if self._descriptor is not None:
            sync_open(self._descriptor, self.path)

    def mark(self) -> LogMark:
        """Return what has been written so far."""
        return self._known().mark()

    def begins_with(self, mark: LogMark) -> bool:
        """Return whether the file begins with the lines of `mark`; if so, the log goes on behind them.

        The file is read once, up to there, and not changed: `cut` or the next write removes the rest.
        """
        self.close()
        if _size(self.path) < mark.size:
            return False
        lines = _Lines.of(self.path, mark.size)
        if lines.mark() != mark:
            return False
        self._lines = lines
        return True

    def cut(self) -> None:
        """Remove what follows the lines the log goes on behind; create the file if it is missing."""
        if self._descriptor is None:
            self._descriptor = open_to_append(self.path, self._known().size)

    def close(self) -> None:
        """Close the file; the next write reopens it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _known(self) -> _Lines:
        if self._lines is None:
            self._lines = _Lines.of(self.path, _complete_size(self.path))
        return self._lines


class _Lines:
    """The count and digest of a log's first lines. The last one is hashed late: it may be replaced."""

    def __init__(self) -> None:
        self.size, self.last = 0, b""
        self._count, self._before_last = 0, hashlib.sha256()

    @staticmethod
    def of(path: Path, size: int) -> _Lines:
        """Read the first `size` bytes of a file once, in blocks."""
        lines = _Lines()
        if not size:
            return lines
        with open(path, "rb") as file:
            begin = _line_begin(file, size - 1)
            file.seek(0)
            for block in _blocks(file, begin):
                lines._before_last.update(block)
                lines._count += block.count(b"\n")
            lines.last = file.read(size - begin)
        lines._count += 1
        lines.size = size
        return lines

    def append(self, line: bytes) -> None:
        self._before_last.update(self.last)
        self._count += 1
        self.size += len(line)
        self.last = line

    def drop_last(self) -> None:
        """Go back behind the line before the last; only once, and then a line must be appended."""
        self._count -= 1
        self.size -= len(self.last)
        self.last = b""

    def mark(self) -> LogMark:
        digest = self._before_last.copy()
        digest.update(self.last)
        return LogMark(self._count, self.size, digest.hexdigest())


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(_plain(record), allow_nan=False, ensure_ascii=False)
    return text.encode() + b"\n"


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


def cut_back(path: Path, keep: Callable[[Record], bool]) -> int:
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
    dropped = sum(1 for _ in _read(path)) - sum(1 for _ in _kept(path, keep))
    if dropped:
        replace_file(path, (line for line, _ in _kept(path, keep)))
    return dropped


def salvaged(path: Path, keep: Callable[[Record], bool]) -> Iterator[bytes]:
    """Yield the complete lines of a log, however damaged, whose object `keep` accepts."""
    for line in _read(path):
        record = _record(line)
        if record is not None and keep(record):
            yield line


def read_records(path: Path) -> list[Record]:
    """Return the objects of a log, without unreadable lines at its end; none if it is missing.

    Raises:
      InputError: a line that is not a JSON object before one that is.
    """
    return [record for _, record in _kept(path, lambda record: True)]


def _kept(path: Path, keep: Callable[[Record], bool]) -> Iterator[tuple[bytes, Record]]:
    """The lines whose object `keep` accepts, and the objects; refuse unreadable ones before them."""
    unreadable = None
    for number, line in enumerate(_read(path), start=1):
        record = _record(line)
        if record is None:
            unreadable = unreadable or (number, line)
        elif keep(record):
            if unreadable:
                raise _broken_line(path, *unreadable)
            yield line, record


def _read(path: Path) -> Iterator[bytes]:
    if Path(path).exists():
        with open(path, "rb") as file:
            yield from file


def _record(line: bytes) -> Record | None:
    """The object on a complete line; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _broken_line(path: Path, number: int, line: bytes) -> InputError:
    got = line[:60].decode("utf-8", "replace").rstrip("\n")
    expected = "one JSON object per line; fix or delete the line, then start again"
    return InputError(str(path), f"line {number}", got, expected)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _complete_size(path: Path) -> int:
    """Return the size of a log up to its last line end, read backwards from its end."""
    size = _size(path)
    if not size:
        return 0
    with open(path, "rb") as file:
        return _line_begin(file, size)


def _line_begin(file: BinaryIO, end: int) -> int:
    """Return where the line begins that holds the byte before `end`: behind the last line end there."""
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the next `size` bytes of a file in blocks."""
    while size > 0 and (block := file.read(min(size, 16 * _BLOCK))):
        size -= len(block)
        yield block
