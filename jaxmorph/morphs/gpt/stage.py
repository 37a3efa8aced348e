"""What the built-in GPT's morphs share: its parameters, optimizer state and gates as one move."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxmorph.config.settings import ModelConfig
from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.model.blocks import Gates
from jaxmorph.morphs.axis_map import AxisMap
from jaxmorph.morphs.transport import Report, transport
from jaxmorph.step.state import Fading, TrainState

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
        fresh=gpt.init(config, init_key) if needed else None,
        key=key,
        moments=moments,
        fresh_nu=fresh_nu,
    )
    state = dataclasses.replace(
        state,
        params=params,
        opt_state=opt_state,
        gates=_moved_gates(state.gates, maps),
        fading=_moved_fading(state.fading, maps),
    )
    return state, report


def _moved_gates(gates: Gates, maps: Sequence[AxisMap]) -> Gates:
    moved = dict(gates)
    for change in maps:
        for name, axes in _GATE_AXES.items():
            if change.axis not in axes:
                continue
            moved[name] = _taken(moved[name], change, axes.index(change.axis), fresh=1)
    return moved


def _moved_fading(fading: Fading, maps: Sequence[AxisMap]) -> Fading:
    for change in maps:
        if change.axis == "layer":
            fading = jax.tree.map(lambda leaf, c=change: _taken(leaf, c, 0, fresh=0), fading)
    return fading


def _taken(leaf: jax.Array, change: AxisMap, axis: int, fresh: int) -> jax.Array:
    """Return a leaf with the entries that a map takes from it along an axis; fresh ones are given."""
    # One more entry at the end: what FRESH, -1, picks.
    padding = [(0, int(dimension == axis)) for dimension in range(leaf.ndim)]
    padded = jnp.pad(leaf, padding, constant_values=fresh)
    return jnp.take(padded, change.source % (change.old + 1), axis=axis)
