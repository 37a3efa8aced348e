"""Strict settings for every test: eight CPU devices, no silent rank promotion, no warnings."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
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
