"""Longer and shorter contexts.

Rotary positions (Su et al. 2021, arXiv 2104.09864) have no parameters, so no array changes; with
learned positions a shorter context keeps the first ones.
"""

from __future__ import annotations

from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.morphs.axis_map import cut
from jaxmorph.morphs.gpt.stage import Transition, morph_gpt
from jaxmorph.morphs.report import Report
from jaxmorph.step.state import TrainState


def change_context(transition: Transition) -> tuple[TrainState, Report]:
    """Return the GPT with another context length. Exact at positions present in both.

    Args:
      transition: to an architecture with another seq_len; not larger if positions are learned.

    Raises:
      InputError: more than the learned positions.
    """
    signatures = gpt_signatures(transition.after).values()
    has_table = any("position" in signature.axes for signature in signatures)
    maps = [cut("position", *transition.sizes("position"))] if has_table else []
    return morph_gpt(transition, maps)
