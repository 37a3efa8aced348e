"""Deeper: layers repeated, or fresh ones, which may begin as the identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxmorph.morphs.axis_map import repeat
from jaxmorph.morphs.moments import Kind
from jaxmorph.morphs.transport import Report, Signatures, axis_size, transport


def deepen(
    signatures: Signatures,
    params: Any,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    *,
    to: int,
    axis: str = "layer",
    key: jax.Array | None = None,
    order: str = "stack",
    identity: bool = False,
    fresh: Any = None,
    moments: str = "provenance",
    fresh_nu: float = 1.0,
    fields: Mapping[str, Kind] | None = None,
) -> tuple[Any, optax.OptState, Report]:
    """Return parameters, optimizer state and a report with more layers of any model that stacks them.

    Args:
      signatures: signature of every parameter, by path.
      params: nested dicts of arrays; a layer's parameters are stacked on `axis`.
      opt_state: the optimizer's state.
      optimizer: what made it.
      to: the number of layers after.
      axis: the stacked axis.
      key: PRNG key; only for what is drawn.
      order: see `axis_map.repeat`.
      identity: the new layers' parameters with `+>` are zero, so that they add nothing. Exact for
        residual networks.
      fresh: parameters of the new shapes: the new layers come from there instead of being copies.
      moments: see `transport`.
      fresh_nu: see `transport`.
      fields: see `transport`.

    Raises:
      InputError: no such axis, no growth, or an optimizer whose state cannot be moved.
      SignatureError: signatures that do not match the parameters.
    """
    old = axis_size(signatures, params, axis)
    change = repeat(axis, old, to, order=order, fresh=fresh is not None, silent=identity)
    return transport(
        signatures,
        [change],
        params,
        opt_state,
        optimizer,
        fresh=fresh,
        key=key,
        moments=moments,
        fresh_nu=fresh_nu,
        fields=fields,
    )
