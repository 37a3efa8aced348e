"""Entries of an array along one axis: copied in runs of consecutive ones, or drawn at random.

Most changes of an axis copy long runs of consecutive entries. A gather does not know that, and on a
CPU it moves each entry by itself: slices are some ten times as fast.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MOST_RUNS = 64  # more slices compile slowly


def runs_of(source: np.ndarray) -> list[np.ndarray]:
    """Return the runs of consecutive numbers in a list of entries, and those of negative ones.

    >>> [run.tolist() for run in runs_of(np.asarray([0, 1, 2, 0, 1, -1, -1]))]
    [[0, 1, 2], [0, 1], [-1, -1]]
    """
    nowhere = source < 0
    follows = (np.diff(source) == 1) & ~nowhere[:-1] | nowhere[1:] & nowhere[:-1]
    return np.split(source, np.flatnonzero(~follows) + 1)


def take(leaf: jax.Array, source: np.ndarray, dimension: int) -> jax.Array:
    """Return the entries of `leaf` along a dimension; zeros for a negative one.

    Args:
      leaf: an array with at least one entry along the dimension, if any of `source` is not negative.
      source: int [new], static.
      dimension: which.
    """
    runs = runs_of(source)
    if len(runs) > _MOST_RUNS:
        taken = jnp.take(leaf, np.maximum(source, 0), axis=dimension, mode="clip")
        if (source >= 0).all():
            return taken
        shape = [1] * leaf.ndim
        shape[dimension] = len(source)
        return jnp.where((source >= 0).reshape(shape), taken, jnp.zeros((), leaf.dtype))
    parts = [_part(leaf, run, dimension) for run in runs]
    return jnp.concatenate(parts, axis=dimension) if len(parts) != 1 else parts[0]


def _part(leaf: jax.Array, run: np.ndarray, dimension: int) -> jax.Array:
    if not run.size or run[0] < 0:
        shape = [*leaf.shape[:dimension], len(run), *leaf.shape[dimension + 1 :]]
        return jnp.zeros(shape, leaf.dtype)
    return jax.lax.slice_in_dim(leaf, int(run[0]), int(run[-1]) + 1, axis=dimension)


def uniform_at(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    bound: jax.Array,
    entries: np.ndarray,
    dimension: int,
) -> jax.Array:
    """Return some entries of `jax.random.uniform(key, shape, dtype, -bound, bound)`, bit for bit.

    JAX's Threefry generator makes each entry of an array from its place alone. So in float32 the
    other entries are not drawn, and no random bits are kept in memory.

    Args:
      key: a PRNG key.
      shape: of the whole draw.
      dtype: of the whole draw.
      bound: of that dtype, the half-width of the interval.
      entries: int [drawn], which along the dimension.
      dimension: which.
    """
    config: Any = jax.config  # whose attributes are not declared
    by_place = jax.random.key_impl(key) == "threefry2x32" and config.jax_threefry_partitionable
    if not by_place or math.prod(shape) >= 2**32 or jnp.dtype(dtype) != jnp.float32:
        return take(jax.random.uniform(key, shape, dtype, -bound, bound), entries, dimension)
    drawn = (*shape[:dimension], len(entries), *shape[dimension + 1 :])
    place = jnp.zeros(drawn, jnp.uint32)
    for axis, size in enumerate(shape):
        index = jnp.arange(size, dtype=jnp.uint32)
        index = take(index, entries, 0) if axis == dimension else index
        place = place * np.uint32(size) + jax.lax.broadcast_in_dim(index, drawn, (axis,))
    high, low = _threefry(jax.random.key_data(key), place)
    mantissa = ((high ^ low) >> np.uint32(9)) | np.uint32(0x3F800000)  # of a number from 1 to 2
    fraction = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - np.float32(1)
    return jax.lax.max(-bound, fraction * (bound - -bound) + -bound)


def _threefry(key: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return Threefry-2x32 of the counters (0, place), 20 rounds (Salmon et al. 2011, SC'11).

    JAX's own is a loop on CPU, with its arrays in memory; this is one elementwise program.
    """
    keys = key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)
    high, low = jnp.broadcast_to(keys[0], place.shape), place + keys[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            high = high + low
            low = low << np.uint32(rotation) | low >> np.uint32(32 - rotation)
            low = low ^ high
        high = high + keys[(group + 1) % 3]
        low = low + keys[(group + 2) % 3] + np.uint32(group + 1)
    return high, low
