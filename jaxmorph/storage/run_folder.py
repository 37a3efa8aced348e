"""The run folder's plain files: its lock, its JSON-lines logs, and files replaced in one piece.

Numbers that JSON has no word for are written as the strings "NaN", "Infinity" and "-Infinity", so
that every line is strict JSON and nothing is lost; `float(value)` reads them back, as it reads the
plain numbers.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from jaxmorph.cli.errors import InputError


class RunLock:
    """Hold a run folder for this process; a context manager.

    The lock is the kernel's (`flock` on `RUN_DIR/lock`), so it ends with its process whatever kills
    that, and a file left behind by a dead process holds nobody up. The file names its holder.

    Args:
      run_dir: the folder; made if there is none.

    Attributes:
      taken_over_from: after entering, who held the folder and died holding it ("" if nobody).
    """

    def __init__(self, run_dir: Path):
        self._run_dir = Path(run_dir)
        self._file: BinaryIO | None = None
        self.taken_over_from = ""

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
          InputError: another process holds it (pid, host and start are named), or the folder
            cannot be made or locked.
        """
        assert self._file is None, "already held"
        file = self._open()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.taken_over_from = _holder(file)
            _overwrite(file, f"{_this_process()}\n".encode())
        except BlockingIOError:
            with file:
                raise self._refusal(file) from None
        except OSError as error:
            file.close()
            raise self._unusable(error) from error
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lock back. The file stays: removing it would race with the next to lock it."""
        assert self._file is not None, "not held"
        with self._file as file:
            self._file = None
            # on a full disk the name stays and reads as a takeover; the lock is released anyhow
            with contextlib.suppress(OSError):
                _overwrite(file, b"")

    def _open(self) -> BinaryIO:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            return open(self._run_dir / "lock", "a+b", buffering=0)  # type: ignore[return-value]
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> InputError:
        expected = f"a folder that can be written and locked ({error.strerror})"
        return InputError("--run_dir", "", str(self._run_dir), expected)

    def _refusal(self, file: BinaryIO) -> InputError:
        holder = _holder(file)
        for _ in range(10):  # the holder may have locked the file and not yet written its name
            if holder:
                break
            time.sleep(0.02)
            holder = _holder(file)
        expected = (
            f"a run folder that no other process uses; {holder or 'another process'} uses it: "
            "wait for it, stop it, or name another --run_dir"
        )
        return InputError("--run_dir", "", str(self._run_dir), expected)


def _this_process() -> str:
    started = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, started {started}"


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(1000).decode("utf-8", "replace").strip()


def _overwrite(file: BinaryIO, data: bytes) -> None:
    file.truncate(0)
    file.write(data)


class JsonLines:
    """Append objects to a file, one a line, each handed to the system at once.

    The first write opens the file, and takes off a torn last line as a killed process leaves it.

    Args:
      path: the file; made if there is none.
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
        """Wait until the lines are on the disk, as a checkpoint that counts on them must."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def cut_back(self, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Keep only the lines whose object `keep` accepts (see the function of this name)."""
        self.close()
        return cut_back(self._path, keep)

    def cut_back_to_step(self, step: int) -> int:
        """Keep the lines whose `step` is at most `step`; return how many went.

        Raises:
          InputError: a line without a step, or an unreadable one before a line to be kept.
        """

        def keep(record: dict[str, Any]) -> bool:
            if "step" not in record:
                raise InputError(str(self._path), "step", record, "a step in every line")
            return record["step"] <= step

        return self.cut_back(keep)

    def amend_last(self, step: int, values: Mapping[str, Any]) -> bool:
        """Add values to the last line, at once or not at all, if it is that of `step`; say whether."""
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
        last: dict[str, Any] = json.loads(lines[-1]) if lines else {"step": None}
        if last["step"] != step:
            return False
        self.close()
        lines[-1] = json.dumps(_plain({**last, **values}), allow_nan=False, ensure_ascii=False)
        write_text_atomically(self._path, "\n".join(lines) + "\n")
        return True

    def close(self) -> None:
        """Close the file; another write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """Strict JSON's own types for `value`; NumPy's scalars count as numbers."""
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

    Unreadable lines (the torn last one of a killed process; more after a power cut) go too, as long
    as nothing that is kept stands after them.

    Args:
      path: a JSON-lines file that nobody has open for writing; a missing one counts as empty.
      keep: says whether an object stays.

    Returns:
      How many lines went.

    Raises:
      InputError: a line that is not a JSON object stands before one to be kept.
    """
    path = Path(path)
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        lines = file.readlines()
    kept, unreadable = [], 0
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            unreadable = unreadable or number
        elif keep(record):
            if unreadable:
                raise _broken_line(path, unreadable, lines[unreadable - 1])
            kept.append(line)
    if len(kept) < len(lines):
        _replace(path, b"".join(kept))
    return len(lines) - len(kept)


def cut_torn_line(path: Path) -> None:
    """Take off what follows the last line end, if the file is there."""
    path = Path(path)
    if not path.exists():
        return
    data = path.read_bytes()
    if not data.endswith(b"\n") and data:
        _replace(path, data[: data.rfind(b"\n") + 1])


def _record(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _broken_line(path: Path, number: int, line: bytes) -> InputError:
    got = line[:60].decode("utf-8", "replace").rstrip("\n")
    expected = "one JSON object a line; mend or delete the line, then start again"
    return InputError(str(path), f"line {number}", got, expected)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file so that readers and crashes find the old text or the new, never a part."""
    _replace(Path(path), text.encode())


def _replace(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk (a rename is not until then)."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file are on the disk."""
    _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
