"""What is said when a run ends: how to go on, and what is left of its schedule."""

from __future__ import annotations

import json

from jaxmorph.growth.schedule import Entry
from jaxmorph.report.waiting import WAITING
from jaxmorph.system.files import replace_text
from jaxmorph.system.signals import StopSignals
from jaxmorph.training.position import Position
from jaxmorph.training.preparation import Setup


def is_finished(setup: Setup, position: Position) -> bool:
    """Return whether nothing is left to do: neither a step nor an operation that failed."""
    return position.step >= setup.total_steps and position.pending is None


def ending(setup: Setup, position: Position, signals: StopSignals) -> list[str]:
    """Return the lines to print when a run ends whose last checkpoint is committed.

    Args:
      setup: what is constant during the run.
      position: its last position.
      signals: whether one of them stopped it.
    """
    if signals.received is not None and not is_finished(setup, position):
        return stopped(signals.name, position.step, setup.total_steps, setup.command)
    return not_fired(setup, position)


def stopped(signal: str, step: int, total: int, command: str) -> list[str]:
    """Return the lines about a run stopped by a signal, saved at `step`, and how to go on."""
    where = f"at step {step} of {total}; checkpoint {step} is saved"
    return [f"Stopped by {signal} {where}. To go on:", f"  {command}"]


def not_fired(setup: Setup, position: Position) -> list[str]:
    """Return the lines about the operations that have not fired; none if all have."""
    entries = setup.plan.entries
    left = len(entries) - position.next_operation
    if not left:
        return []
    count = f"{left} of {len(entries)} operations {'has' if left == 1 else 'have'}"
    lines = [
        f"  {number}: {operation} waits for {reason}"
        for number, operation, reason in _waiting(setup, position)
    ]
    return [f"The run ended before its schedule: {count} not fired.", *lines]


def record_waiting(setup: Setup, position: Position) -> None:
    """Write the operations that have not fired, and what they wait for, for the report."""
    path = setup.run_dir / WAITING
    if not setup.plan.entries:
        path.unlink(missing_ok=True)
        return
    rows = [
        {"number": number, "operation": operation, "waits_for": reason}
        for number, operation, reason in _waiting(setup, position)
    ]
    content = {"step": position.step, "operations": rows}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    replace_text(path, f"{text}\n")


def _waiting(setup: Setup, position: Position) -> list[tuple[int, str, str]]:
    """Return (number, operation, what it waits for) of the entries that have not fired."""
    entries, first = setup.plan.entries, position.next_operation
    return [
        (
            entry.number,
            entry.title,
            _triggers(setup, position, entry, is_next=entry is entries[first]),
        )
        for entry in entries[first:]
    ]


def _triggers(setup: Setup, position: Position, entry: Entry, *, is_next: bool) -> str:
    """Return the triggers of an entry, and how far they are; those after the next have not begun."""
    task = setup.tables.step.task
    metric = task.metric(f"val/{task.loss}")
    newest = "none yet" if position.val_loss is None else metric.written(position.val_loss)
    waited = position.step - position.last_operation_step
    parts = []
    if entry.trigger_loss is not None:
        parts.append(f"{metric.label} below {entry.trigger_loss:g} (now {newest})")
    if entry.trigger_plateau is not None:
        so_far = f" (now {position.trend.evaluations})" if is_next else ""
        parts.append(f"{entry.trigger_plateau} evaluations without improvement{so_far}")
    if entry.max_wait_iters is not None:
        since = f"operation {entry.number - 1}" if entry.number > 1 else "the start"
        so_far = f" (now {waited:,})" if is_next else ""
        parts.append(f"{entry.max_wait_iters:,} steps since {since}{so_far}")
    before = "" if is_next else f"operation {entry.number - 1}, then "
    return before + " or ".join(parts)
