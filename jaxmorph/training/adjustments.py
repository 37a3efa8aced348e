"""What a hyperparameter operation sets in a run's state: variables, but no other arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmorph.config.run_shape import RunShape, scaled_count
from jaxmorph.growth.schedule import Entry
from jaxmorph.step.schedules import restarted_warmup
from jaxmorph.step.state import OPEN_LOGIT, TrainState
from jaxmorph.system import processes
from jaxmorph.training.choice import mask_of

Adjustment = Callable[[Entry, TrainState], Mapping[str, Any]]


def _restart_schedule(entry: Entry, state: TrainState) -> dict[str, Any]:
    """Restart the learning rate at this step, and reset reduce_on_plateau."""
    first = {"scale": 1, "best_value": np.inf} | dict.fromkeys(
        ("plateau_count", "cooldown_count", "count", "avg_value"), 0
    )
    return {"schedule_start": int(state["step"]), "plateau": state["plateau"]._replace(**first)}


def _multiply_warmup(entry: Entry, state: TrainState) -> dict[str, Any]:
    """Multiply the current warmup, which a restart may have shortened."""
    assert isinstance(entry.value, float | int)
    return {"warmup_steps": scaled_count(int(state["warmup_steps"]), entry.value)}


def _set_gates(entry: Entry, state: TrainState, gate: float | None = None) -> dict[str, Any]:
    """Set the gates of the heads listed, or of all, and the logits from which the controller goes on."""
    assert isinstance(entry.value, float)
    gate = entry.value if gate is None else gate
    listed, shape = entry.options.get("heads"), state["head_gate"].shape
    heads = np.ones(shape, bool) if listed is None else mask_of(listed, shape)
    with np.errstate(divide="ignore"):
        logit = np.clip(np.log(gate) - np.log1p(-gate), -OPEN_LOGIT, OPEN_LOGIT)
    values = {"head_gate": gate, "head_logit": logit}
    return {n: np.where(heads, v, np.asarray(processes.whole(state[n]))) for n, v in values.items()}


ADJUSTMENTS: Mapping[str, Adjustment] = {
    "reset_lr_schedule": _restart_schedule,
    "change_warmup_iters": _multiply_warmup,
    "set_gates": _set_gates,
    "prune_heads": lambda entry, state: _set_gates(entry, state, gate=0.0),
}


def adjusted(
    entry: Entry,
    before: RunShape,
    after: RunShape,
    state: TrainState,
    adjustments: Mapping[str, Adjustment],
    *,
    allow_past_end: bool,
) -> TrainState:
    """Return the state after a hyperparameter operation.

    A variable named like a field of the run's shape follows that field.

    Args:
      entry: the operation.
      before: the run's shape before it.
      after: the run's shape after it.
      state: the state before.
      adjustments: what operations set beyond that, by operation name.
      allow_past_end: whether a warmup may outlast training.
    """
    fields = [f.name for f in dataclasses.fields(RunShape) if f.name in state.variables]
    changed = [name for name in fields if getattr(before, name) != getattr(after, name)]
    values: dict[str, Any] = {name: getattr(after, name) for name in changed}
    if (adjust := adjustments.get(entry.name)) is not None:
        values |= adjust(entry, state)
    start = int(values.get("schedule_start", state["schedule_start"]))
    if start or not allow_past_end:
        warmup = int(values.get("warmup_steps", state["warmup_steps"]))
        values["warmup_steps"] = restarted_warmup(warmup, start, int(state["total_steps"]))
    return with_values(state, values)


def with_values(state: TrainState, values: Mapping[str, Any]) -> TrainState:
    """Return the state with other values of some variables, placed as these are; compiles nothing."""
    return state.with_variables(
        **{name: jax.tree.map(_like, state[name], value) for name, value in values.items()}
    )


def _like(leaf: jax.Array, value: Any) -> jax.Array:
    # with NumPy: JAX would compile the conversion
    return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)
