"""Where a run stands, against every step of a schedule played through one after the other."""

import math

from schedule_entries import random_schedules, schedule_of, step_by_step

from jaxmorph.growth.triggers import due
from jaxmorph.training.position import Position


def _played(rows, curve, total, min_change):
    """What fires if the loop counts its position and asks for what is due as it does."""
    entries, losses, position, fired = schedule_of(rows), dict(curve), Position(), []
    newest = math.nan
    for step in range(total + 1):
        position = Position(**{**vars(position), "step": step})
        new_loss = losses.get(step)
        if new_loss is not None:
            newest, position = new_loss, position.evaluated(new_loss, min_change)
        while position.next_operation < len(entries):
            entry, last = entries[position.next_operation], position.last_operation_step
            reason = due(entry, step, last, new_loss, position.trend)
            if reason is None:
                break
            fired.append((step, reason, newest, step - last))
            position = position.after_operation()
            if entry.reevaluate:
                position = position.evaluated_again(newest)
            new_loss = position.val_loss
    return fired


def test_a_position_that_is_counted_gives_what_every_step_gives():
    for rows, curve, total, min_change in random_schedules(3000):
        expected = step_by_step(rows, curve, total, min_change)
        assert repr(_played(rows, curve, total, min_change)) == repr(expected), (rows, curve)
