"""Strict settings for every test: eight CPU devices, no silent rank promotion, no warnings."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

# The tests' programs are small and run a few steps: XLA's optimisations cost ten times what they save.
# The last word on a flag wins, so XLA_FLAGS=--xla_backend_optimization_level=3 has them back.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_experimental_ynn_fusion_type=",  # with YNNPACK compiling takes longer
        # Newer ones have no such flag, and abort at one they do not know.
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib") < "0.11" else []),
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("MPLBACKEND", "Agg")

# Runs that are killed, resumed and compared compile the same programs: once for all processes will do.
# Not with jaxlib 0.12, which once ended a worker by a segmentation fault as it wrote a program there.
if (
    version("jaxlib") < "0.12" and "PYTEST_XDIST_WORKER" not in os.environ
):  # else the folder is there
    programs = tempfile.mkdtemp(prefix="jaxmorph-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # less is as fast compiled

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Files go to the cores one by one, these first, so that none of them is left to one core at the end.
LONGEST_FIRST = (
    "test_operate",
    "test_conformance",
    "test_lora_morphs",
    "test_extending",
    "test_train",
    "test_odd_inputs",
    "test_keep",
    "test_task",
    "test_width",
    "test_depth",
    "test_programs",
    "test_gpt",
    "test_apply",
    "test_plot",
    "test_attention",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by how long they take; the order within a file stays."""
    items.sort(key=lambda item: [item.path.stem != name for name in LONGEST_FIRST])


@pytest.fixture
def strict_dtypes():
    """Silent dtype promotion raises (optax relies on it, so not for optimizers)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def quick_random_bits():
    """Random bits whose programs compile several times as fast as those of the default generator."""
    with jax.default_prng_impl("rbg"):
        yield
