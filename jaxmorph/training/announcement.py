"""The message printed after an operation."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmorph.cli.printing import named
from jaxmorph.model.architecture import parameter_count
from jaxmorph.training.operate import OperationResult

_REASONS = {
    "loss": "loss threshold",
    "plateau": "no more improvement",
    "timeout": "longest wait",
}


def announcement(done: OperationResult, operations: int) -> str:
    """Return the message about a finished operation.

    Args:
      done: the operation.
      operations: the number of operations in the schedule.
    """
    entry, position = done.entry, done.position
    lines = [
        f"=== Operation {entry.number} of {operations} at step {position.step:,}: {entry.title} ===",
        *([f"  {named(entry.desc)}"] if entry.desc else []),
        f"  Trigger: {_trigger(done)}",
    ]
    lines += [f"  Warning: {w}" for w in done.after.warnings if w not in entry.warnings]
    lines += [f"  {change}" for change in _settings_changed(done)]
    lines += [f"  {heads}" for heads in _heads_changed(done)]
    lines += [f"  Model: {change}" for change in _sizes_changed(done)]
    if done.function_delta is not None:
        lines.append(f"  Moved: {done.report}")
        lines.append(f"  Function: max |Δ logits| / RMS of the logits {done.function_delta:.1e}")
    ready = "compiled ahead" if done.waited < 0.1 else f"compiled in {done.waited:.1f} s"
    took = f"{done.seconds:.2f} s" + (f", programs {ready}" if done.after.recompiles else "")
    return "\n".join([*lines, f"=== Done in {took}; stage {done.after.number} ==="])


def _trigger(done: OperationResult) -> str:
    """Return what triggered the operation, next to what could have."""
    entry, position = done.entry, done.position
    since = position.step - position.last_operation_step
    wait = "none" if entry.max_wait_iters is None else f"{entry.max_wait_iters:,}"
    loss = "none" if position.val_loss is None else f"{position.val_loss:.4f}"
    threshold = "none" if entry.trigger_loss is None else f"{entry.trigger_loss:g}"
    facts = f"validation loss {loss}, threshold {threshold}; "
    if entry.trigger_plateau is not None:
        facts += f"{position.trend.evaluations} of {entry.trigger_plateau} evaluations "
        facts += "without improvement; "
    facts += f"{since:,} steps since the last operation, longest wait {wait}"
    return f"{_REASONS[done.reason]} ({facts})"


def _sizes_changed(done: OperationResult) -> list[str]:
    old, new = done.before.shape.model, done.after.shape.model
    changes = [f"{name} {was} -> {now}" for name, was, now in _differences(old, new)]
    counts = parameter_count(old), parameter_count(new)
    return [*changes, f"parameters {counts[0]:,} -> {counts[1]:,}"] if changes else []


def _settings_changed(done: OperationResult) -> list[str]:
    differences = _differences(done.before.shape, done.after.shape)
    written = [(name, _written(was), _written(now)) for name, was, now in differences]
    return [
        f"{name}: {was} -> {now}" for name, was, now in written if name not in ("model", "closed")
    ]


def _heads_changed(done: OperationResult) -> list[str]:
    if done.heads is None:
        return []
    of_all = f"{len(done.heads)} of {done.after.shape.n_heads}"
    does = {"any": f"gate {done.entry.value:g} for", "open": "closed", "closed": "opened"}
    return [f"Heads: {does[done.entry.operation.heads]} {of_all}"]


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Return the fields in which two values of a dataclass differ: (name, old value, new value)."""
    names = [field.name for field in dataclasses.fields(old)]
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]
