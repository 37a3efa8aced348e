"""What happens when an operation of the schedule fires: the change itself, and what is said of it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmorph.cli.wording import repeatable
from jaxmorph.growth.plan import Plan
from jaxmorph.growth.schedule import Entry, Stage
from jaxmorph.model.architecture import parameter_count
from jaxmorph.morphs import Report
from jaxmorph.step.sharding import place_batch
from jaxmorph.step.state import TrainState
from jaxmorph.system.crash_points import crash_point
from jaxmorph.training import transitions
from jaxmorph.training.resume import Position
from jaxmorph.training.stages import Change, StageCompiler

Reason = Literal["loss", "timeout"]


class OperationFailedError(RuntimeError):
    """An operation could not be done; the state it was to change is as it was."""


@dataclass(frozen=True)
class Performed:
    """An operation that has been done, before its re-evaluation.

    Args:
      entry: which.
      before: the stage it left.
      after: the stage it led to.
      position: where the run stood.
      reason: what set it off.
      report: what became of each leaf; empty for hyperparameters.
      function_delta: see `transitions.function_delta`; None for hyperparameters.
      seconds: it took, waiting for its programs included.
      waited: seconds of that spent waiting for its programs.
    """

    entry: Entry
    before: Stage
    after: Stage
    position: Position
    reason: Reason
    report: Report
    function_delta: float | None
    seconds: float
    waited: float

    def line(self, loss_after: float | None) -> dict[str, Any]:
        """Return its line of operations.jsonl.

        Args:
          loss_after: the validation loss measured right after it; None where it was not.
        """
        old, new = self.before.shape.model, self.after.shape.model
        return {
            "index": self.entry.number - 1,
            "name": self.entry.name,
            "value": self.entry.value,
            "step": self.position.step,
            "reason": self.reason,
            "trigger_loss": self.entry.trigger_loss,
            "val_loss_before": self.position.val_loss,
            "val_loss_after": loss_after,
            "model_before": dataclasses.asdict(old),
            "model_after": dataclasses.asdict(new),
            "params_before": parameter_count(old),
            "params_after": parameter_count(new),
            "moments": self.report.totals,
            "function_delta": self.function_delta,
            "seconds": self.seconds,
            "options": dict(self.entry.options),
            "errors": {path: float(error) for path, error in self.report.errors.items()},
            "compile_wait_seconds": self.waited,
        }


def perform(
    plan: Plan,
    compiler: StageCompiler,
    state: TrainState,
    position: Position,
    reason: Reason,
    probe_tokens: np.ndarray,
    allow_warmup_past_end: bool,
) -> tuple[TrainState, Performed]:
    """Return the state after the next operation of the plan, and what was done.

    The old state is neither changed nor given away before the new one is known to be sound.

    Args:
      plan: the run's.
      compiler: has the stages' programs.
      state: the run's state.
      position: where it stands; its `next_operation` is performed.
      reason: what set the operation off.
      probe_tokens: [rows, tokens] to compare the function on, at least as many as the probe needs.
      allow_warmup_past_end: see the setting.

    Raises:
      Exception: whatever hindered it: a lack of memory, a state that would not be finite.
    """
    crash_point("before_operation")
    index, start = position.next_operation, time.monotonic()
    entry, before, after = plan.entries[index], plan.stages[index], plan.stages[index + 1]
    compiler.programs(index + 1)  # before anything is changed: compiling them may fail
    change = compiler.change(index + 1) if entry.operation.kind == "morph" else None
    waited = time.monotonic() - start
    if change is not None:
        state, report, delta = _morphed(change, compiler.mesh, state, probe_tokens)
    else:
        report, delta = Report(()), None
        state = transitions.retuned(entry, before.shape, after.shape, state, allow_warmup_past_end)
    seconds = time.monotonic() - start
    crash_point("after_operation")
    return state, Performed(entry, before, after, position, reason, report, delta, seconds, waited)


def _morphed(
    change: Change, mesh: Mesh, state: TrainState, tokens_BT: np.ndarray
) -> tuple[TrainState, Report, float]:
    """Return the new state, what became of each leaf, and how far the function has moved."""
    new, report, finite = change.morph(state)
    crash_point("during_operation")
    if not bool(finite):
        raise ValueError("the new parameters or optimizer state would not be finite")
    rows, tokens = change.probe
    probe = place_batch(mesh, np.resize(tokens_BT[:, :tokens], (rows, tokens)))
    delta = change.function_delta((state.params, state.gates), (new.params, new.gates), probe)
    jax.block_until_ready(new)
    return new, report, float(delta)


def failure(entry: Entry, error: Exception) -> str:
    """Return what to say of an operation that could not be done."""
    words = str(error).strip().splitlines()
    cause = words[0] if words else type(error).__name__
    return f"operation {entry.number} of the schedule, {title(entry)}, could not be done: {cause}"


def title(entry: Entry) -> str:
    """Return an operation as "name value"."""
    return entry.name if entry.value is None else f"{entry.name} {repeatable(entry.value)}"


def announcement(done: Performed, operations: int) -> str:
    """Return the block that says an operation has been done.

    Args:
      done: the operation.
      operations: how many the schedule has.
    """
    entry, position = done.entry, done.position
    since = position.step - position.last_operation_step
    wait = "none" if entry.max_wait_iters is None else f"{entry.max_wait_iters:,}"
    loss = "none" if position.val_loss is None else f"{position.val_loss:.4f}"
    trigger = "none" if entry.trigger_loss is None else f"{entry.trigger_loss:g}"
    why = {"loss": "loss threshold", "timeout": "longest wait"}[done.reason]
    lines = [
        f"=== Operation {entry.number} of {operations} at step {position.step:,}: {title(entry)} ===",
        *([f"  {entry.desc}"] if entry.desc else []),
        f"  Trigger: {why} (validation loss {loss}, threshold {trigger}; "
        f"{since:,} steps since the last operation, longest wait {wait})",
    ]
    if done.function_delta is None:
        lines += [f"  {change}" for change in _settings_changed(done)]
    else:
        lines += [f"  Model: {change}" for change in _sizes_changed(done)]
        lines.append(f"  Moved: {done.report}")
        lines.append(f"  Function: max |Δ logits| / RMS of the logits {done.function_delta:.1e}")
    ready = "compiled ahead" if done.waited < 0.1 else f"compiled in {done.waited:.1f} s"
    took = f"{done.seconds:.2f} s" + (f", programs {ready}" if done.after.recompiles else "")
    return "\n".join([*lines, f"=== Done in {took} ==="])


def _sizes_changed(done: Performed) -> list[str]:
    old, new = done.before.shape.model, done.after.shape.model
    changes = [f"{name} {was} -> {now}" for name, was, now in _differences(old, new)]
    counts = parameter_count(old), parameter_count(new)
    return [*changes, f"parameters {counts[0]:,} -> {counts[1]:,}"] if changes else []


def _settings_changed(done: Performed) -> list[str]:
    differences = _differences(done.before.shape, done.after.shape)
    return [f"{name}: {was:g} -> {now:g}" for name, was, now in differences if name != "model"]


def _differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Return the fields in which two values of a dataclass differ: (name, old value, new value)."""
    names = [field.name for field in dataclasses.fields(old)]
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]
