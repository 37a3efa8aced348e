"""Strict settings for every test: eight CPU devices, no silent rank promotion, no warnings."""

import os
from importlib.metadata import version

# The tests' programs are small and run a few steps: XLA's optimisations cost ten times what they save.
# The last word on a flag wins, so XLA_FLAGS=--xla_backend_optimization_level=3 has them back.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Newer ones have no such flag, and abort at one they do not know.
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib") < "0.11" else []),
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """Silent dtype promotion raises (optax relies on it, so not for optimizers)."""
    with jax.numpy_dtype_promotion("strict"):
        yield
