"""Perform an operation of the schedule: return the next state and what the operation did."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmorph.cli.errors import FailedError
from jaxmorph.growth.plan import Stage
from jaxmorph.growth.schedule import Entry
from jaxmorph.growth.triggers import Reason
from jaxmorph.model.architecture import parameter_count
from jaxmorph.morphs import Report
from jaxmorph.step.sharding import mesh_shape, place_batch
from jaxmorph.step.state import TrainState
from jaxmorph.system import processes
from jaxmorph.system.crash_points import crash_point
from jaxmorph.training.adjustments import adjusted
from jaxmorph.training.choice import Measures, chosen_heads, mask_of, with_heads
from jaxmorph.training.head_meter import Head
from jaxmorph.training.position import Position
from jaxmorph.training.stages import Change, StageCompiler


class OperationFailedError(FailedError):
    """An operation could not be done; the state is unchanged."""


@dataclass(frozen=True)
class OperationResult:
    """A finished operation, before its re-evaluation.

    Args:
      before: the stage before it.
      after: the stage after it.
      position: the position of the run.
      reason: what triggered it.
      report: what happened to each leaf; empty for hyperparameters.
      function_delta: see `transitions.function_delta`; None for hyperparameters.
      heads: those it acted on; None if it does not act on heads.
      seconds: its duration, including the wait for its programs.
      waited: seconds of that spent waiting for its programs.
    """

    before: Stage
    after: Stage
    position: Position
    reason: Reason
    report: Report
    function_delta: float | None
    seconds: float
    waited: float
    heads: tuple[Head, ...] | None = None

    @property
    def entry(self) -> Entry:
        """Return the entry of the schedule."""
        assert self.after.entry is not None
        return self.after.entry

    def record(self, loss_after: float | None) -> dict[str, Any]:
        """Return its line of operations.jsonl.

        Args:
          loss_after: the validation loss measured right after it; None if it was not.
        """
        old, new = self.before.shape.model, self.after.shape.model
        return {
            "index": self.entry.number - 1,
            "name": self.entry.name,
            "value": self.entry.value,
            "step": self.position.step,
            "reason": self.reason,
            "trigger_loss": self.entry.trigger_loss,
            "trigger_plateau": self.entry.trigger_plateau,
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
            "heads": None if self.heads is None else [list(head) for head in self.heads],
            **({} if self.entry.decided is None else {"decided": self.entry.decided}),
        }


def perform(
    compiler: StageCompiler,
    state: TrainState,
    position: Position,
    reason: Reason,
    probe_tokens: np.ndarray,
    doing: Callable[[str], AbstractContextManager[None]] = nullcontext,
    measure: Callable[[], Measures] = dict,
) -> tuple[TrainState, OperationResult]:
    """Return the state after the next operation of the plan, and what the operation did.

    The old state is neither modified nor donated before the new one has been checked.

    Args:
      compiler: has the plan, which gets what the operation decides, and the stages' programs.
      state: the run's state.
      position: its position; its `next_operation` is performed.
      reason: what triggered the operation.
      probe_tokens: [rows, tokens] to compare the function on, at least as many as the probe needs.
      doing: shows what goes on within its context.
      measure: measures the heads of the state, for an operation that chooses by importance.

    Raises:
      Exception: the reason it failed, such as out of memory or a state that would not be finite.
    """
    crash_point("before_operation")
    index, start = position.next_operation, time.monotonic()
    decide(compiler, state, index)
    plan = compiler.plan
    before, after = plan.stages[index : index + 2]
    entry = after.entry
    assert entry is not None
    words = f"operation {entry.number}, {entry.title}"
    with doing(f"compiling for {words}"):  # before anything is changed, as it may fail
        compiler.programs(index + 1)
        change = compiler.change(index + 1) if entry.operation.kind == "morph" else None
    waited, heads = time.monotonic() - start, None
    if entry.operation.heads:
        heads = tuple(chosen_heads(entry, state, before.shape.closed.least_open, measure))
        entry = with_heads(entry, heads)
    with doing(words):
        if change is not None:
            state, report, delta = _morphed(change, compiler.mesh, state, probe_tokens, heads)
        else:
            report, delta = Report(()), None
            allow = plan.settings.optimizer.allow_warmup_past_end
            shapes, adjustments = (before.shape, after.shape), compiler.tables.adjustments
            state = adjusted(entry, *shapes, state, adjustments, allow_past_end=allow)
    times = time.monotonic() - start, waited
    crash_point("after_operation")
    return state, OperationResult(before, after, position, reason, report, delta, *times, heads)


def decide(compiler: StageCompiler, state: TrainState, index: int) -> None:
    """Decide what the entry after stage `index` has left open, if anything, and plan with that.

    Raises:
      InputError: a later entry cannot be applied after that; the plan stays as it was.
    """
    plan, entry = compiler.plan, compiler.plan.entries[index]
    if entry.operation.decision is None or entry.decided is not None:
        return
    reads = entry.operation.decision.reads
    values = {name: np.asarray(processes.whole(state[name])).tolist() for name in reads}
    shape, mesh = plan.stages[index].shape, mesh_shape(compiler.mesh)
    decided = entry.operation.decision.decide(values, shape, mesh)
    compiler.replan(plan.with_decisions({str(entry.number): decided}))


def _morphed(
    change: Change,
    mesh: Mesh,
    state: TrainState,
    tokens_BT: np.ndarray,
    heads: Sequence[Head] | None,
) -> tuple[TrainState, Report, float]:
    """Return the new state, what happened to each leaf, and how much the function changed."""
    acted_on = [] if heads is None else [mask_of(heads, state["head_gate"].shape)]
    new, report, finite = change.morph(state, *acted_on)
    crash_point("during_operation")
    if not bool(finite):
        raise ValueError("the new parameters or optimizer state would not be finite")
    rows, tokens = change.probe
    probe = place_batch(mesh, np.resize(tokens_BT[:, :tokens], (rows, tokens)))
    delta = change.function_delta(state, new, probe)
    jax.block_until_ready(new)
    for mask in acted_on:
        report = report.of_part(int(mask.sum()), mask.size)
    return new, report, float(delta)


def failure(entry: Entry, error: Exception) -> str:
    """Return the error message for an operation that could not be done."""
    words = str(error).strip().splitlines()
    cause = words[0].rstrip(".") if words else type(error).__name__
    return f"operation {entry.number} of the schedule, {entry.title}, could not be done: {cause}"
