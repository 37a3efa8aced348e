"""The device mesh, and where each array of a run lies on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmorph.cli.errors import InputError
from jaxmorph.config.resolve import parse_mesh
from jaxmorph.model.signatures import Signature
from jaxmorph.model.tree_paths import parameter_path

# parameter axis -> mesh axis; what is not named here is replicated
AXIS_RULES = {"embed": "fsdp", "vocab": "tensor", "head": "tensor", "mlp": "tensor"}
BATCH_AXES = ("data", "fsdp")


def make_mesh(text: str) -> Mesh:
    """Return the mesh that `--mesh` names, over the first devices; "" is data = all devices.

    Raises:
      InputError: there are fewer devices than the mesh names.
    """
    devices = jax.devices()
    sizes = parse_mesh(text or f"data={len(devices)}")
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        raise InputError("--mesh", "", text, f"at most the {len(devices)} devices there are")
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:wanted],
    )


def parameter_sharding(mesh: Mesh, signature: Signature, shape: tuple[int, ...]) -> NamedSharding:
    """Return where a parameter lies: each axis on its mesh axis, if that divides its size."""
    spec = []
    for axis, size in zip(signature.axes, shape, strict=True):
        name = AXIS_RULES.get(axis)
        usable = name is not None and size % mesh.shape[name] == 0 and name not in spec
        spec.append(name if usable else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def state_shardings(mesh: Mesh, state: Any, signatures: Mapping[str, Signature]) -> Any:
    """Return the sharding of every leaf of a state (parameters, optimizer state, scalars).

    A leaf that mirrors a parameter (the dict keys that end its path name it, and it has its shape)
    lies as the parameter does; anything else is replicated.

    Args:
      mesh: the device mesh.
      state: a pytree of arrays or ShapeDtypeStructs.
      signatures: signature by parameter path.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        signature = signatures.get(parameter_path(path))
        if signature is None or len(signature.axes) != len(leaf.shape):
            return replicated(mesh)
        return parameter_sharding(mesh, signature, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: sequences over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_batch(mesh: Mesh, local_BT: np.ndarray) -> jax.Array:
    """Return the global batch on the mesh, from the part of it that this process has read."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local_BT)
