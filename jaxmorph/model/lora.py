"""Low-rank adapters: W + (alpha / rank)·A·B in place of a weight W.

Hu et al. 2021 (arXiv 2106.09685); merged and restarted after Lialin et al. 2023 (arXiv 2307.05695).

Adapted weights are computed once per step, before the blocks run; at training batch sizes this is
cheaper than a low-rank path for the activations, and the blocks need not know about adapters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.model.architecture import gpt_signatures, lora_adapters

Params = dict


def adapted(config: ModelConfig, params: Params, alpha: jax.Array) -> Params:
    """Return the parameters with every adapter merged into its weight and removed.

    Args:
      config: the architecture.
      params: nested dict of parameters.
      alpha: numerator of the adapters' scale, a scalar.
    """
    adapters = lora_adapters(config)
    if not adapters:
        return params
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    for base, (a, b) in adapters.items():
        flat[base] = flat[base] + detour(config, base, flat.pop(a), flat.pop(b), alpha)
    return traverse_util.unflatten_dict(flat, sep="/")


def detour(
    config: ModelConfig, base: str, a: jax.Array, b: jax.Array, alpha: jax.Array
) -> jax.Array:
    """Return (alpha / rank)·A·B in the shape of the weight `base`, per stacked layer."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        scale = (alpha / a.shape[-1]).astype(a.dtype)
        return jnp.tensordot(a, b * scale, axes=1)

    stacked = bool(gpt_signatures(config)[base].stacked)
    return jax.vmap(product)(a, b) if stacked else product(a, b)
