"""What is at a path, asked so that no path, however odd, gives more than an error with a reason."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_ROOM = "0" * 120  # a folder must have room for names of its own below it
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def reason(error: Exception) -> str:
    """Return why a path could not be used, in words."""
    words = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return "embedded null byte" if "embedded null" in words else words  # each Python has its own


def is_nothing(path: Path) -> bool:
    """Return whether nothing is at a path.

    Raises:
      OSError: it cannot be looked at, or no path can be so long.
      ValueError: no path can have these characters.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def kind_of(path: Path) -> str:
    """Return what is at a path other than a regular file, in words; "" for a regular file.

    Nothing is opened: opening a pipe would wait for its writer, and reading a device may never end.

    Raises:
      OSError: nothing is there, or it cannot be looked at.
      ValueError: no path can have these characters.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return ""
    return next((words for holds, words in _KINDS if holds(mode)), "something else")


def is_file(path: Path) -> bool:
    """Return whether a regular file is at a path; raises like `is_nothing`."""
    return not is_nothing(path) and not kind_of(path)


def is_folder(path: Path) -> bool:
    """Return whether a folder is at a path; raises like `is_nothing`."""
    return not is_nothing(path) and kind_of(path) == "a folder"


def is_file_or_folder(path: Path) -> bool:
    """Return whether a regular file or a folder is at a path; raises like `is_nothing`."""
    return not is_nothing(path) and kind_of(path) in ("", "a folder")


def is_path(path: Path) -> bool:
    """Return True: something can be at this path; raises like `is_nothing`."""
    is_nothing(path)
    return True


def is_folder_or_free(path: Path) -> bool:
    """Return whether a folder that can be written is at a path, or could be made there.

    Raises:
      OSError: it could not, with the reason; as `is_nothing` otherwise.
      ValueError: no path can have these characters.
    """
    is_nothing(path / _ROOM)
    above = next(place for place in (path, *path.parents) if not is_nothing(place))
    if kind_of(above) != "a folder":
        if above == path:
            return False
        raise NotADirectoryError(0, f"{above} is not a folder")
    for name in path.relative_to(above).parts:
        is_nothing(above / name)  # where nothing is yet, only this finds a name that is too long
    as_we_are = os.access in os.supports_effective_ids
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=as_we_are):
        raise PermissionError(0, f"{above} may not be written")
    return True
