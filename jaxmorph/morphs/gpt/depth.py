"""Deeper networks: layers repeated, added as the identity, or faded in.

Repeating trained layers works well although it changes the function: `stack` (Gong et al. 2019,
StackBERT; Du et al. 2024, G_stack, arXiv 2405.15319), `interleave` (Chang et al. 2018, arXiv
1710.10348), `middle` (Saunshi et al. 2024, MIDAS, arXiv 2409.19044). Two recipes are exact: `identity`,
blocks that add nothing yet (Wu et al. 2024, LLaMA Pro, arXiv 2401.02415), and `masked`, blocks behind
a gate that opens slowly (Yao et al. 2023, MSG, arXiv 2305.02869).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.morphs.axis_map import AxisMap, arranged, repeat
from jaxmorph.morphs.gpt.stage import Transition, morph_gpt
from jaxmorph.morphs.report import Report
from jaxmorph.step.heads import CLOSED, OPEN_GATE
from jaxmorph.step.state import TrainState

RECIPES = ("copy", "identity", "masked")
BLOCKS = ("copied", "fresh")


def stack_layers(
    transition: Transition,
    *,
    order: str = "stack",
    recipe: str = "copy",
    blocks: str = "copied",
    anneal_steps: int = 500,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
) -> tuple[TrainState, Report]:
    """Return the GPT with more layers, fresh ones if it has none.

    Args:
      transition: to an architecture with a larger n_layers, or the same; if its value is a tuple, it
        has the source of each layer.
      order: where the new layers go; see `axis_map.repeat`.
      recipe: `copy`: unchanged copies, which changes the function; `identity`: projections into the
        residual stream are zero, and open heads count as yet to open; `masked`: gates start at zero
        and open during training.
      blocks: whether the new layers are copied or fresh.
      anneal_steps: of `masked`: steps until the gates are open; 0: they stay closed.
      moments: see `FreshStart`.
      fresh_nu: see `FreshStart`.

    Raises:
      InputError: an unknown order, recipe or kind of blocks, or fewer layers.
    """
    for name, got, known in (("recipe", recipe, RECIPES), ("blocks", blocks, BLOCKS)):
        if got not in known:
            raise InputError(name, "", got, f"one of {', '.join(known)}{nearest(got, known)}")
    old, new = transition.sizes("layer")
    new_ones = {"fresh": blocks == "fresh", "silent": recipe == "identity"}
    if isinstance(transition.value, tuple):
        change = arranged("layer", old, transition.value, **new_ones)
    elif old == new:
        return morph_gpt(transition, [])
    else:
        change = repeat("layer", old, new, order=order, **new_ones)
    state, report = morph_gpt(transition, [change], moments=moments, fresh_nu=fresh_nu)
    if recipe == "masked":
        state = _faded_in(state, change, anneal_steps)
    if recipe == "identity":
        state = _yet_to_open(state, change)
    return state, report


def _yet_to_open(state: TrainState, change: AxisMap) -> TrainState:
    """Return the state with the open heads of silent layers yet to open, as the next update has it.

    Their gates are those of the heads they copy, and copies of closed heads stay closed.
    """
    gates, status = state["head_gate"], state["head_status"]
    opens = jnp.asarray(change.silent)[:, None] & (gates >= jnp.asarray(OPEN_GATE, gates.dtype))
    return state.with_variables(head_status=jnp.where(opens, CLOSED, status).astype(status.dtype))


def _faded_in(state: TrainState, change: AxisMap, steps: int) -> TrainState:
    """Return the state with the gates of new layers at zero, opening from this step on."""
    is_old = jnp.asarray(~(change.is_copy | change.is_fresh))

    def of_new(old: jax.Array, new: jax.Array | int) -> jax.Array:
        return jnp.where(is_old, old, jnp.asarray(new, old.dtype))

    return state.with_variables(
        layer_gate=of_new(state["layer_gate"], 0),
        fade_start=of_new(state["fade_start"], state["step"]),
        fade_steps=of_new(state["fade_steps"], steps),
    )
