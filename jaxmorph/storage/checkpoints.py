"""Checkpoints: a step's whole state in one folder, committed by one rename, sound or named corrupt.

A save writes `<step>.partial/`: `state/` (the arrays, by Orbax), `meta.json`, and last
`manifest.json`, with a digest of every file. Renaming that folder to `<step>` is the commit; older
checkpoints go only after it. Every checkpoint is compared with its manifest before it is read,
because Orbax restores changed bits without a word.

Arrays are a flat mapping of path to array; this module knows nothing of models.
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

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.array_files import ArrayFiles, copied_to_host
from jaxmorph.storage.manifest import (
    describe_leaves,
    problem_of,
    read_manifest,
    state_sha256,
    write_manifest,
)
from jaxmorph.storage.run_folder import sync_folder
from jaxmorph.system.crash_points import crash_point

if TYPE_CHECKING:
    import jax
    import numpy as np

    Arrays = Mapping[str, jax.Array | np.ndarray]

__all__ = ["CheckpointError", "Checkpoints", "CorruptCheckpointsError", "state_sha256"]

_EXPECTED = "a sound checkpoint; put one back from a copy, or start anew in another --run_dir"
_NONE, _FAILED = -1, -2  # what process 0 tells the others in place of a step


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the run's own state is as it was."""


class CorruptCheckpointsError(InputError):
    """There are checkpoints and not one of them is sound."""


def say_corrupt(step: int, problem: str) -> None:
    """Say on stderr that a checkpoint is passed over, and why."""
    print(f"checkpoint {step} is corrupt: {problem}", file=sys.stderr)


class Checkpoints:
    """The checkpoints of one run. Whoever writes must hold the run folder's lock.

    With several processes every method is called by all of them; process 0 writes and decides.

    Args:
      folder: where they are; made by the first save.
      keep: how many of the newest to keep, at least 1.
      keep_best: keep the one of the lowest score as well.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool):
        assert keep >= 1, keep
        self.folder = Path(folder).absolute()
        self._keep, self._keep_best = keep, keep_best
        self._sound: set[int] = set()  # written or verified by this process
        self._corrupt: set[int] = set()
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
    ) -> None:
        """Start to write a checkpoint; if there is a sound one of this step already, do nothing.

        On return `arrays` and `meta` have been copied: the caller may donate or change them. The
        rest goes on in a thread, or with several processes has been done.

        Args:
          step: its name.
          arrays: path -> array.
          meta: anything JSON can say.
          score: the lower the better, for `keep_best`; None or not finite: never the best.
          wait: return only when it is committed.

        Raises:
          CheckpointError: the save before this one failed, or this one where it was waited for.
        """
        import jax

        self.wait()
        text = json.dumps(meta, indent=1)
        if jax.process_count() > 1:
            self._try_to_write(step, arrays, text, score)  # all of them, in step
        elif not self._is_sound(step):
            arguments = (step, copied_to_host(arrays), text, score)
            # not a daemon: an interpreter that ends in an error still finishes the commit
            self._thread = threading.Thread(target=self._try_to_write, args=arguments)
            self._thread.start()
        if wait or self._thread is None:
            self.wait()

    def discard(self, step: int) -> None:
        """Remove the checkpoint of a step, so that another can take its place; older ones stay."""
        self.wait()
        shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def wait(self) -> None:
        """Wait until what was saved is committed.

        Raises:
          CheckpointError: it could not be written; the folder and the reason are named.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, then end Orbax's threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._files.close()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, sound or not, oldest first."""
        names = [each.name for each in self.folder.glob("*") if each.is_dir()]
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))

    def newest(self) -> int | None:
        """Return the newest step not known to be corrupt, without reading it; None if none."""
        return max(set(self.steps()) - self._corrupt, default=None)

    def latest_sound(self, on_corrupt: Callable[[int, str], None] = say_corrupt) -> int | None:
        """Return the newest step whose checkpoint is sound; None if there is no checkpoint at all.

        Args:
          on_corrupt: told of every newer one and what is wrong with it. They are left as they are.

        Raises:
          CorruptCheckpointsError: there are checkpoints, and none is sound.
        """
        step = self._by_first_process(lambda: self._find_latest_sound(on_corrupt))
        if step == _NONE:
            return None
        self._sound.add(step)  # process 0 has read it: the others need not
        return step

    def best(self) -> int | None:
        """Return the step of the lowest score, the newest of several; None if none has a score."""
        sound = [step for step in self.steps() if step not in self._corrupt]
        scores = {step: score for step in sound if (score := self._score(step)) is not None}
        return min(reversed(scores), key=scores.__getitem__, default=None)

    def remove_partial(self) -> None:
        """Remove what saves that were killed left behind. Only for the holder of the run's lock."""
        for leftover in self.folder.glob("*.partial"):
            shutil.rmtree(leftover)

    def read_meta(self, step: int) -> dict[str, Any]:
        """Return the meta saved with a step, without touching its arrays.

        Raises:
          CorruptCheckpointsError: the checkpoint is not sound.
        """
        self._require_sound(step)
        return json.loads((self.folder / str(step) / "meta.json").read_text())

    def restore(
        self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct], *, part: bool = False
    ) -> dict[str, jax.Array]:
        """Return the arrays of a step, placed as `abstract` says, on whatever mesh that is.

        Args:
          step: of a sound checkpoint.
          abstract: path -> shape, dtype and sharding (None: the first device) wanted.
          part: `abstract` may leave out arrays, which are then not read.

        Raises:
          InputError: it holds other paths, shapes or dtypes than these; nothing is ever cast.
          CorruptCheckpointsError: the checkpoint is not sound.
        """
        import jax

        self._require_sound(step)
        folder = self.folder / str(step)
        manifest = read_manifest(folder)
        stored = manifest["leaves"]
        if part:
            stored = {path: leaf for path, leaf in stored.items() if path in abstract}
        _check_leaves(folder, stored, describe_leaves(abstract))
        arrays = self._files.restore(folder / "state", abstract)
        if part:
            return arrays
        if jax.process_count() == 1 and state_sha256(arrays) != manifest["state_sha256"]:
            raise CorruptCheckpointsError(
                str(folder), "", "arrays other than those saved", _EXPECTED
            )
        return arrays

    def _try_to_write(self, step: int, arrays: Arrays, meta: str, score: float | None) -> None:
        try:
            self._write(step, arrays, meta, score)
        except Exception as error:
            # gives back the space: a full disk is the likely reason
            shutil.rmtree(self.folder / f"{step}.partial", ignore_errors=True)
            if isinstance(error, CheckpointError):
                self._error = error
                return
            self._error = CheckpointError(
                f"checkpoint {step} could not be written to {self.folder}: {_reason(error)}; "
                "earlier checkpoints are intact"
            )
            self._error.__cause__ = error

    def _write(self, step: int, arrays: Arrays, meta: str, score: float | None) -> None:
        """Write, commit and prune; the steps' order is what makes a kill at any moment harmless."""
        partial = self.folder / f"{step}.partial"
        if self._by_first_process(lambda: step if self._is_sound(step) else _NONE) == step:
            return
        crash_point("before_save")
        digest = state_sha256(arrays)
        self._by_first_process(lambda: self._begin(partial, meta))
        self._files.save(partial / "state", arrays)
        crash_point("after_arrays")

        def commit() -> int:
            write_manifest(partial, step, describe_leaves(arrays), digest, score)
            crash_point("after_manifest")
            self._move_aside(step)
            partial.rename(self.folder / str(step))
            sync_folder(self.folder)
            crash_point("after_save")
            return step

        self._by_first_process(commit)
        self._sound.add(step)
        self._by_first_process(lambda: self._prune(step))

    def _begin(self, partial: Path, meta: str) -> int:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        (partial / "meta.json").write_text(meta)
        return _NONE

    def _is_sound(self, step: int) -> bool:
        return (self.folder / str(step)).is_dir() and self._problem(step) is None

    def _problem(self, step: int) -> str | None:
        """What is wrong with a step's checkpoint; once found sound it is not read again."""
        if step in self._sound:
            return None
        problem = problem_of(self.folder / str(step))
        (self._corrupt if problem else self._sound).add(step)
        return problem

    def _require_sound(self, step: int) -> None:
        if problem := self._problem(step):
            raise CorruptCheckpointsError(str(self.folder / str(step)), "", problem, _EXPECTED)

    def _find_latest_sound(self, on_corrupt: Callable[[int, str], None]) -> int:
        problems = []
        self._sound.clear()
        self._corrupt.clear()
        for step in reversed(self.steps()):
            problem = self._problem(step)
            if problem is None:
                return step
            on_corrupt(step, problem)
            problems.append(f"{step}: {problem}")
        # one moved aside is followed by a sound one of its step, unless someone took that away
        problems += [f"{each.name}: moved aside" for each in self.folder.glob("*.corrupt*")]
        if not problems:
            return _NONE
        listed = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        got = f"all {len(problems)} checkpoints corrupt ({listed})"
        raise CorruptCheckpointsError(str(self.folder), "", got, _EXPECTED)

    def _move_aside(self, step: int) -> None:
        """Free the name of a step whose folder is corrupt, without destroying what is in it."""
        folder = self.folder / str(step)
        if not folder.exists():
            return
        aside, number = self.folder / f"{step}.corrupt", 1
        while aside.exists():
            number += 1
            aside = self.folder / f"{step}.corrupt{number}"
        folder.rename(aside)
        self._corrupt.discard(step)

    def _prune(self, step: int) -> int:
        """Remove older checkpoints, without counting corrupt ones (all that are newer are).

        Step 0, the state before the first update, always stays.
        """
        candidates = [each for each in self.steps() if each <= step and each not in self._corrupt]
        kept = {0, *candidates[-self._keep :]}
        if self._keep_best and (best := self.best()) is not None:
            kept.add(best)
        for each in set(candidates) - kept:
            # renamed first, so that a kill half-way leaves no checkpoint that looks corrupt
            partial = self.folder / f"{each}.partial"
            (self.folder / str(each)).rename(partial)
            shutil.rmtree(partial)
            self._sound.discard(each)
        return _NONE

    def _score(self, step: int) -> float | None:
        try:
            return read_manifest(self.folder / str(step))["score"]
        except ValueError:
            return None

    def _by_first_process(self, action: Callable[[], int]) -> int:
        """Have process 0 act alone; all return its answer, after it is done."""
        import jax

        if jax.process_count() == 1:
            return action()
        import numpy as np
        from jax.experimental import multihost_utils

        answer = _FAILED
        try:
            if jax.process_index() == 0:
                answer = action()
        finally:  # whatever happened to process 0, the others must not wait for it for ever
            answer = int(multihost_utils.broadcast_one_to_all(np.asarray(answer, np.int32)))
        if answer == _FAILED:
            raise CheckpointError(f"process 0 failed on {self.folder}; its own message says why")
        return answer


def _check_leaves(folder: Path, stored: dict[str, list], wanted: dict[str, list]) -> None:
    for path in sorted(set(stored) | set(wanted)):
        got, expected = stored.get(path), wanted.get(path)
        if got != expected:
            raise InputError(
                str(folder), path, _worded(got), f"{_worded(expected)}, as in this run"
            )


def _worded(leaf: list | None) -> str:
    return "no such array" if leaf is None else f"{leaf[0]} {tuple(leaf[1])}"


def _reason(error: BaseException) -> str:
    """What the system said, from our own writes or from inside TensorStore's long message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if match := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(match[1]))
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
