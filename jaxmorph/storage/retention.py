"""Which checkpoints stay when a new one is committed, and what happens to the others.

A checkpoint's *score* is the validation loss it was saved at. It has none if its last update was
skipped or its loss was not finite. Those with a score are the *good* ones: a run that has diverged
can go on from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmorph.storage import checkpoint_folder
from jaxmorph.storage.checkpoint_folder import is_taken
from jaxmorph.system.files import rename_folder

Scores = Mapping[int, float | None]  # by step


def best(scores: Scores) -> int | None:
    """Return the step with the lowest score, the newest if tied; None if none has a score."""
    found = {step: score for step, score in scores.items() if score is not None}
    return min(sorted(found, reverse=True), key=found.__getitem__, default=None)


def last_good(scores: Scores) -> int | None:
    """Return the newest step with a score; None if none has one."""
    return max((step for step, score in scores.items() if score is not None), default=None)


def kept(scores: Scores, keep: int, keep_best: bool) -> set[int]:
    """Return the steps to keep: step 0, the newest, the newest good one, and maybe the best.

    The newest good one stays however many worse ones follow: a run that diverges goes on from it.

    Args:
      scores: of all checkpoints.
      keep: how many of the newest to keep.
      keep_best: whether to keep the best.
    """
    chosen = {0, *sorted(scores)[-keep:], last_good(scores)}
    chosen |= {best(scores)} if keep_best else set()
    return {step for step in chosen if step in scores}


def prune(folder: Path, scores: Scores, keep: int, keep_best: bool) -> set[int]:
    """Remove the checkpoints that are not `kept`; return their steps.

    Those set aside are removed once there is a good one of their step or a later one.
    """
    removed = set(scores) - kept(scores, keep, keep_best)
    for step in removed:
        remove(folder, step)
    good = last_good(scores)
    for aside in folder.glob("*.diverged"):
        if good is not None and aside.stem.isdigit() and int(aside.stem) <= good:
            checkpoint_folder.remove(aside)
    return removed


def remove(folder: Path, step: int) -> int:
    """Remove a step's checkpoint, if there is one; return the step.

    It is renamed first, so that a kill midway leaves no checkpoint that looks corrupt.
    """
    partial = folder / f"{step}.partial"
    if is_taken(folder / str(step)):
        rename_folder(folder / str(step), partial)
        checkpoint_folder.remove(partial)
    return step


def set_aside(folder: Path, steps: Sequence[int]) -> int:
    """Rename checkpoints to STEP.diverged, in place of older ones of that name; return how many."""
    for step in steps:
        aside = folder / f"{step}.diverged"
        if is_taken(aside):
            checkpoint_folder.remove(aside)
        rename_folder(folder / str(step), aside)
    return len(steps)
