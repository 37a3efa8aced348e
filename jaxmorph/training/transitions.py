"""What an operation does to the arrays of a run: from the state of one stage to that of the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmorph.config.run_shape import RunShape, scaled_count
from jaxmorph.config.settings import ModelConfig
from jaxmorph.growth.schedule import Entry
from jaxmorph.model import gpt
from jaxmorph.model.blocks import Gates, Params
from jaxmorph.model.precision import wide_dtype
from jaxmorph.morphs.gpt import MORPHS
from jaxmorph.morphs.transport import Report
from jaxmorph.step.schedules import restarted_warmup
from jaxmorph.step.state import TrainState

_MORPH_STREAM = 2**32 - 1  # no step has this number, so no dropout mask has a morph's key


def morphed(
    entry: Entry,
    before: ModelConfig,
    after: ModelConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
) -> tuple[TrainState, Report, jax.Array]:
    """Return the state after a morph, what became of each leaf, and whether all of it is finite.

    It can be jitted. What is random depends on the run's seed and the entry's place alone.

    Args:
      entry: the operation.
      before: the architecture it meets.
      after: the architecture the plan says it leads to.
      optimizer: of the architecture after.
      state: the state before; nothing of it is changed.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), _MORPH_STREAM)
    config, state, report = MORPHS[entry.name](
        before,
        state,
        optimizer,
        **({} if entry.value is None else {"value": entry.value}),
        key=jax.random.fold_in(key, entry.number),
        **entry.operation.with_defaults(entry.options),
    )
    assert config == after, (config, after)
    return state, report, _all_finite((state.params, state.opt_state))


def retuned(
    entry: Entry, before: RunShape, after: RunShape, state: TrainState, allow_past_end: bool
) -> TrainState:
    """Return the state after a hyperparameter operation: other knobs, the same arrays.

    Args:
      entry: the operation.
      before: the run's shape before it.
      after: the run's shape after it.
      state: the state before.
      allow_past_end: whether a warmup need not be over before training is.
    """
    knobs, gates, plateau, values = state.knobs, state.gates, state.plateau, {}
    step, total, start = (int(n) for n in (state.step, knobs.total_steps, knobs.schedule_start))
    warmup = int(knobs.warmup_steps)
    if entry.name == "reset_lr_schedule":
        values["schedule_start"] = start = step
        plateau = _anew(plateau)
    if entry.name == "change_warmup_iters":  # of the warmup there is: a restart may have cut it
        assert entry.value is not None
        warmup = scaled_count(warmup, entry.value)
    elif after.warmup_steps != before.warmup_steps:
        warmup = after.warmup_steps
    if not allow_past_end or start:
        warmup = restarted_warmup(warmup, start, total)
    values["warmup_steps"] = warmup
    if after.lr_multiplier != before.lr_multiplier:
        values["lr_multiplier"] = after.lr_multiplier
    if after.lora_alpha != before.lora_alpha:
        gates = gates | {"lora_alpha": _like(gates["lora_alpha"], after.lora_alpha)}
    changed = {name: _like(getattr(knobs, name), value) for name, value in values.items()}
    knobs = dataclasses.replace(knobs, **changed)
    return dataclasses.replace(state, gates=gates, knobs=knobs, plateau=plateau)


def _anew(plateau: Any) -> Any:
    """Return the state of reduce_on_plateau as it was before the first evaluation."""
    first = {"scale": 1, "best_value": np.inf} | dict.fromkeys(
        ("plateau_count", "cooldown_count", "count", "avg_value"), 0
    )
    return plateau._replace(**{n: _like(getattr(plateau, n), value) for n, value in first.items()})


def function_delta(
    before: ModelConfig,
    after: ModelConfig,
    old: tuple[Params, Gates],
    new: tuple[Params, Gates],
    tokens_BT: jax.Array,
) -> jax.Array:
    """Return how far a morph has moved the function: max |Δ logits| / RMS of the logits, in float32.

    Args:
      before: the architecture before.
      after: the architecture after.
      old: parameters and gates before.
      new: parameters and gates after.
      tokens_BT: probe tokens, no longer than either context.
    """
    logits = [
        gpt.forward(_in_float32(config), params, tokens_BT, gates=gates)
        for config, (params, gates) in ((before, old), (after, new))
    ]
    scale = jnp.sqrt(jnp.mean(jnp.square(logits[0])))
    return jnp.max(jnp.abs(logits[1] - logits[0])) / scale


def _in_float32(config: ModelConfig) -> ModelConfig:
    dtype = str(wide_dtype(jnp.dtype(config.dtype)))
    attention = "auto" if config.attention == "cudnn" else config.attention
    return dataclasses.replace(config, dtype=dtype, attention=attention)


def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def _like(leaf: jax.Array, value: float) -> jax.Array:
    # by NumPy: JAX would compile the conversion
    return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)
