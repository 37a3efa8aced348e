"""The memory of the devices a run is on: how much there is, and how much is free."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxmorph.growth.fitting import Room
from jaxmorph.growth.plan import Plan
from jaxmorph.step.memory import memory
from jaxmorph.step.sharding import mesh_shape
from jaxmorph.system import processes
from jaxmorph.system.host_memory import available_memory, memory_limits

_MUCH = 4  # a state that takes more than this part of what is free may be too much for it


def room_of(mesh: Mesh) -> Room:
    """Return the memory there is for the devices of a mesh."""
    if _computes_on_host(mesh):
        return Room(memory_limits(), sharing=len(mesh.local_devices))
    found = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    known = [limit for limit in found if limit is not None]
    return Room({"a device's memory": min(known)} if known else {}, host=memory_limits())


def may_be_too_large(plan: Plan, mesh: Mesh, index: int) -> bool:
    """Return whether making the state of a stage could end the process for lack of memory.

    That is so if it takes more than a quarter of what is free, or that is not known.
    """
    state = memory(plan.stages[index].shape, plan.settings.optimizer, mesh_shape(mesh)).state
    if _computes_on_host(mesh):
        state, free = state * len(mesh.local_devices), available_memory()
    else:
        stats = [device.memory_stats() or {} for device in mesh.local_devices]
        known = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if "bytes_limit" in s]
        free = min(known, default=None)
    return bool(processes.agreed(free is None or _MUCH * state > free))


def _computes_on_host(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"
