"""Wider models: units are copied and split their contribution, or start at zero."""

from __future__ import annotations

import functools
from typing import Any

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.morphs.axis_map import AxisMap, duplicate, pad
from jaxmorph.morphs.change import Change, FreshStart

RECIPES = ("split", "even", "noise", "fresh")


def widen(
    axis: str,
    *,
    to: int,
    recipe: str = "split",
    spread: float = 1.0,
    noise: float = 0.01,
    fresh: Any = None,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
) -> Change:
    """Return the change that widens an axis.

    Exact if everything between the producers and consumers of the axis is elementwise, such as an
    activation. A normalisation over the axis needs copies of all of it, an integer multiple by `even` or
    `split`.

    >>> import jax.numpy as jnp, optax
    >>> from jaxmorph import morphs
    >>> params = {"up": jnp.asarray([[1.0, 2.0]]), "down": jnp.asarray([[3.0], [4.0]])}
    >>> wide, _, _ = morphs.apply(
    ...     [morphs.widen("hidden", to=3, recipe="even")],
    ...     {"up": "width -> hidden", "down": "hidden -> width"},
    ...     params, optax.EmptyState(), optax.identity(),
    ... )
    >>> wide["up"].tolist(), wide["down"].tolist()  # unit 0 twice, half of its weight each
    ([[1.0, 2.0, 1.0]], [[1.5], [4.0], [1.5]])

    Args:
      axis: its name in the signatures.
      to: its size after.
      recipe: `even`: copies with equal shares; `split`: shares drawn per weight of a consumer, uniform
        within `spread` of an even one; `noise`: even, with noise on the copies' producers, which
        changes the function a little; `fresh`: fresh units whose consumers are zero.
      spread: half-width of the random shares of `split`.
      noise: of `noise`, in standard deviations of the copied weights.
      fresh: parameters of the new shapes, for recipe `fresh`; see `FreshStart`.
      moments: of copies, "provenance", "fresh" or "restart"; see `FreshStart`.
      fresh_nu: second moments of fresh entries, as a multiple of their leaf's mean; see `FreshStart`.

    Raises:
      InputError: an unknown recipe or `moments`; when applied, no growth.
    """
    if recipe not in RECIPES:
        expected = f"one of {', '.join(RECIPES)}{nearest(recipe, RECIPES)}"
        raise InputError("recipe", "", recipe, expected)
    start = FreshStart(fresh, moments, fresh_nu)
    return Change(axis, functools.partial(_widened, axis, to, recipe, spread, noise), start)


def _widened(axis: str, to: int, recipe: str, spread: float, noise: float, old: int) -> AxisMap:
    if recipe == "fresh":
        return pad(axis, old, to)
    spread = spread if recipe == "split" else 0.0
    noise = noise if recipe == "noise" else 0.0
    return duplicate(axis, old, to, spread=spread, noise=noise)
