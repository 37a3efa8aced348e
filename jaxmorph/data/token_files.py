"""Token ids in files, read by position: a corpus need not fit in memory.

Files are not mapped into memory: when another process shortens a mapped file, reading it kills this
one with SIGBUS, and nothing can be said. A read that comes up short can be reported.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxmorph.cli.errors import InputError

_CHUNK = 4 << 20  # bytes


class TokenFile:
    """The ids in a file, read-only: [tokens] `dtype`. Its length is that at the time of opening.

    Args:
      path: of the file, which holds ids and nothing else.
      dtype: of an id.

    Attributes:
      dtype: of an id.
      path: of the file.
      stamp: what changes when the file does: its size and times.

    Raises:
      InputError: not an integer number of ids, or none.
      OSError: it cannot be read.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        self._file = _OpenFile(path)
        found = os.fstat(self._file.descriptor)
        self.stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        if found.st_size == 0 or found.st_size % dtype.itemsize:
            expected = f"{dtype.name} ids: a multiple of {dtype.itemsize} bytes, not 0"
            raise InputError(str(path), "", found.st_size, expected)
        self._start, self._stop = 0, found.st_size // dtype.itemsize

    def part(self, start: int, stop: int) -> TokenFile:
        """Return the tokens from `start` to `stop`, 0 ≤ start ≤ stop ≤ length, of the same file."""
        taken = object.__new__(TokenFile)
        taken.path, taken.dtype, taken.stamp, taken._file = (
            self.path, self.dtype, self.stamp, self._file,
        )  # fmt: skip
        taken._start, taken._stop = self._start + start, self._start + stop
        return taken

    @property
    def span(self) -> tuple[int, int]:
        """Return the first token's place in the file, and the place after the last."""
        return self._start, self._stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice with step {step}; step 1 can be read")
        return self.windows(np.array([start]), max(0, stop - start))[0]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def windows(self, starts: np.ndarray, width: int) -> np.ndarray:
        """Return the `width` tokens from each of `starts` on: [starts, width].

        Raises:
          InputError: the file has been shortened since it was opened.
        """
        size = self.dtype.itemsize
        offsets, read, wanted = (
            ((starts + self._start) * size).tolist(),
            self._file.read,
            width * size,
        )
        content = b"".join([read(wanted, offset) for offset in offsets])
        if len(content) != wanted * len(offsets):
            got = f"{os.fstat(self._file.descriptor).st_size} bytes"
            expected = (
                f"the {self.stamp[0]} bytes it began with: it was shortened while it was read; put it "
                "back, and the same command goes on"
            )
            raise InputError(str(self.path), "", got, expected)
        return np.frombuffer(content, self.dtype).reshape(len(offsets), width)


Tokens = np.ndarray | TokenFile  # [tokens] ids, in memory or in a file


def windows(tokens: Tokens, starts: np.ndarray, width: int) -> np.ndarray:
    """Return the `width` tokens from each of `starts` on: [starts, width] of the tokens' dtype."""
    if isinstance(tokens, TokenFile):
        return tokens.windows(starts, width)
    return np.lib.stride_tricks.sliding_window_view(tokens, width)[starts]


def chunks(tokens: Tokens) -> Iterator[np.ndarray]:
    """Yield all tokens in order, some of them at a time."""
    step = _CHUNK // tokens.dtype.itemsize
    for start in range(0, len(tokens), step):
        yield tokens[start : start + step]


class _OpenFile:
    """A descriptor that is closed when nothing uses it any more."""

    def __init__(self, path: Path):
        binary = os.O_BINARY if sys.platform == "win32" else 0
        self.descriptor = os.open(path, os.O_RDONLY | binary)
        weakref.finalize(self, os.close, self.descriptor).atexit = False  # threads may still read
        self._lock = threading.Lock()

    def read(self, size: int, offset: int) -> bytes:
        """Return `size` bytes from `offset` on, or fewer at the end of the file."""
        content = self._read_once(size, offset)
        while len(content) < size:  # the end, or more than the system reads at once
            more = self._read_once(size - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    if sys.platform == "win32":  # which cannot read by position

        def _read_once(self, size: int, offset: int) -> bytes:
            with self._lock:
                os.lseek(self.descriptor, offset, os.SEEK_SET)
                return os.read(self.descriptor, size)
    else:

        def _read_once(self, size: int, offset: int) -> bytes:
            return os.pread(self.descriptor, size, offset)
