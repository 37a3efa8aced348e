"""Apply a morph to the arrays of a run: from the state of one stage to that of the next."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.run_shape import RunShape
from jaxmorph.growth.schedule import Entry
from jaxmorph.model import gpt
from jaxmorph.model.precision import wide_dtype
from jaxmorph.morphs import Report
from jaxmorph.morphs.gpt import Morph, Transition
from jaxmorph.step.parts import Parts
from jaxmorph.step.state import TrainState, gates_of

_MORPH_STREAM = 2**32 - 1  # not a valid step, so no dropout mask shares a morph's key


@dataclass(frozen=True)
class Morphing:
    """A morph of the schedule, between two shapes of a run.

    Args:
      entry: the operation.
      before: the run's shape before it.
      after: the run's shape after it, according to the plan.
      morph: what the operation does to the arrays.
      parts: the components of a training step.
    """

    entry: Entry
    before: RunShape
    after: RunShape
    morph: Morph
    parts: Parts

    def __call__(
        self,
        state: TrainState,
        optimizer: optax.GradientTransformation,
        heads: jax.Array | None = None,
    ) -> tuple[TrainState, Report, jax.Array]:
        """Return the new state, what happened to each leaf, and whether all of it is finite.

        It can be jitted. Randomness depends only on the run's seed and the entry's position.

        Args:
          state: the state before; it is not modified.
          optimizer: for the shape after.
          heads: bool [layer, head], those that the operation acts on, if it does on some.
        """
        key = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), _MORPH_STREAM)
        entry = self.entry
        state, report = self.morph(
            Transition(
                before=self.before.model,
                after=self.after.model,
                state=state,
                optimizer=optimizer,
                key=jax.random.fold_in(key, entry.number),
                parts=self.parts,
                frozen_layers=(self.before.frozen_layers, self.after.frozen_layers),
                value=entry.value if entry.decided is None else entry.decided,
                heads=heads,
            ),
            **entry.operation.with_defaults(entry.options),
        )
        return state, report, _all_finite((state.params, state.opt_state))


def function_delta(
    before: ModelConfig,
    after: ModelConfig,
    old: TrainState,
    new: TrainState,
    tokens_BT: jax.Array,
) -> jax.Array:
    """Return how much a morph changed the function: max |Δ logits| / RMS of the logits, in float32.

    Args:
      before: the architecture before.
      after: the architecture after.
      old: the state before.
      new: the state after.
      tokens_BT: probe tokens, no longer than either context.
    """
    logits = [
        gpt.forward(
            _in_float32(config), state.params, tokens_BT, gates=gates_of(state.variables)
        ).logits
        for config, state in ((before, old), (after, new))
    ]
    scale = jnp.sqrt(jnp.mean(jnp.square(logits[0])))
    return jnp.max(jnp.abs(logits[1] - logits[0])) / scale


def _in_float32(config: ModelConfig) -> ModelConfig:
    """Return an architecture in float32 or wider, with its layers scanned.

    Unrolled, all layers' slices of the stacked weights would be in memory at once.
    """
    dtype = str(wide_dtype(jnp.dtype(config.dtype)))
    attention = "auto" if config.attention == "cudnn" else config.attention
    return dataclasses.replace(config, dtype=dtype, attention=attention, scan_layers="scan")


def _all_finite(tree: Any) -> jax.Array:
    """Return whether all entries are finite; the extremes tell, and need no mask in memory."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    extremes = [extreme(leaf) for leaf in floats if leaf.size for extreme in (jnp.min, jnp.max)]
    return jnp.all(jnp.isfinite(jnp.stack(extremes)))
