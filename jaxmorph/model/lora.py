"""Low-rank adapters: a detour beside a weight, W + (alpha / rank)·A·B.

Hu et al. 2021 (arXiv 2106.09685); merged and restarted after Lialin et al. 2023 (arXiv 2307.05695).

An adapted weight is formed once per step, before the blocks run; at training batch sizes this costs
less than a detour for the activations, and the blocks need not know of adapters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxmorph.config.settings import ModelConfig
from jaxmorph.model.architecture import frozen_parameters, gpt_signatures, lora_adapters

Params = dict


def adapted(config: ModelConfig, params: Params, alpha: jax.Array) -> Params:
    """Return the parameters with every adapter added to its weight, and no adapters left.

    Args:
      config: the architecture.
      params: nested dict of parameters.
      alpha: numerator of the adapters' scale, a scalar.

    With `lora_base` frozen the adapted weights themselves get no gradient.
    """
    adapters = lora_adapters(config)
    if not adapters:
        return params
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    frozen = frozen_parameters(config)
    for base, (a, b) in adapters.items():
        weight = jax.lax.stop_gradient(flat[base]) if base in frozen else flat[base]
        flat[base] = weight + detour(config, base, flat.pop(a), flat.pop(b), alpha)
    return traverse_util.unflatten_dict(flat, sep="/")


def detour(
    config: ModelConfig, base: str, a: jax.Array, b: jax.Array, alpha: jax.Array
) -> jax.Array:
    """Return (alpha / rank)·A·B in the shape of the weight `base`; stacked layers one by one."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        scale = (alpha / a.shape[-1]).astype(a.dtype)
        return jnp.tensordot(a, b * scale, axes=1)

    stacked = bool(gpt_signatures(config)[base].stacked)
    return jax.vmap(product)(a, b) if stacked else product(a, b)
