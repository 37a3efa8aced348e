"""Named points at which a test can kill a run: one hook, inert unless the environment asks.

`JAXMORPH_CRASH_AT=after_arrays` kills the process when it first reaches that point,
`JAXMORPH_CRASH_AT=step:3` the third time. The signal is SIGKILL: nothing is flushed and no
handler runs, as when the machine dies.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

from jaxmorph.cli.errors import InputError, nearest

VARIABLE = "JAXMORPH_CRASH_AT"
POINTS = (
    "step",  # the loop, once per step
    "before_save",  # a checkpoint is due, nothing is on disk yet
    "during_save",  # its arrays are being written
    "after_arrays",  # arrays are complete, no manifest yet
    "after_manifest",  # manifest is complete, not yet renamed, so not committed
    "after_save",  # committed, older checkpoints not yet pruned
    "evaluation",  # in the middle of an evaluation
    "controller_update",  # the controller has decided, no gate is set yet
    "compiling",  # the next stage's step is compiled, the morph to it is not
    "before_operation",  # an operation is due, nothing is done yet
    "during_operation",  # the new state is computed, not yet compared with the old one
    "after_operation",  # the run uses the new state, nothing is written yet
    "reevaluation",  # evaluating right after an operation
    "operation_recorded",  # its line is written
    "first_step",  # the first update after an operation is computed
)

# how often this process has passed the point named in the variable; empty in a normal run
_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Kill this process with SIGKILL if the environment names this point, else do nothing.

    Raises:
      InputError: the variable is set and does not name a point.
    """
    assert name in POINTS, name
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    point, passing = _parse(wanted)
    if name != point:
        return
    _passed[name] += 1
    if _passed[name] == passing:
        os.kill(os.getpid(), signal.SIGKILL)


def _parse(wanted: str) -> tuple[str, int]:
    point, colon, count = wanted.partition(":")
    if point not in POINTS:
        expected = f"one of {', '.join(POINTS)}{nearest(point, POINTS)}"
        raise InputError(VARIABLE, "", wanted, expected)
    if colon and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise InputError(VARIABLE, "", wanted, f"a count from 1 after the colon, as in {point}:3")
    return point, int(count) if colon else 1
