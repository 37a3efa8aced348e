"""Wider networks: MLP units, heads and the residual stream; and fewer heads.

A copied unit splits its contribution with the unit it copies (Chen et al. 2015, Net2Net, arXiv
1511.05641), which preserves the function; so does a fresh unit that contributes nothing yet (Gesmundo
& Maile 2023, arXiv 2308.06103). With even shares copies stay equal for ever; `split` draws a random
share per weight (after Wang et al. 2023, LEMON, arXiv 2310.07999). The residual stream is duplicated
as a whole, so that its norms' statistics do not change (Chen et al. 2021, bert2BERT, arXiv
2110.07143).
"""

from __future__ import annotations

from typing import Any

from jaxmorph.cli.errors import InputError
from jaxmorph.morphs.axis_map import kept
from jaxmorph.morphs.change import Change
from jaxmorph.morphs.gpt.stage import Transition, morph_gpt
from jaxmorph.morphs.report import Report
from jaxmorph.morphs.widen import widen
from jaxmorph.step.state import TrainState

EMBED_RECIPES = ("split", "even")


def widen_mlp(
    transition: Transition,
    *,
    recipe: str = "split",
    spread: float = 1.0,
    noise: float = 0.01,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
) -> tuple[TrainState, Report]:
    """Return the GPT with wider MLPs. Exact except with recipe `noise`.

    Args:
      transition: to an architecture with a larger d_ff, or the same.
      recipe: see `widen`.
      spread: see `widen`.
      noise: see `widen`.
      moments: see `FreshStart`.
      fresh_nu: see `FreshStart`.

    Raises:
      InputError: an unknown recipe, or a smaller size.
    """
    change = widen("mlp", to=transition.sizes("mlp")[1], recipe=recipe, spread=spread, noise=noise)
    return _widened(transition, change, moments=moments, fresh_nu=fresh_nu)


def widen_heads(
    transition: Transition,
    *,
    recipe: str = "split",
    spread: float = 1.0,
    noise: float = 0.01,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
) -> tuple[TrainState, Report]:
    """Return the GPT with more heads of the same width. Exact except with recipe `noise`.

    A copied head gets the gate of its source; a fresh head's gate is open.

    Args:
      transition: to an architecture with a larger n_heads, or the same.
      recipe: see `widen`.
      spread: see `widen`.
      noise: see `widen`.
      moments: see `FreshStart`.
      fresh_nu: see `FreshStart`.

    Raises:
      InputError: an unknown recipe, or a smaller size.
    """
    change = widen(
        "head", to=transition.sizes("head")[1], recipe=recipe, spread=spread, noise=noise
    )
    return _widened(transition, change, moments=moments, fresh_nu=fresh_nu)


def remove_heads(transition: Transition) -> tuple[TrainState, Report]:
    """Return the GPT with only some heads of each layer. Exact if the gates of the others are 0.

    What the kept heads have, moments too, is unchanged.

    Args:
      transition: its value has the heads that each layer keeps.
    """
    if transition.before == transition.after:
        return morph_gpt(transition, [])
    old, _ = transition.sizes("head")
    return morph_gpt(transition, [kept("head", old, transition.value, over="layer")])


def widen_embed(
    transition: Transition, *, recipe: str = "split", spread: float = 1.0
) -> tuple[TrainState, Report]:
    """Return the GPT with its residual stream widened by an integer factor.

    Every entry of the stream is duplicated, so its norms' statistics do not change; shares affect only
    what reads from it. Exact, tied or not, with LayerNorm and RMSNorm.

    Args:
      transition: to an architecture whose d_model is an integer multiple of the old one.
      recipe: `split`: random shares, so that the copies part in training; `even`: equal shares, whose
        copies stay equal until another change or dropout breaks the symmetry.
      spread: see `widen`.

    Raises:
      InputError: another recipe.
    """
    if recipe not in EMBED_RECIPES:
        expected = f"one of {', '.join(EMBED_RECIPES)}, as others would change the norms"
        raise InputError("recipe", "", recipe, expected)
    old, new = transition.sizes("embed")
    assert new % old == 0, (old, new)
    return _widened(transition, widen("embed", to=new, recipe=recipe, spread=spread))


def _widened(transition: Transition, change: Change, **options: Any) -> tuple[TrainState, Report]:
    """Return the GPT after a change, or as it is if its size stays."""
    old, new = transition.sizes(change.axis)
    maps = [] if old == new else [change.from_size(old)]
    return morph_gpt(transition, maps, **options)
