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
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxmorph.config import ModelConfig
from jaxmorph.errors import InputError, nearest
from jaxmorph.morphs.axis_map import AxisMap, duplicate, pad
from jaxmorph.morphs.moments import Kind
from jaxmorph.morphs.stage import morph_gpt
from jaxmorph.morphs.transport import Report, Signatures, axis_size, transport
from jaxmorph.run_shape import LARGEST_COUNT, OperationError, scaled_size
from jaxmorph.state import TrainState

RECIPES = ("split", "even", "noise", "fresh")


def widening(
    axis: str, old: int, new: int, recipe: str, *, spread: float = 1.0, noise: float = 0.01
) -> AxisMap:
    """Return the map that widens an axis by a recipe.

    Args:
      axis: its name.
      old: its size before.
      new: its size after.
      recipe: `even`: copies with equal shares; `split`: shares drawn for each weight of a consumer,
        uniform within `spread` of an even one; `noise`: even, and noise on what produces a copy, which
        changes the function a little; `fresh`: fresh units whose consumers are zero.
      spread: half-width of the random shares of `split`.
      noise: of `noise`, in standard deviations of the copied weights.

    Raises:
      InputError: an unknown recipe, or no growth.
    """
    match recipe:
        case "fresh":
            return pad(axis, old, new)
        case "even":
            return duplicate(axis, old, new)
        case "split":
            return duplicate(axis, old, new, spread=spread)
        case "noise":
            return duplicate(axis, old, new, noise=noise)
    expected = f"one of {', '.join(RECIPES)}{nearest(recipe, RECIPES)}"
    raise InputError("recipe", "", recipe, expected)


def widen(
    signatures: Signatures,
    params: Any,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    *,
    axis: str,
    to: int,
    key: jax.Array | None = None,
    recipe: str = "split",
    spread: float = 1.0,
    noise: float = 0.01,
    fresh: Any = None,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
    fields: Mapping[str, Kind] | None = None,
) -> tuple[Any, optax.OptState, Report]:
    """Return parameters, optimizer state and a report with one axis of any model widened.

    Exact where what stands between producers and consumers of the axis works on each entry by itself,
    as an activation does. A normalisation over the axis needs `recipe="even"` and a whole multiple.

    Args:
      signatures: signature of every parameter, by path.
      params: nested dicts of arrays.
      opt_state: the optimizer's state.
      optimizer: what made it.
      axis: the axis to widen.
      to: its size after.
      key: PRNG key; `even` needs none.
      recipe: see `widening`.
      spread: see `widening`.
      noise: see `widening`.
      fresh: see `transport`; for recipe `fresh`.
      moments: see `transport`.
      fresh_nu: see `transport`.
      fields: see `transport`.

    Raises:
      InputError: no such axis, no growth, or an optimizer whose state cannot be moved.
      SignatureError: signatures that do not match the parameters.
    """
    old = axis_size(signatures, params, axis)
    return transport(
        signatures,
        [widening(axis, old, to, recipe, spread=spread, noise=noise)],
        params,
        opt_state,
        optimizer,
        fresh=fresh,
        key=key,
        moments=moments,
        fresh_nu=fresh_nu,
        fields=fields,
    )


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
