"""Wider networks: MLP units, heads and the residual stream.

A copied unit shares what it gives with the unit it copies (Chen et al. 2015, Net2Net, arXiv
1511.05641), which leaves the function as it is; so does a fresh unit that gives nothing yet (Gesmundo
& Maile 2023, arXiv 2308.06103). Even shares leave copies equal for ever: `split` draws the share of
every weight (after Wang et al. 2023, LEMON, arXiv 2310.07999). The residual stream is duplicated
whole, in even shares, so that its normalisations see what they saw (Chen et al. 2021, bert2BERT, arXiv
2110.07143).
"""

from __future__ import annotations

import dataclasses

import jax
import optax

from jaxmorph.cli.errors import InputError
from jaxmorph.config.run_shape import LARGEST_COUNT, OperationError, scaled_size
from jaxmorph.config.settings import ModelConfig
from jaxmorph.morphs.axis_map import duplicate
from jaxmorph.morphs.gpt.stage import morph_gpt
from jaxmorph.morphs.transport import Report
from jaxmorph.morphs.widen import widening
from jaxmorph.step.state import TrainState

RECIPES = ("split", "even", "noise", "fresh")


def widen_mlp(
    config: ModelConfig,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    value: float,
    key: jax.Array,
    recipe: str = "split",
    spread: float = 1.0,
    noise: float = 0.01,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
) -> tuple[ModelConfig, TrainState, Report]:
    """Return the GPT with `value` times the width of every MLP. Exact but for recipe `noise`.

    Args:
      config: the architecture before.
      state: its state.
      optimizer: makes the optimizer's state.
      value: a factor > 1 that gives a whole d_ff.
      key: PRNG key.
      recipe: see `widening`.
      spread: see `widening`.
      noise: see `widening`.
      moments: see `transport`.
      fresh_nu: see `transport`.

    Raises:
      OperationError: a factor that does not give a larger whole number; names those near it that do.
    """
    new = scaled_size("d_ff", config.d_ff, value, least=config.d_ff + 1, most=LARGEST_COUNT)
    change = widening("mlp", config.d_ff, new, recipe, spread=spread, noise=noise)
    config = dataclasses.replace(config, d_ff=new)
    state, report = morph_gpt(
        config, state, optimizer, [change], key=key, moments=moments, fresh_nu=fresh_nu
    )
    return config, state, report


def widen_heads(
    config: ModelConfig,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    value: float,
    key: jax.Array,
    recipe: str = "split",
    spread: float = 1.0,
    noise: float = 0.01,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
) -> tuple[ModelConfig, TrainState, Report]:
    """Return the GPT with `value` times the heads, each as wide as before. Exact but for `noise`.

    A copied head has the gate of the head it copies; a fresh one's is open.

    Args:
      config: the architecture before.
      state: its state.
      optimizer: makes the optimizer's state.
      value: a factor > 1 that gives a whole n_heads.
      key: PRNG key.
      recipe: see `widening`.
      spread: see `widening`.
      noise: see `widening`.
      moments: see `transport`.
      fresh_nu: see `transport`.

    Raises:
      OperationError: a factor that does not give a larger whole number; names those near it that do.
    """
    old = config.n_heads
    new = scaled_size("n_heads", old, value, least=old + 1, most=LARGEST_COUNT)
    change = widening("head", old, new, recipe, spread=spread, noise=noise)
    config = dataclasses.replace(config, n_heads=new)
    state, report = morph_gpt(
        config, state, optimizer, [change], key=key, moments=moments, fresh_nu=fresh_nu
    )
    return config, state, report


def widen_embed(
    config: ModelConfig,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    value: float,
    key: jax.Array,
    recipe: str = "even",
) -> tuple[ModelConfig, TrainState, Report]:
    """Return the GPT with `value` times the width of its residual stream.

    Every entry of the stream is duplicated, in even shares: exact, tied or not, with LayerNorm and
    RMSNorm. Other shares, or copies of some entries only, would change what the norms see. The copies
    stay equal in training until another change or dropout tells them apart.

    Args:
      config: the architecture before.
      state: its state.
      optimizer: makes the optimizer's state.
      value: a whole factor of at least 2.
      key: PRNG key.
      recipe: `even`, the only one that is exact here.

    Raises:
      OperationError: the factor is not whole, or less than 2.
      InputError: another recipe.
    """
    if recipe != "even":
        raise InputError("recipe", "", recipe, "even, as other shares would change the norms")
    if value != int(value) or value < 2:
        raise OperationError(
            value, "a whole multiple of at least 2, as d_model has even shares only"
        )
    new = config.d_model * int(value)
    change = duplicate("embed", config.d_model, new)
    config = dataclasses.replace(config, d_model=new)
    state, report = morph_gpt(
        config, state, optimizer, [change], key=key, moments="provenance", fresh_nu=1.0
    )
    return config, state, report
