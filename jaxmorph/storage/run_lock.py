"""Allow one process at a time in a run folder."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from jaxmorph.cli.errors import FailedError, InputError


class RunLockLostError(FailedError):
    """The run folder's lock file is not the one that this process has locked."""


class RunLock:
    """Hold a run folder for this process; a context manager.

    The lock is the operating system's, on `RUN_DIR/lock`, so it is released however the process dies,
    and a file left by a dead process blocks nobody. The file names its holder.

    The system locks a file, not its name: if the file is removed or replaced, a second process can
    lock the new one. The holder notices by `check`, and must then leave the folder alone.

    Args:
      run_dir: the folder; created if missing.

    Attributes:
      run_dir: the folder.
      taken_over_from: after entering, the process that died holding the lock ("" if none).
    """

    def __init__(self, run_dir: Path):
        self.run_dir = Path(run_dir)
        self.taken_over_from = ""
        self._path = self.run_dir / "lock"
        self._descriptor: int | None = None  # of the locked file
        self._lock = FileLock(
            self._path,
            blocking=False,
            fallback_to_soft=False,  # a lock that outlives its holder would block the next process
            preserve_lock_file=True,  # removing it would race with the next process
            on_acquired=self._take,
        )

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
          InputError: another process holds it (pid, host and start are named), or the folder
            cannot be made or locked.
        """
        assert self._descriptor is None, "already held"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise self._refusal() from None
        except OSError as error:
            expected = f"a folder that can be written and locked ({error.strerror})"
            raise InputError("--run_dir", "", str(self.run_dir), expected) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock. The file stays, empty."""
        assert self._descriptor is not None, "not held"
        # on a full disk the name stays and reads as a takeover; the lock is still released
        with contextlib.suppress(OSError):
            if self._lost() is None:
                os.ftruncate(self._descriptor, 0)
        self._descriptor = None
        self._lock.release()

    def check(self) -> None:
        """Check that `RUN_DIR/lock` is still the file that this process has locked.

        Raises:
          RunLockLostError: it is gone or another one, so that another process may use the folder.
        """
        if (why := self._lost()) is not None:
            raise RunLockLostError(
                f"{self._path}, which this process has locked, {why}; another process may use the "
                "folder, so this one stops and writes nothing more to it. The same command "
                "continues from the newest checkpoint there"
            )

    def _lost(self) -> str | None:
        """What has happened to the lock file; None if nothing."""
        assert self._descriptor is not None, "not held"
        try:
            found = os.stat(self._path)
        except OSError as error:
            return f"cannot be found ({error.strerror})"
        same = os.path.samestat(found, os.fstat(self._descriptor))
        return None if same else "was replaced by another file"

    def _take(self, descriptor: int) -> None:
        """Write this process's name into the file just locked."""
        self.taken_over_from = _holder(self._path)
        started = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        name = f"process {os.getpid()} on {socket.gethostname()}, started {started}"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"\n{name}\n".encode())
        self._descriptor = descriptor

    def _refusal(self) -> InputError:
        holder = _holder(self._path)
        for _ in range(10):  # the holder may have locked the file but not yet written its name
            if holder:
                break
            time.sleep(0.02)
            holder = _holder(self._path)
        expected = (
            f"a run folder that no other process uses; {holder or 'another process'} uses it: "
            "wait for it, stop it, or name another --run_dir"
        )
        return InputError("--run_dir", "", str(self.run_dir), expected)


def _holder(path: Path) -> str:
    """Who holds or held the lock; "" if the file does not say."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        file.seek(1)  # Windows lets nobody read the first byte, which is the one that is locked
        return file.read(1000).decode("utf-8", "replace").strip()
    return ""
