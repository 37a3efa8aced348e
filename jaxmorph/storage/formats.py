"""The format of a checkpoint: which ones can be read, and how to migrate older ones.

A format is a number in the manifest. It changes when the names or meanings of the state's arrays or
the fields of the meta change, so that older checkpoints cannot be read directly. A checkpoint
without a number has format 1. To introduce the next format, add a line to `MIGRATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxmorph import __version__
from jaxmorph.cli.errors import InputError
from jaxmorph.cli.printing import named

Meta = dict[str, Any]
Migrations = Mapping[int, Callable[[Meta], Meta] | str]

# From the key's format to the next: a function that converts the meta, if the arrays are the same;
# otherwise the reason why there is none, as words that follow "in format N ...".
MIGRATIONS: Migrations = {
    1: "the arrays of the state had other names",
    2: lambda meta: meta | {"logs": {}},  # it did not know the run's logs
    3: lambda meta: meta | {"decisions": {}},  # nor, see `Variable.since`, a status of heads
}


class FormatError(InputError):
    """A checkpoint is sound, but of a format that cannot be read."""


def current_format(migrations: Migrations = MIGRATIONS) -> int:
    """Return the format that is written: the result of the last migration."""
    return max(migrations) + 1


def check_format(
    folder: Path, manifest: Mapping[str, Any], migrations: Migrations = MIGRATIONS
) -> None:
    """Check that a checkpoint can be read, directly or by migrations.

    Args:
      folder: the checkpoint's.
      manifest: its manifest.
      migrations: from each older format to the next.

    Raises:
      FormatError: it cannot; names the folder, the formats, the version that wrote it and the fix.
    """
    got, current = manifest["format"], current_format(migrations)
    writer = _writer(manifest)
    if got > current:
        expected = (
            f"at most {current}, the newest format jaxmorph {__version__} reads; it was written by "
            f"a newer jaxmorph (format {got}{writer}); update jaxmorph"
        )
        raise FormatError(str(folder), "format", got, expected)
    for number in range(got, current):
        if isinstance(why := migrations[number], str):
            expected = (
                f"{current}, the format jaxmorph {__version__} reads (in format {number} {why}); "
                f"continue the run with the jaxmorph that wrote it (format {got}{writer}), or start "
                "again in another --run_dir"
            )
            raise FormatError(str(folder), "format", got, expected)


def migrated(meta: Meta, written: int, migrations: Migrations = MIGRATIONS) -> Meta:
    """Return the meta of a readable checkpoint of format `written`, converted to the current one."""
    for number in range(written, current_format(migrations)):
        migrate = migrations[number]
        assert not isinstance(migrate, str), migrate
        meta = migrate(meta)
    return meta


def _writer(manifest: Mapping[str, Any]) -> str:
    """The version that wrote a checkpoint, from format 2 on."""
    return f", version {named(manifest['jaxmorph'])}" if manifest["jaxmorph"] else ""
