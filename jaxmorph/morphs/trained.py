"""Optimizers whose state covers only some layers, for example if the others are frozen."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmorph.morphs.change import Trained


def trained(*, before: Sequence[int], after: Sequence[int], axis: str = "layer") -> Trained:
    """Return the change of which layers the optimizer's state covers; parameters are unchanged.

    State leaves that mirror a parameter with the axis are slices of it: entry j belongs to layer
    `before[j]`, and after the change to layer `after[j]`. The new entry comes from the layer that layer
    `after[j]` copies, and is fresh if the state did not cover that one. Parameters that the state does
    not cover at all need nothing. An optimizer that slices parameters is your own, so `fields` must say
    how its state moves.

    >>> import jax.numpy as jnp, optax
    >>> from jaxmorph import morphs
    >>> slices = lambda layers: optax.GradientTransformation(  # noqa: E731
    ...     lambda params: optax.trace(0.9).init({"w": params["w"][jnp.asarray(layers)]}), None
    ... )
    >>> params = {"w": jnp.ones((4, 1))}
    >>> state = slices([0, 1]).init(params)._replace(trace={"w": jnp.asarray([[5.0], [6.0]])})
    >>> _, state, _ = morphs.apply(
    ...     [morphs.trained(before=[0, 1], after=[1, 3])],
    ...     {"w": "layer | -> unit"}, params, state, slices([1, 3]), fields={"trace": 1},
    ... )
    >>> state.trace["w"].tolist()
    [[6.0], [0.0]]

    Args:
      before: layers that the state covers, in its order, counted before the call.
      after: layers that the new state covers, counted after all changes of the call.
      axis: the stacked axis.

    Raises:
      InputError: when applied: a layer out of range or named twice.
    """
    return Trained(axis, tuple(before), tuple(after))
