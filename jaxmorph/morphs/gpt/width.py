"""Wider networks: MLP units, heads and the residual stream.

A copied unit splits its contribution with the unit it copies (Chen et al. 2015, Net2Net, arXiv
1511.05641), which preserves the function; so does a fresh unit that contributes nothing yet (Gesmundo
& Maile 2023, arXiv 2308.06103). With even shares copies stay equal for ever; `split` draws a random
share per weight (after Wang et al. 2023, LEMON, arXiv 2310.07999). The residual stream is duplicated
as a whole, with even shares, so that its norms' statistics do not change (Chen et al. 2021,
bert2BERT, arXiv 2110.07143).
"""

from __future__ import annotations

from jaxmorph.cli.errors import InputError
from jaxmorph.morphs.axis_map import duplicate
from jaxmorph.morphs.gpt.stage import Transition, morph_gpt
from jaxmorph.morphs.report import Report
from jaxmorph.morphs.widen import widen
from jaxmorph.step.state import TrainState


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
      transition: to an architecture with a larger d_ff.
      recipe: see `widen`.
      spread: see `widen`.
      noise: see `widen`.
      moments: see `FreshStart`.
      fresh_nu: see `FreshStart`.

    Raises:
      InputError: an unknown recipe, or no growth.
    """
    old, new = transition.sizes("mlp")
    change = widen("mlp", to=new, recipe=recipe, spread=spread, noise=noise).from_size(old)
    return morph_gpt(transition, [change], moments=moments, fresh_nu=fresh_nu)


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
      transition: to an architecture with a larger n_heads.
      recipe: see `widen`.
      spread: see `widen`.
      noise: see `widen`.
      moments: see `FreshStart`.
      fresh_nu: see `FreshStart`.

    Raises:
      InputError: an unknown recipe, or no growth.
    """
    old, new = transition.sizes("head")
    change = widen("head", to=new, recipe=recipe, spread=spread, noise=noise).from_size(old)
    return morph_gpt(transition, [change], moments=moments, fresh_nu=fresh_nu)


def widen_embed(transition: Transition, *, recipe: str = "even") -> tuple[TrainState, Report]:
    """Return the GPT with its residual stream widened by an integer factor.

    Every entry of the stream is duplicated with even shares: exact, tied or not, with LayerNorm and
    RMSNorm. Other shares, or copying only some entries, would change the norms' statistics. Copies
    stay equal during training until another change or dropout breaks the symmetry.

    Args:
      transition: to an architecture whose d_model is an integer multiple, at least 2, of the old one.
      recipe: `even`, the only one that is exact here.

    Raises:
      InputError: another recipe.
    """
    if recipe != "even":
        raise InputError("recipe", "", recipe, "even, as other shares would change the norms")
    old, new = transition.sizes("embed")
    assert new % old == 0, (old, new)
    return morph_gpt(transition, [duplicate("embed", old, new)])
