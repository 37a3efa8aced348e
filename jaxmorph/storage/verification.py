"""Which checkpoints of a folder are sound, and what they say besides their arrays.

Each is read whole once, against its manifest; then its meta is compared with what a meta must be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmorph.cli.errors import InputError
from jaxmorph.storage import checkpoint_folder
from jaxmorph.storage.formats import FormatError, Migrations, check_format, migrated
from jaxmorph.storage.manifest import Manifest, problem_of, read_json, read_manifest

EXPECTED = "a sound checkpoint; restore one from a backup, or start again in another --run_dir"


class CorruptCheckpointsError(InputError):
    """There are checkpoints, but none is sound."""


class Verification:
    """What this process knows of the checkpoints in a folder.

    Args:
      folder: where they are.
      migrations: how to convert older formats to the current one.
      meta_problem: returns what is wrong with a meta of the current format, None if nothing.

    Attributes:
      sound: the steps of those that were verified, or written by this process.
      corrupt: the steps of those found to be corrupt.
    """

    def __init__(
        self, folder: Path, migrations: Migrations, meta_problem: Callable[[Any], str | None]
    ):
        self._folder, self._migrations, self._meta_problem = folder, migrations, meta_problem
        self.sound: set[int] = set()
        self.corrupt: set[int] = set()

    def is_sound(self, step: int) -> bool:
        """Return whether there is a sound checkpoint of a step."""
        return (self._folder / str(step)).is_dir() and self.problem(step) is None

    def problem(self, step: int) -> str | None:
        """Return what is wrong with a step's checkpoint; one known to be sound is not read again."""
        if step in self.sound:
            return None
        folder = self._folder / str(step)
        problem = problem_of(folder) or self._problem_of_meta(folder)
        (self.corrupt if problem else self.sound).add(step)
        return problem

    def readable(self, step: int) -> tuple[Path, Manifest]:
        """Return the folder and the manifest of a checkpoint that is sound and of a readable format.

        Raises:
          CorruptCheckpointsError: it is not sound.
          FormatError: it is of a format that cannot be read.
        """
        folder = self._folder / str(step)
        if problem := self.problem(step):
            raise CorruptCheckpointsError(str(folder), "", problem, EXPECTED)
        manifest = read_manifest(folder)
        check_format(folder, manifest, self._migrations)
        return folder, manifest

    def meta(self, step: int) -> dict[str, Any]:
        """Return the meta of a checkpoint in the current format; raises as `readable` does."""
        return self._meta(*self.readable(step))

    def latest(self, on_corrupt: Callable[[int, str], None]) -> int | None:
        """Return the newest step whose checkpoint is sound, all of them being read anew.

        Args:
          on_corrupt: called with every newer step and its problem.

        Raises:
          CorruptCheckpointsError: there are checkpoints, and none is sound.
          FormatError: it is of a format that cannot be read.
        """
        problems = []
        self.sound.clear()
        self.corrupt.clear()
        for step in reversed(checkpoint_folder.steps(self._folder)):
            problem = self.problem(step)
            if problem is None:
                self.readable(step)
                return step
            on_corrupt(step, problem)
            problems.append(f"{step}: {problem}")
        # one moved aside was replaced by a sound one of its step, unless someone removed that
        problems += [f"{each.name}: moved aside" for each in self._folder.glob("*.corrupt*")]
        if not problems:
            return None
        listed = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        got = f"all {len(problems)} checkpoints corrupt ({listed})"
        raise CorruptCheckpointsError(str(self._folder), "", got, EXPECTED)

    def _problem_of_meta(self, folder: Path) -> str | None:
        """What is wrong with the meta of an undamaged checkpoint, if its format can be read."""
        manifest = read_manifest(folder)
        try:
            check_format(folder, manifest, self._migrations)
            problem = self._meta_problem(self._meta(folder, manifest))
        except FormatError:
            return None
        except ValueError as error:
            return str(error)
        return problem and f"meta.json is damaged ({problem})"

    def _meta(self, folder: Path, manifest: Manifest) -> Any:
        """The meta of a checkpoint, converted; raises ValueError if it cannot be."""
        meta, _ = read_json(folder / "meta.json")
        try:
            return migrated(meta, manifest["format"], self._migrations)
        except (AttributeError, LookupError, TypeError) as error:  # no type declares older metas
            raise ValueError("meta.json is damaged (not of its format)") from error
