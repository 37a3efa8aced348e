"""All that a run writes, syncs and renames itself: every failure is an OSError that names the file.

Whatever a run leaves on disk, except the arrays (Orbax's) and the trackers' files, is written here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxmorph.cli.errors import InputError

# What another path or other permissions would cure. A disk that is full or fails is none of these.
_PATH_AT_FAULT = frozenset(
    (
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
        *(errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO),
    )
)


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file so that after a crash readers see either the old content or all of the new.

    It is synced to disk on return.

    Args:
      path: the file.
      content: its bytes, or the pieces of them in order.

    Raises:
      OSError: it cannot be written; the old content stays.
    """
    part = path.with_name(f".{path.name}.part")
    pieces = (content,) if isinstance(content, bytes) else content
    with naming(path):
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                for piece in pieces:
                    write_all(descriptor, piece)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a file in UTF-8; see `replace_file`."""
    replace_file(path, text.encode())


def write_new(path: Path, content: bytes) -> None:
    """Write a file that nobody reads before its folder is synced and renamed."""
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(descriptor, content)
        finally:
            os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all bytes to an open file."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def open_to_append(path: Path, size: int) -> int:
    """Open a file behind its first `size` bytes, without what follows them; create it if missing."""
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.fstat(descriptor).st_size > size:
                os.ftruncate(descriptor, size)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def rename_folder(folder: Path, name: Path) -> None:
    """Rename a folder within its parent; the new name is on disk on return."""
    with naming(name):
        os.rename(folder, name)
        sync_folder(name.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk (a rename is not until then)."""
    if sys.platform == "win32":  # which lets nobody open a folder, and asks for no such thing
        return
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file are on disk."""
    _sync(path, os.O_RDONLY)


def sync_open(descriptor: int, path: Path) -> None:
    """Wait until the bytes of an open file are on disk."""
    with naming(path):
        os.fsync(descriptor)


def _sync(path: Path, flags: int) -> None:
    with naming(path):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in whatever OSError is raised: the system does so only where it opens one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def refusing_bad_paths() -> Iterator[None]:
    """Raise an InputError for a path that cannot be written to; a failing disk is none.

    Raises:
      InputError: another path or other permissions are needed; names the file and the reason.
      OSError: the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _PATH_AT_FAULT:
            raise
        expected = f"a writable file ({error.strerror})"
        raise InputError(str(error.filename), "", None, expected) from None
