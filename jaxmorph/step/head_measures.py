"""What tells heads that matter from others, measured on a batch; no training step runs any of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.model.blocks import Gates, Params
from jaxmorph.step.heads import CLOSED_GATE, HEAD_AXES, covers
from jaxmorph.step.task import Batch, Task

HeadMeasures = dict[str, Any]  # arrays [layer, head] by name
MEASURES = ("entropy", "grad_norm", "importance", "gate_gradient")


def measure_heads(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    *,
    gates: Gates,
    task: Task,
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> HeadMeasures:
    """Return the measures of each head on a batch, without dropout; their mean over batches counts.

    With L the task's objective per unit of the loss's count:

    - "entropy" of the attention as a fraction of the largest possible, see `gpt.attention_entropy`;
    - "grad_norm", the Euclidean norm of ∂L by all of the head's parameters (trained or not), over the
      median of its layer's open heads. Where that is 0, it is 1 for a head that has a gradient, else 0;
    - "importance" |gate · ∂L/∂gate|. For an open head ∂L/∂gate is the sum of its output times ∂L by its
      output: to first order, what the loss loses by closing it (Michel et al. 2019, arXiv 1905.10650);
    - "gate_gradient" ∂L/∂gate. Where it is negative, opening the head further would lower the loss.

    Args:
      config: the architecture.
      params: nested dict of parameters.
      batch: examples of the task.
      gates: "layer" [layer] and "head" [layer, head].
      task: what is learned.
      constrain: see `gpt.forward`.

    Returns:
      Arrays [layer, head], by the names above.
    """
    names = _head_parameters(config)

    def loss(of_heads: dict[str, jax.Array], gates_LH: jax.Array) -> jax.Array:
        flat = traverse_util.flatten_dict(params, sep="/") | of_heads
        measures = task.measure(
            config,
            traverse_util.unflatten_dict(flat, sep="/"),
            batch,
            gates={**gates, "head": gates_LH},
            dropout_key=None,
            constrain=constrain,
        )
        return task.objective(measures) / measures[task.loss].count

    flat = traverse_util.flatten_dict(params, sep="/")
    of_heads = {name: flat[name] for name in names}
    gradients, slopes_LH = jax.grad(loss, argnums=(0, 1))(of_heads, gates["head"])
    squares = [_over_heads(g, names[name]) for name, g in gradients.items()]
    norms_LH = jnp.sqrt(jnp.stack(squares).sum(axis=0))
    inputs_BT = task.inputs(batch)
    return {
        "entropy": gpt.attention_entropy(
            config, params, inputs_BT, gates=gates, constrain=constrain
        ),
        "grad_norm": _over_median(norms_LH, gates["head"] > CLOSED_GATE),
        "importance": jnp.abs(gates["head"] * slopes_LH),
        "gate_gradient": slopes_LH,
    }


def _head_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the parameters that heads have of their own, with the other axes' places in each."""
    return {
        path: tuple(n for n, axis in enumerate(s.axes) if axis not in HEAD_AXES.split())
        for path, s in gpt_signatures(config).items()
        if covers(s, HEAD_AXES)
    }


def _over_heads(gradient: jax.Array, others: tuple[int, ...]) -> jax.Array:
    """Return the sums of squares [layer, head] of a gradient."""
    return jnp.square(gradient).sum(axis=others)


def _over_median(norms_LH: jax.Array, is_open_LH: jax.Array) -> jax.Array:
    """Return norms over the median of their layer's open heads."""
    among_LH = jnp.where(is_open_LH, norms_LH, jnp.nan)
    median_L1 = jnp.nanmedian(among_LH, axis=1, keepdims=True)
    has_one = median_L1 > 0  # not in a layer without open heads, whose median is no number
    without = (norms_LH > 0).astype(norms_LH.dtype)
    return jnp.where(has_one, norms_LH / jnp.where(has_one, median_L1, 1), without)
