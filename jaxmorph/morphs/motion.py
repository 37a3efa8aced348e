"""How one parameter, and what mirrors it in an optimizer's state, moves when axes change.

The rules are those of `transport`; this is their arithmetic.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.model.signatures import Role, Signature
from jaxmorph.morphs.axis_map import AxisMap


@dataclass(frozen=True)
class FreshStart:
    """How what is new begins; see `transport`. Its `params` are by path."""

    params: Mapping[str, jax.Array] | None
    key: jax.Array | None
    moments: str
    nu: float

    def need_key(self, path: str, *salt: str) -> jax.Array:
        """Return the key of one parameter."""
        if self.key is None:
            raise InputError("key", "", None, "a PRNG key, as something about the change is random")
        return jax.random.fold_in(self.key, zlib.crc32("/".join((path, *salt)).encode()))


@dataclass(frozen=True)
class Step:
    """One changed axis of a parameter: its dimension, what it is there, how it changes."""

    dimension: int
    role: Role
    map: AxisMap

    def along(self, vector: np.ndarray, ndim: int) -> np.ndarray:
        """Return a vector over the axis with `ndim` dimensions."""
        shape = [1] * ndim
        shape[self.dimension] = len(vector)
        return vector.reshape(shape)


@dataclass(frozen=True)
class Motion:
    """How one parameter, and what mirrors it, changes."""

    path: str
    signature: Signature
    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    start: FreshStart

    @property
    def new_shape(self) -> tuple[int, ...]:
        """Return the shape after."""
        shape = list(self.shape)
        for step in self.steps:
            shape[step.dimension] = step.map.new
        return tuple(shape)

    def mask(self, select: Callable[[Step], np.ndarray]) -> np.ndarray:
        """Return where any step selects the entry, 1 long along axes that do not matter."""
        found = np.zeros([1] * len(self.shape), bool)
        for step in self.steps:
            found = found | step.along(select(step), len(self.shape))
        return found

    @property
    def fresh(self) -> np.ndarray:
        """Return which weights are not copies of old ones."""
        return self.mask(lambda step: step.map.is_fresh)

    @property
    def zero(self) -> np.ndarray:
        """Return which weights are zero: what consumes nothing yet, or is to add nothing."""
        return self.mask(
            lambda step: step.map.is_fresh if step.role is Role.CONSUMED else self._silent(step)
        )

    @property
    def fresh_moments(self) -> np.ndarray:
        """Return which moments begin anew."""
        copies = self.start.moments == "fresh"
        return self.mask(
            lambda step: step.map.is_fresh | self._silent(step) | (step.map.is_copy & copies)
        )

    def _silent(self, step: Step) -> np.ndarray:
        stacked = step.role is Role.STACKED and self.signature.adds_to_residual
        return step.map.silent & stacked

    def gathered(self, leaf: jax.Array) -> jax.Array:
        """Return every new entry's source; anything where there is none."""
        if not leaf.size:
            return jnp.zeros(self.new_shape, leaf.dtype)
        for step in self.steps:
            leaf = jnp.take(leaf, np.maximum(step.map.source, 0), axis=step.dimension)
        return leaf

    def parameter(self, leaf: jax.Array) -> jax.Array:
        """Return the weights after."""
        new = self.gathered(leaf)
        for step in self.steps:
            if step.role is Role.CONSUMED:
                new = new * self._shares(step, leaf.dtype)
            elif step.role is Role.PRODUCED and step.map.noise and self.signature.is_matrix:
                new = new + self._noise(step, leaf)
        zero = self.zero
        if (self.fresh & ~zero).any():
            new = jnp.where(self.fresh, self._fresh_weights(leaf), new)
        return jnp.where(zero, jnp.zeros((), leaf.dtype), new) if zero.any() else new

    def _fresh_weights(self, leaf: jax.Array) -> jax.Array:
        if self.start.params is not None:
            found = self.start.params.get(self.path)
            if found is None or found.shape != self.new_shape:
                got = "nothing" if found is None else found.shape
                raise InputError("fresh", self.path, got, f"an array of shape {self.new_shape}")
            return found.astype(leaf.dtype)
        if not leaf.size:
            raise InputError("fresh", self.path, None, "parameters of the new shapes to begin with")
        if self.signature.is_gain:
            return jnp.ones(self.new_shape, leaf.dtype)
        if not self.signature.is_matrix:
            return jnp.zeros(self.new_shape, leaf.dtype)
        rms = jnp.sqrt(jnp.mean(jnp.square(leaf)))
        return rms * jax.random.normal(self.start.need_key(self.path), self.new_shape, leaf.dtype)

    def _shares(self, step: Step, dtype: Any) -> jax.Array:
        """Return what each weight takes of the one it copies."""
        even = jnp.asarray(step.along(step.map.share, len(self.shape)), dtype)
        copies = np.flatnonzero(step.map.is_copy)
        if not step.map.spread or not copies.size:
            return even
        key = self.start.need_key(self.path, step.map.axis)
        bound = jnp.asarray(step.map.spread, dtype)
        random = jax.random.uniform(key, self.new_shape, dtype, -bound, bound)
        # With the axis in front: the first copy of a source takes what its other copies leave.
        shares = jnp.moveaxis(even + random, step.dimension, 0)
        source = step.map.source
        taken = jnp.zeros((step.map.old, *shares.shape[1:]), dtype)
        taken = taken.at[source[copies]].add(shares[copies])
        firsts = ~step.map.is_copy.reshape([-1] + [1] * (shares.ndim - 1))
        shares = jnp.where(firsts, 1 - taken[np.maximum(source, 0)], shares)
        return jnp.moveaxis(shares, 0, step.dimension)

    def _noise(self, step: Step, leaf: jax.Array) -> jax.Array:
        noise = jax.random.normal(
            self.start.need_key(self.path, step.map.axis), self.new_shape, leaf.dtype
        )
        copies = jnp.asarray(step.along(step.map.is_copy, len(self.shape)), leaf.dtype)
        return noise * copies * (jnp.std(leaf) * step.map.noise)

    def moment(self, leaf: jax.Array, power: int, sibling: jax.Array) -> jax.Array:
        """Return moments after: of a `power` of the gradient; `sibling` is other leaves' mean."""
        new = self.gathered(leaf)
        if self.fresh_moments.any():
            new = jnp.where(self.fresh_moments, self._fresh_moment(leaf, power, sibling), new)
        for step in self.steps:
            if power and step.role is not Role.STACKED:
                new = new * jnp.asarray(self._gradient_factor(step) ** power, leaf.dtype)
        return new

    def _gradient_factor(self, step: Step) -> np.ndarray:
        """Return what each entry's gradient is multiplied by."""
        produced = step.role is Role.PRODUCED
        share = step.map.share if produced else np.ones(step.map.new)
        return step.along(share * step.map.scale, len(self.shape))

    def _fresh_moment(self, leaf: jax.Array, power: int, sibling: jax.Array) -> jax.Array:
        """Return what fresh entries begin with: nothing, or a part of a mean second moment."""
        if power != 2:
            return jnp.zeros((), leaf.dtype)
        if not leaf.size:
            return sibling.astype(leaf.dtype) * self.start.nu
        inner = tuple(range(len(self.signature.stacked), leaf.ndim))
        mean = jnp.mean(leaf, axis=inner, keepdims=True)
        for step in self.steps:
            if step.role is Role.STACKED:
                mean = jnp.take(mean, np.maximum(step.map.source, 0), axis=step.dimension)
        nowhere = self.mask(lambda step: step.map.is_fresh & (step.role is Role.STACKED))
        return jnp.where(nowhere, jnp.mean(leaf), mean) * self.start.nu
