"""The device mesh, and the sharding of each array of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmorph.cli.errors import InputError
from jaxmorph.config.mesh import BATCH_AXES, MeshShape
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.model.signatures import Signature
from jaxmorph.model.tree_paths import declared_for, parameter_path
from jaxmorph.step.parts import Parts
from jaxmorph.step.state import TrainState


def make_mesh(shape: MeshShape | None) -> Mesh:
    """Return a mesh of this shape over the first devices; None: data = all devices.

    Raises:
      InputError: there are fewer devices than the mesh needs.
    """
    devices = jax.devices()
    sizes = dataclasses.asdict(shape or MeshShape(data=len(devices)))
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        text = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise InputError("--mesh", "", text, f"at most the {len(devices)} devices there are")
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:wanted],
    )


def mesh_shape(mesh: Mesh) -> MeshShape:
    """Return the number of devices along each axis of a mesh."""
    return MeshShape(**mesh.shape)


def axes_sharding(mesh: Mesh, axes: Sequence[str], shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of an array over named axes: each on its mesh axis, if that divides it.

    An array whose number of dimensions differs from its axes is replicated.
    """
    if len(axes) != len(shape):
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*mesh_shape(mesh).split(axes, shape)))


def state_shardings(
    mesh: Mesh, state: TrainState, signatures: Mapping[str, Signature], parts: Parts
) -> TrainState:
    """Return the sharding of every leaf of a state.

    Variables, and leaves of the optimizer's state that are declared over axes, are sharded by those;
    for the rest see `shardings_like_parameters`.

    Args:
      mesh: the device mesh.
      state: a state of arrays or ShapeDtypeStructs.
      signatures: signature by parameter path.
      parts: declares the variables, and the optimizer's fields that mirror no parameter.
    """

    def place_variable(name: str, value: Any) -> Any:
        axes = parts.variables[name].axes.names
        return jax.tree.map(lambda leaf: axes_sharding(mesh, axes, leaf.shape), value)

    declared = parts.optimizer_fields
    return TrainState(
        params=shardings_like_parameters(mesh, state.params, signatures),
        opt_state=shardings_like_parameters(mesh, state.opt_state, signatures, declared),
        variables={name: place_variable(name, value) for name, value in state.variables.items()},
    )


def shardings_like_parameters(
    mesh: Mesh,
    tree: Any,
    signatures: Mapping[str, Signature],
    fields: Mapping[str, float | str | NamedAxes] | None = None,
) -> Any:
    """Return the sharding of every leaf of a pytree that mirrors parameters.

    A leaf whose path ends in the dict keys of a parameter, and that has the same number of dimensions,
    is sharded like the parameter; anything else is replicated.

    Args:
      mesh: the device mesh.
      tree: a pytree of arrays or ShapeDtypeStructs.
      signatures: signature by parameter path.
      fields: the axes of leaves that mirror no parameter, by field; see `morphs.apply`.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        signature = signatures.get(parameter_path(path))
        declared = declared_for(path, fields or {})
        if isinstance(declared, NamedAxes):
            return axes_sharding(mesh, declared.names, leaf.shape)
        axes = signature.axes if signature else ()
        return axes_sharding(mesh, axes, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a replicated array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of each array of a batch: examples over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_batch(mesh: Mesh, batch: Any) -> Any:
    """Return the global batch, sharded over the mesh, from this process's part of it."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda local: jax.make_array_from_process_local_data(sharding, local), batch
    )
