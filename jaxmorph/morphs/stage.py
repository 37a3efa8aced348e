"""What the built-in GPT's morphs share: its parameters, optimizer state and gates as one move."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxmorph import model
from jaxmorph.architecture import gpt_signatures
from jaxmorph.blocks import Gates
from jaxmorph.config import ModelConfig
from jaxmorph.morphs.axis_map import AxisMap
from jaxmorph.morphs.transport import Report, transport
from jaxmorph.state import TrainState

_GATE_AXES = {"layer": ("layer",), "head": ("layer", "head"), "lora_alpha": ()}


def morph_gpt(
    config: ModelConfig,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    maps: Sequence[AxisMap],
    *,
    key: jax.Array,
    moments: str,
    fresh_nu: float,
) -> tuple[TrainState, Report]:
    """Return the state of the GPT after axes have changed, and what became of each leaf.

    Gates follow the layers and heads they belong to; those of fresh ones are open.

    Args:
      config: the architecture after.
      state: the state before.
      optimizer: makes the optimizer's state.
      maps: how axes change.
      key: PRNG key of what is random.
      moments: see `transport`.
      fresh_nu: see `transport`.
    """
    init_key, key = jax.random.split(key)
    needed = any(change.is_fresh.any() for change in maps)
    params, opt_state, report = transport(
        gpt_signatures(config),
        maps,
        state.params,
        state.opt_state,
        optimizer,
        fresh=model.init(config, init_key) if needed else None,
        key=key,
        moments=moments,
        fresh_nu=fresh_nu,
    )
    gates = _moved_gates(state.gates, maps)
    return dataclasses.replace(state, params=params, opt_state=opt_state, gates=gates), report


def _moved_gates(gates: Gates, maps: Sequence[AxisMap]) -> Gates:
    moved = dict(gates)
    for change in maps:
        for name, axes in _GATE_AXES.items():
            if change.axis not in axes:
                continue
            # One more entry, an open gate, at the end: what FRESH, -1, picks.
            gate, at = moved[name], axes.index(change.axis)
            padding = [(0, int(dimension == at)) for dimension in range(gate.ndim)]
            padded = jnp.pad(gate, padding, constant_values=1)
            moved[name] = jnp.take(padded, change.source % (change.old + 1), axis=at)
    return moved
