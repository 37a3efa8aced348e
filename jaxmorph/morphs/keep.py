"""Smaller models: keep some entries of an axis, the same everywhere or different ones per layer."""

from __future__ import annotations

from jaxmorph.morphs.axis_map import Entries, kept
from jaxmorph.morphs.change import Change


def keep(axis: str, entries: Entries, *, over: str = "") -> Change:
    """Return the change that keeps some entries of an axis, in the given order, and drops the others.

    Dropped entries lose their weights and moments; those of kept entries are unchanged. Exact if the
    dropped entries contributed nothing.

    >>> import jax.numpy as jnp, optax
    >>> from jaxmorph import morphs
    >>> head_3_leaves_layer_0_and_head_1_layer_1 = morphs.keep(
    ...     "head", [[0, 1, 2], [0, 2, 3]], over="layer"
    ... )
    >>> params = {"value": jnp.arange(8.0).reshape(2, 4)}
    >>> params, _, _ = morphs.apply(
    ...     [head_3_leaves_layer_0_and_head_1_layer_1],
    ...     {"value": "layer | -> head"}, params, optax.EmptyState(), optax.identity(),
    ... )
    >>> params["value"].tolist()
    [[0.0, 1.0, 2.0], [4.0, 6.0, 7.0]]

    Args:
      axis: its name in the signatures.
      entries: indices to keep; with `over`, a list of them per entry of that axis, all of the same
        length.
      over: the stacked axis, or "" to keep the same entries everywhere. Its entries are counted
        before the call; if it changes in the same call, each list moves with its entry.

    Raises:
      InputError: when applied: an entry out of range or named twice, lists of different lengths or
        not one per entry of `over`, or a parameter with `axis` that is not stacked on `over`.
    """
    return Change(axis, lambda old: kept(axis, old, entries, over))
