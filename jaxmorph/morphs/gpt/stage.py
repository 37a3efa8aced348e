"""Shared by the built-in GPT's morphs: transport the whole state to another architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_axis_sizes, gpt_signatures
from jaxmorph.morphs.apply import apply
from jaxmorph.morphs.axis_map import AxisMap
from jaxmorph.morphs.change import Trained, by_map
from jaxmorph.morphs.report import Report
from jaxmorph.morphs.trained import trained
from jaxmorph.step.parts import Parts
from jaxmorph.step.state import TrainState


@dataclass(frozen=True)
class Transition:
    """From one architecture to another; the plan says which, the morph says how.

    Args:
      before: the architecture before.
      after: the architecture after.
      state: the state before; it is not modified.
      optimizer: for the architecture after.
      key: PRNG key for anything random.
      parts: declares the state's variables, and the optimizer fields that mirror no parameter.
      frozen_layers: layers that are not trained: before, and after.
      value: the operation's own, for what sizes do not say.
      heads: bool [layer, head], those that the operation acts on; None: on none in particular.
    """

    before: ModelConfig
    after: ModelConfig
    state: TrainState
    optimizer: optax.GradientTransformation
    key: jax.Array
    parts: Parts = field(default_factory=Parts)
    frozen_layers: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    value: Any = None
    heads: jax.Array | None = None

    def sizes(self, axis: str) -> tuple[int, int]:
        """Return the sizes of an axis before and after."""
        return gpt_axis_sizes(self.before)[axis], gpt_axis_sizes(self.after)[axis]


Morph = Callable[..., tuple[TrainState, Report]]  # of a Transition, with the operation's options


def morph_gpt(
    transition: Transition,
    maps: Sequence[AxisMap],
    *,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
) -> tuple[TrainState, Report]:
    """Return the state of the GPT after axes have changed, and a report on each leaf.

    Variables over layers and heads move with them; fresh entries get their declared initial values.

    Args:
      transition: the architectures, the state and the optimizer.
      maps: how axes change.
      moments: see `FreshStart`.
      fresh_nu: see `FreshStart`.
    """
    init_key, key = jax.random.split(transition.key)
    needed = any(change.is_fresh.any() for change in maps)
    fresh = gpt.init(transition.after, init_key) if needed else None
    state, parts = transition.state, transition.parts
    params, opt_state, report = apply(
        [
            *(by_map(each, fresh=fresh, moments=moments, fresh_nu=fresh_nu) for each in maps),
            *_trained_layers(transition),
        ],
        gpt_signatures(transition.after),
        state.params,
        state.opt_state,
        transition.optimizer,
        key=key,
        other={
            name: (state[name], each.axes)
            for name, each in parts.variables.items()
            if each.axes.axes
        },
        fields=parts.optimizer_fields,
    )
    state = TrainState(params, opt_state, {**state.variables, **report.other})
    return state, dataclasses.replace(report, other={})


def _trained_layers(transition: Transition) -> list[Trained]:
    """Return the change of the layers that the optimizer's state covers, if not all."""
    if not any(transition.frozen_layers):
        return []
    before, after = (
        [layer for layer in range(size) if layer not in frozen]
        for size, frozen in zip(transition.sizes("layer"), transition.frozen_layers, strict=True)
    )
    return [trained(before=before, after=after)]
