"""Wider: units that are copied and share what they give, or begin as nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.morphs.axis_map import AxisMap, duplicate, pad
from jaxmorph.morphs.moments import Kind
from jaxmorph.morphs.transport import Report, Signatures, axis_size, transport

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
