"""Allow one process at a time in a run folder."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from jaxmorph.cli.errors import InputError


class RunLock:
    """Hold a run folder for this process; a context manager.

    The lock is the kernel's (`flock` on `RUN_DIR/lock`), so it is released however the process dies,
    and a file left by a dead process blocks nobody. The file names its holder.

    Args:
      run_dir: the folder; created if missing.

    Attributes:
      taken_over_from: after entering, the process that died holding the lock ("" if none).
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
        """Release the lock. The file stays: removing it would race with the next process."""
        assert self._file is not None, "not held"
        with self._file as file:
            self._file = None
            # on a full disk the name stays and reads as a takeover; the lock is still released
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
        for _ in range(10):  # the holder may have locked the file but not yet written its name
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
