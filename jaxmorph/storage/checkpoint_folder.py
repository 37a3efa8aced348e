"""The folder of a run's checkpoints: which names in it are the run's, and how they come and go.

    STEP            a committed checkpoint: a folder, or a link to one
    STEP.partial    what a save or a removal has not finished: a folder, or a link
    STEP.corrupt    a damaged checkpoint that was in the way of a new one; also STEP.corrupt2, ...

Everything else there is someone else's and stays. Links are removed without what they point to.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from jaxmorph.cli.errors import InputError
from jaxmorph.system.files import rename_folder

_STEP = r"0|[1-9][0-9]*"


def make_folder(folder: Path) -> None:
    """Create the folder, unless it is there.

    Raises:
      InputError: it cannot be made, or is a link: the lock of the run folder would not guard it.
    """
    if folder.is_symlink():
        expected = (
            "a folder, which only this run writes to; make the whole run folder a link instead"
        )
        raise InputError(str(folder), "", "a link", expected)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise InputError(str(folder), "", "a file", "a folder, or nothing of that name") from None
    except OSError as error:
        expected = f"a folder that can be made ({error.strerror})"
        raise InputError(str(folder), "", None, expected) from error


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, sound or not, oldest first."""
    names = [each.name for each in folder.glob("*") if each.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch(_STEP, name))


def remove_partial(folder: Path) -> None:
    """Remove what killed saves and removals have left.

    Raises:
      InputError: one is a file, which no save has made, or cannot be removed.
    """
    found = [each for each in folder.glob("*.partial") if re.fullmatch(_STEP, each.stem)]
    for each in found:
        if not each.is_dir() and not each.is_symlink():
            expected = "a folder that a save left unfinished, or nothing; move it away"
            raise InputError(str(each), "", "a file", expected)
    for each in found:
        try:
            remove(each)
        except OSError as error:
            expected = f"what a save left unfinished, which can be removed ({error.strerror})"
            raise InputError(str(each), "", None, expected) from error


def remove(path: Path) -> None:
    """Remove a folder with its contents, or a link without what it points to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def is_taken(path: Path) -> bool:
    """Return whether there is anything of that name, be it a link to nothing."""
    return path.is_symlink() or path.exists()


def move_aside(folder: Path, step: int) -> None:
    """Free the name of a step, without deleting what has it."""
    taken = folder / str(step)
    if not is_taken(taken):
        return
    aside, number = folder / f"{step}.corrupt", 1
    while is_taken(aside):
        number += 1
        aside = folder / f"{step}.corrupt{number}"
    rename_folder(taken, aside)
