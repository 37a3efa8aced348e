"""Entries along an axis: as a gather takes them, as the whole draw has them, without its memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmorph import morphs
from jaxmorph.morphs.take import take, uniform_at

SOURCES = {
    "copies": [0, 1, 2, 3, 4, 0, 1, 2],
    "interleaved": [0, 0, 1, 1, 2, 2],
    "fresh": [0, 1, 2, 3, 4, -1, -1],
    "all fresh": [-1, -1],
    "one": [3],
    "none": [],
    "many runs": [4, 2, 0, 3, 1] * 40,
    "many runs, some fresh": [4, -1, 0, -1, 1] * 40,
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_entries_are_those_of_a_gather(name, dimension):
    source = np.asarray(SOURCES[name], int)
    leaf = np.random.default_rng(0).normal(size=(5, 5, 5)).astype(np.float32)
    expected = np.moveaxis(np.take(leaf, np.maximum(source, 0), dimension), dimension, 0).copy()
    expected[source < 0] = 0
    found = take(jnp.asarray(leaf), source, dimension)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(found), dimension, 0), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 7, 4)])
def test_some_entries_of_a_draw_are_those_of_the_whole_draw_bit_for_bit(dtype, shape):
    with jax.enable_x64(dtype == "float64"):
        key, bound = jax.random.key(5), jnp.asarray(1.25, dtype)
        for dimension, size in enumerate(shape):
            entries = np.asarray([size - 1, 0, 2])
            whole = jax.random.uniform(key, shape, dtype, -bound, bound)
            expected = np.take(np.asarray(whole), entries, dimension)

            def drawn(key, entries=entries, dimension=dimension) -> Any:
                return uniform_at(key, shape, dtype, bound, entries, dimension)

            np.testing.assert_array_equal(drawn(key), expected)
            np.testing.assert_array_equal(jax.jit(drawn)(key), expected)


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_another_generator_s_entries_are_those_of_its_whole_draw(implementation):
    key, bound = jax.random.key(5, impl=implementation), jnp.asarray(1.0, jnp.float32)
    whole = jax.random.uniform(key, (4, 6), jnp.float32, -bound, bound)
    found = uniform_at(key, (4, 6), jnp.float32, bound, np.asarray([5, 1]), 1)
    np.testing.assert_array_equal(found, np.asarray(whole)[:, [5, 1]])


@pytest.mark.parametrize("recipe", ["split", "even"])
def test_widening_needs_less_memory_than_old_state_and_new_and_one_leaf(recipe):
    """By the compiler's own count. And nothing is gathered, which took 20 times as long as a copy."""
    shapes = {"up": (4, 64, 256), "down": (4, 256, 64)}
    table = {"up": "layer | width -> hidden", "down": "layer | hidden +> width"}
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    optimizer = optax.adam(1e-3)

    def widened(params, state) -> Any:
        change = morphs.widen("hidden", to=512, recipe=recipe)
        return morphs.apply([change], table, params, state, optimizer, key=jax.random.key(0))[:2]

    compiled = jax.jit(widened).lower(params, jax.eval_shape(optimizer.init, params)).compile()
    memory: Any = compiled.memory_analysis()
    assert " gather(" not in (compiled.as_text() or "")
    assert memory.temp_size_in_bytes <= 4 * 4 * 512 * 64


@pytest.mark.parametrize("size", [7, 260, 1001])  # 1, 65 and 250 copies of an entry and more
def test_shares_of_any_number_of_copies_sum_to_one(size):
    with jax.enable_x64(True):
        old = jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
        change = morphs.widen("mlp", to=size)
        new, *_ = morphs.apply(
            [change], {"w": "mlp -> embed"}, {"w": old}, (), optax.identity(), key=jax.random.key(1)
        )
    copied = np.arange(size) % 4
    sums = np.zeros((4, 3))
    np.add.at(sums, copied, np.asarray(new["w"]))
    np.testing.assert_allclose(sums, old, rtol=1e-12)
