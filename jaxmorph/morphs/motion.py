"""How one parameter, and the optimizer state that mirrors it, changes when axes do.

A parameter's signature gives the role of a changed axis, and the role gives two factors. A parameter
that consumes the axis takes `share` times the weights it copies, with an unchanged gradient; one that
produces it, or is a gain on it, copies the weights, and the copies share the gradient; one that is
stacked on it is only rearranged. A `scale` of the axis multiplies both gradients. Moments follow the
gradient (see `moments`).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.model.signatures import Role, Signature
from jaxmorph.morphs.axis_map import FRESH, AxisMap
from jaxmorph.morphs.change import FreshStart, Move
from jaxmorph.morphs.take import take, uniform_at
from jaxmorph.morphs.transforms import Power


@dataclass(frozen=True)
class Origin:
    """The source of fresh weights: parameters of the new shapes by path, and a PRNG key."""

    params: Mapping[str, jax.Array] | None = None
    key: jax.Array | None = None

    def need_key(self, path: str, *salt: str) -> jax.Array:
        """Return the key of one parameter."""
        if self.key is None:
            raise InputError("key", "", None, "a PRNG key, because the change is partly random")
        return jax.random.fold_in(self.key, zlib.crc32("/".join((path, *salt)).encode()))


@dataclass(frozen=True)
class Step:
    """One changed axis of a parameter: its dimension, its role, how it changes.

    `over` is the dimension of the axis whose entries have a row of the map each; None: no rows.
    """

    dimension: int
    role: Role
    map: AxisMap
    start: FreshStart
    over: int | None

    def along(self, table: np.ndarray, ndim: int) -> np.ndarray:
        """Return a table over the axis (per row, if the map has rows) with `ndim` dimensions."""
        shape = [1] * ndim
        shape[self.dimension] = table.shape[-1]
        if self.over is not None:
            shape[self.over] = table.shape[0]
            table = table.T if self.over > self.dimension else table
        return table.reshape(shape)

    def gathered(self, leaf: jax.Array) -> jax.Array:
        """Return every new entry's source along the axis; arbitrary values if it has none."""
        source = np.maximum(self.map.source, 0)
        if self.over is None:
            return take(leaf, source, self.dimension)
        indices = jnp.asarray(self.along(source, leaf.ndim))
        return jnp.take_along_axis(leaf, indices, axis=self.dimension)


def steps_of(path: str, signature: Signature, moves: Sequence[Move]) -> tuple[Step, ...]:
    """Return the changed axes of a parameter.

    Args:
      path: names it.
      signature: its own.
      moves: of all axes, composed.

    Raises:
      InputError: a map of one of its axes has rows over an axis it is not stacked on.
    """
    steps = []
    for change, start in ((move.map, move.start) for move in moves):
        if change.axis not in signature.axes:
            continue
        over = None
        if change.over:
            if change.over not in signature.stacked:
                expected = f"a signature stacked on {change.over!r}, each of whose entries has its "
                expected += f"own source along {change.axis!r}"
                raise InputError(path, "signature", str(signature), expected)
            over = signature.axes.index(change.over)
        at = signature.axes.index(change.axis)
        steps.append(Step(at, signature.role(change.axis), change, start, over))
    return tuple(steps)


_MOST_TURNS = 64  # copies of an entry; a sum of more arrays compiles slowly


def _sum_of_copies(copies: jax.Array, source: np.ndarray, old: int, at: int) -> jax.Array:
    """Return for every old entry along dimension `at` the sum of its copies; 0 without any."""
    turns = _turns(source, old)
    if len(turns) <= _MOST_TURNS:
        return functools.reduce(jnp.add, (take(copies, turn, at) for turn in turns))
    copies = jnp.moveaxis(copies, at, 0)
    return jnp.moveaxis(jax.ops.segment_sum(copies, source, num_segments=old), 0, at)


def _turns(source: np.ndarray, old: int) -> list[np.ndarray]:
    """Return for the first, second, ... copy of every old entry its number among the copies, or -1."""
    order = np.argsort(source, kind="stable")
    _, first, counts = np.unique(source[order], return_index=True, return_counts=True)
    earlier = np.arange(len(source)) - np.repeat(first, counts)
    turns = np.full((counts.max(), old), FRESH)
    turns[earlier, source[order]] = order
    return list(turns)


@dataclass(frozen=True)
class Motion:
    """How one parameter, and whatever mirrors it, changes."""

    path: str
    signature: Signature
    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    origin: Origin

    @property
    def new_shape(self) -> tuple[int, ...]:
        """Return the shape after."""
        shape = list(self.shape)
        for step in self.steps:
            shape[step.dimension] = step.map.new
        return tuple(shape)

    def mask(self, select: Callable[[Step], np.ndarray]) -> np.ndarray:
        """Return where any step selects the entry; of size 1 along axes that do not matter."""
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
        """Return which weights are zero: of fresh entries in consumers, and of silent entries."""
        return self.mask(
            lambda step: step.map.is_fresh if step.role is Role.CONSUMED else self._silent(step)
        )

    @property
    def fresh_moments(self) -> np.ndarray:
        """Return which moments are reset."""
        return self.mask(self._reset_moments)

    def _reset_moments(self, step: Step) -> np.ndarray:
        copies = step.map.is_copy & (step.start.moments == "fresh")
        return step.map.is_fresh | self._silent(step) | copies

    def _silent(self, step: Step) -> np.ndarray:
        stacked = step.role is Role.STACKED and self.signature.adds_to_residual
        return step.map.silent & stacked

    def gathered(self, leaf: jax.Array) -> jax.Array:
        """Return every new entry's source; arbitrary values if it has none."""
        if not leaf.size:
            return jnp.zeros(self.new_shape, leaf.dtype)
        for step in self.steps:
            leaf = step.gathered(leaf)
        return leaf

    def declared(self, leaf: jax.Array, fresh: float) -> jax.Array:
        """Return an array that is not a parameter after: same dtype, fresh entries set to `fresh`."""
        new = self.gathered(leaf)
        begun = jnp.asarray(fresh, leaf.dtype)
        return jnp.where(self.fresh, begun, new) if self.fresh.any() else new

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
        if self.origin.params is not None:
            found = self.origin.params.get(self.path)
            if found is None or found.shape != self.new_shape:
                got = "nothing" if found is None else found.shape
                raise InputError("fresh", self.path, got, f"an array of shape {self.new_shape}")
            return found.astype(leaf.dtype)
        if not leaf.size:
            raise InputError("fresh", self.path, None, "parameters of the new shapes")
        if self.signature.is_gain:
            return jnp.ones(self.new_shape, leaf.dtype)
        if not self.signature.is_matrix:
            return jnp.zeros(self.new_shape, leaf.dtype)
        rms = jnp.sqrt(jnp.mean(jnp.square(leaf)))
        return rms * jax.random.normal(self.origin.need_key(self.path), self.new_shape, leaf.dtype)

    def _shares(self, step: Step, dtype: Any) -> jax.Array:
        """Return the factor of each weight on the one it copies."""
        even = jnp.asarray(step.along(step.map.share, len(self.shape)), dtype)
        copies = np.flatnonzero(step.map.is_copy)
        if not step.map.spread or not copies.size:
            return even
        at, source = step.dimension, step.map.source
        key = self.origin.need_key(self.path, step.map.axis)
        bound = jnp.asarray(step.map.spread, dtype)
        random = uniform_at(key, self.new_shape, dtype, bound, copies, at)
        drawn = take(even, copies, at) + random
        # The first copy of a source takes the remainder of the other copies.
        firsts = np.flatnonzero(~step.map.is_copy)
        rest = 1 - take(_sum_of_copies(drawn, source[copies], step.map.old, at), source[firsts], at)
        place = np.argsort(np.concatenate([copies, firsts]))  # of every entry in these two
        return take(jnp.concatenate([drawn, rest], axis=at), place, at)

    def _noise(self, step: Step, leaf: jax.Array) -> jax.Array:
        noise = jax.random.normal(
            self.origin.need_key(self.path, step.map.axis), self.new_shape, leaf.dtype
        )
        copies = jnp.asarray(step.along(step.map.is_copy, len(self.shape)), leaf.dtype)
        return noise * copies * (jnp.std(leaf) * step.map.noise)

    def moment(self, leaf: jax.Array, power: Power, sibling: jax.Array) -> jax.Array:
        """Return the moments after, of a `power` of the gradient; `sibling` is other leaves' mean."""
        exponent = power.of_gradient
        new = self.gathered(leaf)
        if self.fresh_moments.any():
            new = jnp.where(self.fresh_moments, self._fresh_moment(leaf, power, sibling), new)
        for step in self.steps:
            if exponent and step.role is not Role.STACKED:
                new = new * jnp.asarray(self._gradient_factor(step) ** exponent, leaf.dtype)
        return new

    def _gradient_factor(self, step: Step) -> np.ndarray:
        """Return the factor on each entry's gradient."""
        produced = step.role is Role.PRODUCED
        share = step.map.share if produced else np.ones(step.map.share.shape)
        return step.along(share * step.map.scale, len(self.shape))

    def _fresh_moment(self, leaf: jax.Array, power: Power, sibling: jax.Array) -> jax.Array:
        """Return the moments of fresh entries: zero, or a fraction of the mean."""
        if not power.mean:
            return jnp.zeros((), leaf.dtype)
        if not leaf.size:
            return sibling.astype(leaf.dtype) * self._fresh_nu(leaf.dtype)
        inner = tuple(range(len(self.signature.stacked), leaf.ndim))
        mean = jnp.mean(leaf, axis=inner, keepdims=True)
        for step in self.steps:
            if step.role is Role.STACKED:
                mean = step.gathered(mean)
        nowhere = self.mask(lambda step: step.map.is_fresh & (step.role is Role.STACKED))
        return jnp.where(nowhere, jnp.mean(leaf), mean) * self._fresh_nu(leaf.dtype)

    def _fresh_nu(self, dtype: Any) -> jax.Array:
        """Return each fresh second moment as a multiple of the mean; the first change decides."""
        ndim = len(self.shape)
        factor = np.ones([1] * ndim)
        for step in reversed(self.steps):
            factor = np.where(step.along(self._reset_moments(step), ndim), step.start.nu, factor)
        return jnp.asarray(factor, dtype)
