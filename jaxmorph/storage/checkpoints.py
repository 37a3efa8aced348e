"""Checkpoints: a step's whole state in one folder, committed by one rename and verified on read.

A save writes `<step>.partial/`: `state/` (the arrays, by Orbax), `meta.json`, and last
`manifest.json`, with a digest of every file. Renaming that folder to `<step>` is the commit; older
checkpoints are removed only afterwards. Before reading, every checkpoint is checked against its
manifest, because Orbax silently restores changed bits; then its format is checked.

Arrays are a flat mapping of path to array; this module knows nothing about models.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmorph.cli.errors import FailedError
from jaxmorph.cli.printing import say
from jaxmorph.storage import checkpoint_folder
from jaxmorph.storage.array_files import ArrayFiles, copied_to_host
from jaxmorph.storage.checkpoint_folder import move_aside
from jaxmorph.storage.declared import mismatch
from jaxmorph.storage.formats import MIGRATIONS, Migrations, current_format
from jaxmorph.storage.manifest import (
    check_leaves,
    describe_leaves,
    read_manifest,
    state_sha256,
    write_manifest,
)
from jaxmorph.storage.retention import best, last_good, prune, remove, set_aside
from jaxmorph.storage.run_lock import RunLockLostError
from jaxmorph.storage.verification import EXPECTED, CorruptCheckpointsError, Verification
from jaxmorph.system import processes
from jaxmorph.system.crash_points import crash_point
from jaxmorph.system.files import rename_folder, write_new

if TYPE_CHECKING:
    import jax
    import numpy as np

    Arrays = Mapping[str, jax.Array | np.ndarray]

__all__ = ["CheckpointError", "Checkpoints", "CorruptCheckpointsError", "state_sha256"]

_NONE = -1  # what process 0 broadcasts if there is no step


def any_object(meta: Any) -> str | None:
    """Return what is wrong with a meta that may be any JSON object."""
    return mismatch(meta, dict[str, Any])


class CheckpointError(FailedError):
    """A checkpoint could not be written; the run's own state is unchanged."""


def say_corrupt(step: int, problem: str) -> None:
    """Report on stderr that a checkpoint is skipped, and why."""
    say(f"checkpoint {step} is corrupt: {problem}", file=sys.stderr)


class Checkpoints:
    """The checkpoints of one run. The writer must hold the run folder's lock.

    With several processes all of them must call every method; process 0 writes and decides.

    Args:
      folder: where they are; created by the first save.
      keep: how many of the newest to keep, at least 1.
      keep_best: also keep the one with the lowest score.
      migrations: how to convert older formats to the current one.
      meta_problem: returns what is wrong with a meta of the current format, None if nothing.
      check_lock: raises RunLockLostError if the run folder may be another process's.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_best: bool,
        migrations: Migrations = MIGRATIONS,
        *,
        meta_problem: Callable[[Any], str | None] = any_object,
        check_lock: Callable[[], None] = lambda: None,
    ):
        assert keep >= 1, keep
        self._migrations = migrations
        self._check_lock = check_lock
        self.folder = Path(folder).absolute()
        self._keep, self._keep_best = keep, keep_best
        self._verified = Verification(self.folder, migrations, meta_problem)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._files = ArrayFiles()

    def save(
        self,
        step: int,
        arrays: Arrays,
        meta: Mapping[str, Any],
        *,
        score: float | None,
        wait: bool = False,
        provisional: bool = False,
    ) -> None:
        """Start writing a checkpoint, unless there is already a sound one of this step.

        On return `arrays` and `meta` have been copied: the caller may donate or change them. The
        write continues in a thread; with several processes it is already done.

        Args:
          step: its name.
          arrays: path -> array.
          meta: any JSON value.
          score: see `retention`; a non-finite one counts as none.
          wait: return only after the commit.
          provisional: it may be replaced (see `discard`), so older ones are not pruned yet.

        Raises:
          CheckpointError: the previous save failed, or this one with `wait`.
          RunLockLostError: likewise, because of the lock; nothing was written or removed since.
        """

        self.wait()
        text = json.dumps(meta, indent=1)
        if processes.count() > 1:
            self._try_to_write(step, arrays, text, score, provisional)  # all processes together
        elif not self._verified.is_sound(step):
            arguments = (step, copied_to_host(arrays), text, score, provisional)
            # not a daemon: an interpreter that exits with an error still finishes the commit
            self._thread = threading.Thread(target=self._try_to_write, args=arguments)
            self._thread.start()
        if wait or self._thread is None:
            self.wait()

    def discard(self, step: int) -> None:
        """Remove the checkpoint of a step, so that it can be replaced; older ones stay."""
        self.wait()
        self._check_lock()
        self._by_first_process(lambda: remove(self.folder, step))

    def set_aside(self, after: int) -> list[int]:
        """Rename the checkpoints after a step to STEP.diverged: no run goes on from them.

        They are removed when a good checkpoint of their step or a later one is committed.

        Returns:
          Their steps.
        """
        self.wait()
        self._check_lock()
        steps = [step for step in self.steps() if step > after]
        self._by_first_process(lambda: set_aside(self.folder, steps))
        self._verified.sound -= set(steps)
        return steps

    def wait(self) -> None:
        """Wait until the last save is committed.

        Raises:
          CheckpointError: it could not be written; names the folder and the reason.
          RunLockLostError: it was not, because of the lock.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, then stop Orbax's threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._files.close()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, sound or not, oldest first."""
        return checkpoint_folder.steps(self.folder)

    def newest(self) -> int | None:
        """Return the newest step not known to be corrupt, without reading it; None if none."""
        return max(set(self.steps()) - self._verified.corrupt, default=None)

    def latest_sound(self, on_corrupt: Callable[[int, str], None] = say_corrupt) -> int | None:
        """Return the newest step whose checkpoint is sound; None if there is no checkpoint at all.

        Changes nothing on disk, so that a run in another format stays intact.

        Args:
          on_corrupt: called with every newer step and its problem. Those are left in place.

        Raises:
          CorruptCheckpointsError: there are checkpoints, and none is sound.
          FormatError: it is of a format that cannot be read.
        """

        def latest() -> int:
            step = self._verified.latest(on_corrupt)
            return _NONE if step is None else step

        step = self._by_first_process(latest)
        if step == _NONE:
            return None
        self._verified.sound.add(step)  # verified by process 0, so the others need not read it
        return step

    def best(self) -> int | None:
        """Return the step with the lowest score, the newest if tied; None if none has a score."""
        return best(self._scores())

    def is_good(self, step: int) -> bool:
        """Return whether a step was saved with a score."""
        return self._score(step) is not None

    def last_good(self) -> int | None:
        """Return the newest sound step with a score; None if there is none."""

        def find() -> int:
            scores = self._scores()
            step = last_good(
                {each: scores[each] for each in scores if self._verified.is_sound(each)}
            )
            return _NONE if step is None else step

        step = self._by_first_process(find)
        return None if step == _NONE else step

    def remove_partial(self) -> None:
        """Remove leftovers of killed saves. Only for the holder of the run's lock.

        Raises:
          InputError: see `checkpoint_folder.remove_partial`.
        """
        checkpoint_folder.remove_partial(self.folder)

    def read_meta(self, step: int) -> dict[str, Any]:
        """Return the meta saved with a step, converted to the current format, without its arrays.

        Raises:
          CorruptCheckpointsError: the checkpoint is not sound.
          FormatError: it is of a format that cannot be read.
        """
        return self._verified.meta(step)

    def format_of(self, step: int) -> int:
        """Return the format in which a step was written.

        Raises:
          CorruptCheckpointsError: the checkpoint is not sound.
          FormatError: it is of a format that cannot be read.
        """
        return self._verified.readable(step)[1]["format"]

    def restore(
        self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct], *, part: bool = False
    ) -> dict[str, jax.Array]:
        """Return the arrays of a step with the shardings of `abstract`, on any mesh.

        Args:
          step: of a sound checkpoint.
          abstract: path -> target shape, dtype and sharding (None: the first device).
          part: `abstract` may omit arrays, which are then not read.

        Raises:
          InputError: its paths, shapes or dtypes differ from these; nothing is ever cast.
          CorruptCheckpointsError: the checkpoint is not sound.
          FormatError: it is of a format that cannot be read.
        """

        folder, manifest = self._verified.readable(step)
        stored = manifest["leaves"]
        if part:
            stored = {path: leaf for path, leaf in stored.items() if path in abstract}
        check_leaves(folder, stored, describe_leaves(abstract))
        arrays = self._files.restore(folder / "state", abstract)
        if part:
            return arrays
        if processes.count() == 1 and state_sha256(arrays) != manifest["state_sha256"]:
            raise CorruptCheckpointsError(
                str(folder), "", "arrays other than those saved", EXPECTED
            )
        return arrays

    def _try_to_write(
        self, step: int, arrays: Arrays, meta: str, score: float | None, provisional: bool
    ) -> None:
        try:
            self._write(step, arrays, meta, score)
            if not provisional:
                self._by_first_process(lambda: self._prune(step))
        except RunLockLostError as error:
            self._error = error  # what lies there may be another process's
        except Exception as error:
            # frees the space: a full disk is the likely reason
            shutil.rmtree(self.folder / f"{step}.partial", ignore_errors=True)
            if isinstance(error, CheckpointError):
                self._error = error
                return
            self._error = CheckpointError(
                f"checkpoint {step} could not be written to {self.folder}: {_reason(error)}"
            )
            self._error.__cause__ = error

    def _write(self, step: int, arrays: Arrays, meta: str, score: float | None) -> None:
        """Write and commit; pruning comes after, so that a kill at any moment is harmless."""
        partial = self.folder / f"{step}.partial"
        if self._by_first_process(lambda: step if self._verified.is_sound(step) else _NONE) == step:
            return
        crash_point("before_save")
        digest = state_sha256(arrays)
        self._by_first_process(lambda: self._begin(partial, meta))
        self._files.save(partial / "state", arrays)
        crash_point("after_arrays")

        def commit() -> int:
            number = current_format(self._migrations)
            write_manifest(partial, step, describe_leaves(arrays), digest, score, number)
            crash_point("after_manifest")
            self._check_lock()
            move_aside(self.folder, step)
            self._verified.corrupt.discard(step)
            rename_folder(partial, self.folder / str(step))
            crash_point("after_save")
            return step

        self._by_first_process(commit)
        self._verified.sound.add(step)

    def _begin(self, partial: Path, meta: str) -> int:
        self._check_lock()
        if checkpoint_folder.is_taken(partial):
            checkpoint_folder.remove(partial)
        partial.mkdir(parents=True)
        write_new(partial / "meta.json", meta.encode())
        return _NONE

    def _prune(self, step: int) -> int:
        """Remove older checkpoints, not counting corrupt ones (all newer ones are corrupt)."""
        self._check_lock()
        scores = {each: score for each, score in self._scores().items() if each <= step}
        self._verified.sound -= prune(self.folder, scores, self._keep, self._keep_best)
        return _NONE

    def _scores(self) -> dict[int, float | None]:
        """The score of every checkpoint not known to be corrupt."""
        return {
            step: self._score(step) for step in self.steps() if step not in self._verified.corrupt
        }

    def _score(self, step: int) -> float | None:
        try:
            return read_manifest(self.folder / str(step))["score"]
        except ValueError:
            return None

    def _by_first_process(self, action: Callable[[], int]) -> int:
        """Run the action on the first process; all return its result once it is done."""
        try:
            return processes.by_first(action)
        except processes.FirstProcessError:
            raise CheckpointError(
                f"process 0 failed on {self.folder}; see its own error message"
            ) from None


def _reason(error: BaseException) -> str:
    """The operating system's error, from our own writes or inside TensorStore's long message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if match := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(match[1]))
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
