"""Attention heads that close and open: their status, and the learning rate each of them has.

A head's gate scales its output. At a gate of 0.1 or less the head is *closed*: it keeps every bit of
its weights, and its gradients and moments are zero, as if it were not there. From 0.2 on it is *open*;
between the two it stays what it was. A head that opens gets a higher learning rate for a while, which
rises over a warmup and decays over a cooldown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmorph.config.closed_heads import CLOSED_GATE, OPEN_GATE
from jaxmorph.config.heads import profile_values
from jaxmorph.config.settings import HeadSettings
from jaxmorph.model.signatures import Signature
from jaxmorph.model.tree_paths import parameter_path

CLOSED, STABLE, OPENED = -1, 0, 1
HEAD_AXES = "layer head"


@dataclass(frozen=True)
class HeadProfile:
    """The learning rate of a head, by its time since it opened.

    Args:
      boost: the largest multiplier of the learning rate; 1: heads have no rates of their own.
      decay: of the boost, per hundredth of the cooldown.
      warmup: steps until the boost is reached.
      cooldown: steps until the multiplier is 1 again.
    """

    boost: float
    decay: float
    warmup: int
    cooldown: int

    def multipliers(self, status: jax.Array, boost: jax.Array) -> jax.Array:
        """Return the multiplier of each head's learning rate, 0 for a closed one.

        With t the steps since a head opened it rises linearly from 1 to its boost over the warmup; then,
        with p = (t - warmup) / (cooldown - warmup), it is 1 + (boost - 1)·decay^(100 p), and exactly 1
        from the cooldown on.

        Args:
          status: int32 [layer, head], see `judged`.
          boost: [layer, head], scales the profile's boost.
        """
        t = (status - OPENED).astype(boost.dtype)
        rise = t / max(1, self.warmup)
        fall = (t - self.warmup) / (self.cooldown - self.warmup)
        part = jnp.where(t < self.warmup, rise, self.decay ** (100 * fall))
        boosted = 1 + (self.boost * boost - 1) * part
        moving = (status >= OPENED) & (status <= self.cooldown) & (self.boost != 1)
        return jnp.where(status == CLOSED, 0, jnp.where(moving, boosted, 1))


def head_profile(settings: HeadSettings) -> HeadProfile:
    """Return the profile that the settings ask for."""
    profile = HeadProfile(**profile_values(settings))
    return profile if settings.enable_head_lr else dataclasses.replace(profile, boost=1.0)


def judged(status: jax.Array, gates: jax.Array, cooldown: int) -> jax.Array:
    """Return the status of each head at an update, given that at the previous one.

    Args:
      status: int32 [layer, head]: -1 closed, 0 stable, 1 + t open for t updates.
      gates: [layer, head].
      cooldown: updates after which an opened head is stable.
    """
    older = jnp.where(status > STABLE, status + 1, status)
    older = jnp.where(older > cooldown, STABLE, older)
    opened = jnp.where(status == CLOSED, OPENED, older)
    closed = gates <= jnp.asarray(CLOSED_GATE, gates.dtype)
    is_open = gates >= jnp.asarray(OPEN_GATE, gates.dtype)
    return jnp.where(closed, CLOSED, jnp.where(is_open, opened, older)).astype(status.dtype)


def without_closed(tree: Any, signatures: Mapping[str, Signature], closed: jax.Array) -> Any:
    """Return gradients or an optimizer's state with the entries of closed heads at zero.

    A leaf counts if it mirrors a parameter with a head axis and has its number of dimensions.

    Args:
      tree: gradients, or the state of an optimizer of the same parameters.
      signatures: of the parameters, by path.
      closed: bool [layer, head], of the layers that the tree covers.
    """

    def one(path: tuple, leaf: Any) -> Any:
        signature = signatures.get(parameter_path(path))
        if signature is None or not covers(signature, HEAD_AXES):
            return leaf
        if jnp.ndim(leaf) != len(signature.axes):
            return leaf
        return jnp.where(over_axes(closed, HEAD_AXES, signature), 0, leaf)

    return jax.tree_util.tree_map_with_path(one, tree)


def covers(signature: Signature, axes: str) -> bool:
    """Return whether a parameter has all these axes."""
    return set(axes.split()) <= set(signature.axes)


def over_axes(array: jax.Array, axes: str, signature: Signature) -> jax.Array:
    """Return an array over some axes, shaped to broadcast over a parameter that has them.

    Args:
      array: over `axes`.
      axes: their names, separated by spaces, in the order of the parameter's dimensions.
      signature: of the parameter.
    """
    sizes = dict(zip(axes.split(), array.shape, strict=True))
    return array.reshape([sizes.get(axis, 1) for axis in signature.axes])
