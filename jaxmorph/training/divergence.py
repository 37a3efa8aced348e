"""What is left of a run that diverged: the checkpoint it can go on from, and how."""

from __future__ import annotations

import shlex
from pathlib import Path

from jaxmorph.growth.operations import OPERATIONS
from jaxmorph.growth.schedule import Entry, schedule_json
from jaxmorph.system import processes
from jaxmorph.system.files import replace_text
from jaxmorph.training.preparation import Setup
from jaxmorph.training.resume import CheckpointRecord

_FACTOR = 0.5  # of the learning rate, in the schedule that is offered


def after_divergence(setup: Setup) -> str:
    """Set the checkpoints after the last good one aside; return where and how the run can go on.

    The same command then goes on from the last good one, where it can only diverge again. Hence a
    schedule is written into the run folder that lowers the learning rate there first.
    """
    again = (
        "start again with a lower --learning_rate or a longer --warmup_steps in another --run_dir"
    )
    checkpoints = setup.checkpoints
    good = checkpoints.last_good()
    if good is None:
        return f"No checkpoint was saved at a finite loss; {again}"
    aside = checkpoints.set_aside(good)
    file = _path(setup, processes.by_first(lambda: _write_schedule(setup, good)))
    renamed = (
        f" (later ones are now {', '.join(f'{step}.diverged' for step in aside)})" if aside else ""
    )
    return (
        f"The last good checkpoint is {checkpoints.folder / str(good)}: its update and its loss are "
        f"finite{renamed}. The same command goes on from there, and will diverge again unless "
        f"something differs; with --scaling_schedule_file {shlex.quote(str(file))} "
        "--allow_schedule_change it goes on from there "
        f"at {_FACTOR:g} × the learning rate. Or {again}"
    )


def _write_schedule(setup: Setup, good: int) -> int:
    """Write the run's schedule with a lower learning rate at step `good`; return the file's number."""
    meta = setup.checkpoints.read_meta(good)
    fired = CheckpointRecord.from_meta(meta).position.next_operation
    entries = setup.plan.entries
    # Below 1e9 is any loss, so that it fires where the run goes on.
    lower = Entry(OPERATIONS["change_lr"], _FACTOR, 1e9, 1, False, desc=f"Diverged after {good}.")
    text, number = schedule_json([*entries[:fired], lower, *entries[fired:]]), 1
    # Never replaced by another: the run may be following one of them.
    while (path := _path(setup, number)).exists() and path.read_text("utf-8") != text:
        number += 1
    replace_text(path, text)
    return number


def _path(setup: Setup, number: int) -> Path:
    return setup.run_dir / f"lower_learning_rate{number}.json"
