"""A run is a value: everything that training changes, as one pytree."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmorph.config.settings import ModelConfig, Settings
from jaxmorph.model import gpt
from jaxmorph.model.blocks import Gates, Params
from jaxmorph.model.precision import parameter_dtype
from jaxmorph.step.optimizer import plateau_transform


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Knobs:
    """Hyperparameters that can change while a run goes on; scalars, so no change recompiles."""

    lr_multiplier: jax.Array  # float
    schedule_start: jax.Array  # int32, the step at which the learning-rate schedule (re)started
    warmup_steps: jax.Array  # int32
    total_steps: jax.Array  # int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fading:
    """Layers whose gates open slowly: from 0 at step `start` to 1 after `steps` more, each [L] int32.

    0 steps: the gate stays as it is.
    """

    start: jax.Array
    steps: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a training step maps to its successor, and what a checkpoint holds."""

    step: jax.Array  # int32, optimizer steps taken, skipped ones included
    params: Params
    opt_state: optax.OptState
    gates: Gates
    fading: Fading
    knobs: Knobs
    plateau: Any  # optax's ReduceLROnPlateauState; its `scale` multiplies the learning rate
    skipped: jax.Array  # int32, updates skipped because loss or gradient was not finite
    skipped_in_a_row: jax.Array  # int32
    rng: jax.Array  # uint32 key data; dropout at a step depends on it and the step alone


def new_state(
    config: ModelConfig,
    settings: Settings,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    warmup_steps: int,
    total_steps: int,
) -> TrainState:
    """Return the state before the first step."""
    rng = jax.random.key(settings.run.seed)
    params = gpt.init(config, jax.random.fold_in(rng, 0))
    dtype = parameter_dtype(config)
    zero, no_layer = jnp.zeros((), jnp.int32), jnp.zeros(config.n_layers, jnp.int32)
    alpha = settings.model.lora_alpha * settings.growth.lora_alpha_multiplier
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(params),
        gates=gpt.open_gates(config) | {"lora_alpha": jnp.asarray(alpha, dtype)},
        fading=Fading(start=no_layer, steps=no_layer),
        knobs=Knobs(
            lr_multiplier=jnp.asarray(settings.growth.lr_multiplier, dtype),
            schedule_start=zero,
            warmup_steps=jnp.asarray(warmup_steps, jnp.int32),
            total_steps=jnp.asarray(total_steps, jnp.int32),
        ),
        plateau=plateau_transform(settings.optimizer).init({"": jnp.zeros((), dtype)}),
        skipped=zero,
        skipped_in_a_row=zero,
        rng=jax.random.key_data(jax.random.fold_in(rng, 1)),
    )


def opened(state: TrainState) -> TrainState:
    """Return the state with the gates of layers that fade in as its step has them."""
    fading, layer = state.fading, state.gates["layer"]
    passed = (state.step - fading.start).astype(layer.dtype)
    part = jnp.clip(passed / jnp.maximum(fading.steps, 1).astype(layer.dtype), 0, 1)
    gates = state.gates | {"layer": jnp.where(fading.steps > 0, part, layer)}
    return dataclasses.replace(state, gates=gates)
