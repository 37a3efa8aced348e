"""Which dtype is used for what."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxmorph.config.model_config import ModelConfig


def parameter_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the dtype of parameters and optimizer state: float32, or float64 when computing in it."""
    return jnp.dtype("float64" if config.dtype == "float64" else "float32")


def wide_dtype(dtype: Any) -> jnp.dtype:
    """Return the dtype for statistics and sums over entries of `dtype`: float32 or wider."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype("float32")
