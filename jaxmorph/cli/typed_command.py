"""The command line that started this process, as a user can type it again."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence


def typed_command(words: Sequence[str], module: str) -> str:
    """Return the command to type again, quoted for a shell.

    Args:
      words: the arguments that the command was called with, after its name.
      module: what `python -m` runs, named when the arguments are not the process's own (a program
        called the command with others).
    """
    before = len(sys.argv) - len(words)
    if before < 1 or sys.argv[before:] != list(words):
        return shlex.join(["python", "-m", module, *words])
    script = sys.argv[0]
    if sys.orig_argv[1:2] == [script] and shutil.which(os.path.basename(script)) == script:
        return shlex.join([os.path.basename(script), *sys.argv[1:]])  # an installed command
    return shlex.join(sys.orig_argv)
