"""Attention heads that open again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmorph.model.architecture import gpt_axis_sizes, gpt_signatures
from jaxmorph.model.signatures import Arrow, Signature
from jaxmorph.model.tree_paths import field_name, parameter_path
from jaxmorph.morphs.axis_map import renew
from jaxmorph.morphs.gpt.stage import Transition, morph_gpt
from jaxmorph.morphs.report import Report
from jaxmorph.step.heads import CLOSED_GATE, HEAD_AXES, covers, over_axes
from jaxmorph.step.state import TrainState

# Of a bool array [layer, head] that broadcasts over a leaf, the leaf, and another state's.
_Rule = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def regrow_heads(
    transition: Transition,
    *,
    weights: str = "fresh",
    by: str = "listed",
    heads: Sequence[Sequence[int]] | None = None,
) -> tuple[TrainState, Report]:
    """Return the GPT with some closed heads open again. Exact unless their weights are kept.

    What is declared over heads, such as gate and status, becomes that of fresh heads: they count as yet
    to open. Their first moments are zero and their second ones the mean of the layer's open heads.

    Args:
      transition: of an architecture that does not change; its `heads` are those to open.
      weights: `fresh`: query, key and value are initialised as at the start, and the output is zero;
        `kept`: they are what they were when the head closed.
      by: how the heads have been chosen.
      heads: those that the schedule lists.
    """
    state, chosen = transition.state, transition.heads
    assert chosen is not None, (by, heads)
    trained = [k for k in range(len(chosen)) if k not in transition.frozen_layers[0]]
    is_open = (state["head_gate"] > CLOSED_GATE)[np.asarray(trained, int)]
    # The moments of closed heads are zero; a mean over all heads would be too small.
    filled = _mapped(transition, _filled, is_open, state.opt_state, state.opt_state)
    begun, report = morph_gpt(
        dataclasses.replace(transition, state=dataclasses.replace(state, opt_state=filled)),
        [renew("head", chosen.shape[1])],
    )
    part = chosen[np.asarray(trained, int)]
    opt_state = _mapped(transition, jnp.where, part, begun.opt_state, state.opt_state)
    params = state.params
    if weights == "fresh":
        params = _mapped(transition, jnp.where, chosen, begun.params, params)
    else:
        report = _with_kept_weights(report)
    over_heads = [
        name
        for name, each in transition.parts.variables.items()
        if each.axes.names == tuple(HEAD_AXES.split())
    ]
    changed = {name: jnp.where(chosen, begun[name], state[name]) for name in over_heads}
    state = dataclasses.replace(state, params=params, opt_state=opt_state)
    return state.with_variables(**changed), report


def _with_kept_weights(report: Report) -> Report:
    """Return the report of moments that begin anew, for weights that do not."""
    lines = (
        dataclasses.replace(line, how="transported") if line.field == "params" else line
        for line in report.lines
    )
    return dataclasses.replace(report, lines=tuple(lines))


def _mapped(transition: Transition, rule: _Rule, where: jax.Array, tree: Any, other: Any) -> Any:
    """Return the second tree with `rule` of the leaves that have an entry for each head.

    Args:
      transition: the architecture.
      rule: see `_Rule`.
      where: bool [layer, head], of the layers that the trees cover.
      tree: parameters, or an optimizer's state.
      other: another tree like it.
    """
    signatures, sizes = gpt_signatures(transition.after), gpt_axis_sizes(transition.after)

    def one(path: tuple, leaf: jax.Array, second: jax.Array) -> jax.Array:
        signature = signatures.get(parameter_path(path))
        if signature is None or not covers(signature, HEAD_AXES):
            return second
        axes = signature.axes
        if leaf.ndim == len(axes) - 1:
            axes = _factor_axes(axes, signature.shape(sizes), field_name(path))
        factor = Signature(axes, (), Arrow.PLAIN, ())
        if leaf.ndim != len(axes) or not covers(factor, HEAD_AXES):
            return second
        return rule(over_axes(where, HEAD_AXES, factor), leaf, second)

    return jax.tree_util.tree_map_with_path(one, tree, other)


def _factor_axes(axes: tuple[str, ...], shape: tuple[int, ...], field: str) -> tuple[str, ...]:
    """Return the axes of a factor of adafactor's second moments: one of the two longest is averaged."""
    averaged = {"v_row": -1, "v_col": -2}.get(field)
    if averaged is None:
        return axes
    dropped = int(np.argsort(shape)[averaged])
    return axes[:dropped] + axes[dropped + 1 :]


def _filled(is_open: jax.Array, leaf: jax.Array, _: jax.Array) -> jax.Array:
    """Return moments with those of closed heads at the mean of the layer's open heads.

    Where a layer has none, it is the mean of all open heads.
    """
    kept = jnp.where(is_open, leaf, 0)
    counts = jnp.broadcast_to(is_open, leaf.shape).astype(leaf.dtype)

    def mean(axes: tuple[int, ...]) -> jax.Array:
        count = counts.sum(axes, keepdims=True)
        return kept.sum(axes, keepdims=True) / jnp.maximum(count, 1)

    inner = tuple(range(1, leaf.ndim))
    has_open = counts.sum(inner, keepdims=True) > 0
    everywhere = mean((0, *inner))
    return jnp.where(is_open, leaf, jnp.where(has_open, mean(inner), everywhere))
