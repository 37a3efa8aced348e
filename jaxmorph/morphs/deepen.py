"""Deeper models: repeat layers or add fresh ones, optionally as the identity."""

from __future__ import annotations

from typing import Any

from jaxmorph.morphs.axis_map import check_order, repeat
from jaxmorph.morphs.change import Change, FreshStart


def deepen(
    *,
    to: int,
    axis: str = "layer",
    order: str = "stack",
    identity: bool = False,
    fresh: Any = None,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
) -> Change:
    """Return the change that repeats or adds layers of a model that stacks them.

    >>> import jax.numpy as jnp, optax
    >>> from jaxmorph import morphs
    >>> deep, _, _ = morphs.apply(
    ...     [morphs.deepen(to=4, order="interleave", identity=True)],
    ...     {"up": "layer | -> hidden", "down": "layer | +> width"},
    ...     {"up": jnp.asarray([[1.0], [2.0]]), "down": jnp.asarray([[3.0], [4.0]])},
    ...     optax.EmptyState(), optax.identity(),
    ... )
    >>> deep["up"].ravel().tolist(), deep["down"].ravel().tolist()
    ([1.0, 1.0, 2.0, 2.0], [3.0, 0.0, 4.0, 0.0])

    Args:
      to: the number of layers after.
      axis: the stacked axis.
      order: `stack` 0 1 0 1, `interleave` 0 0 1 1, or `middle`, which repeats the middle half,
        0 1 2 1 2 3.
      identity: zero the new layers' parameters with `+>`, so that they add nothing. Exact for
        residual networks.
      fresh: parameters of the new shapes; new layers are taken from there instead of copied.
      moments: of copies, "provenance", "fresh" or "restart"; see `FreshStart`.
      fresh_nu: second moments of fresh entries, as a multiple of their leaf's mean; see `FreshStart`.

    Raises:
      InputError: an unknown order or `moments`; when applied, no growth.
    """
    check_order(order)
    return Change(
        axis,
        lambda old: repeat(axis, old, to, order=order, fresh=fresh is not None, silent=identity),
        FreshStart(fresh, moments, fresh_nu),
    )
