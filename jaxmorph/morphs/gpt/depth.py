"""Deeper networks: layers repeated, added as the identity, or faded in.

Repeating trained layers is a good start though it changes the function: `stack` (Gong et al. 2019,
StackBERT; Du et al. 2024, G_stack, arXiv 2405.15319), `interleave` (Chang et al. 2018, arXiv
1710.10348), `middle` (Saunshi et al. 2024, MIDAS, arXiv 2409.19044). Exact are `identity`, blocks that
add nothing yet (Wu et al. 2024, LLaMA Pro, arXiv 2401.02415), and `masked`, blocks behind a gate that
opens slowly (Yao et al. 2023, MSG, arXiv 2305.02869).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.config.run_shape import LARGEST_COUNT, OperationError, scaled_size
from jaxmorph.config.settings import ModelConfig
from jaxmorph.morphs.axis_map import AxisMap, repeat
from jaxmorph.morphs.gpt.stage import morph_gpt
from jaxmorph.morphs.transport import Report
from jaxmorph.step.state import Fading, TrainState

RECIPES = ("copy", "identity", "masked")
BLOCKS = ("copied", "fresh")


def stack_layers(
    config: ModelConfig,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    value: float,
    key: jax.Array,
    order: str = "stack",
    recipe: str = "copy",
    blocks: str = "copied",
    anneal_steps: int = 500,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
) -> tuple[ModelConfig, TrainState, Report]:
    """Return the GPT with `value` times the layers; with `value` fresh ones where it has none.

    Args:
      config: the architecture before.
      state: its state.
      optimizer: makes the optimizer's state.
      value: a factor > 1 that gives a whole n_layers; from 0 layers their number.
      key: PRNG key.
      order: where the new layers go; see `axis_map.repeat`.
      recipe: `copy`: as they are, which changes the function; `identity`: what they add to the residual
        stream is zero; `masked`: their gates are zero, and open while training goes on.
      blocks: whether the new layers are copied or fresh.
      anneal_steps: of `masked`: steps until the gates are open; 0: they stay as they are.
      moments: see `transport`.
      fresh_nu: see `transport`.

    Raises:
      OperationError: a factor that does not give a larger whole number; names those near it that do.
      InputError: an unknown order, recipe or kind of blocks.
    """
    for name, got, known in (("recipe", recipe, RECIPES), ("blocks", blocks, BLOCKS)):
        if got not in known:
            raise InputError(name, "", got, f"one of {', '.join(known)}{nearest(got, known)}")
    old, new = config.n_layers, _layers_after(config.n_layers, value)
    change = repeat(
        "layer", old, new, order=order, fresh=blocks == "fresh", silent=recipe == "identity"
    )
    config = dataclasses.replace(config, n_layers=new)
    state, report = morph_gpt(
        config, state, optimizer, [change], key=key, moments=moments, fresh_nu=fresh_nu
    )
    if recipe == "masked":
        state = _faded_in(state, change, anneal_steps)
    return config, state, report


def _layers_after(layers: int, value: float) -> int:
    if layers:
        return scaled_size("n_layers", layers, value, least=layers + 1, most=LARGEST_COUNT)
    if value != int(value) or value < 1:
        raise OperationError(value, "a whole number of layers, as there are none to multiply")
    return int(value)


def _faded_in(state: TrainState, change: AxisMap, steps: int) -> TrainState:
    """Return the state with the gates of new layers at zero, to open from this step on."""
    is_old = jnp.asarray(~(change.is_copy | change.is_fresh))

    def of_new(old: jax.Array, new: jax.Array | int) -> jax.Array:
        return jnp.where(is_old, old, jnp.asarray(new, old.dtype))

    gates = {**state.gates, "layer": of_new(state.gates["layer"], 0)}
    fading = Fading(of_new(state.fading.start, state.step), of_new(state.fading.steps, steps))
    return dataclasses.replace(state, gates=gates, fading=fading)
