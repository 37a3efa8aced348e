"""Arrays on disk: all that this package uses of Orbax.

Orbax (and with it JAX) is imported on first use, because that takes a third of a second.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmorph.system.crash_points import crash_point

if TYPE_CHECKING:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    Arrays = Mapping[str, jax.Array | np.ndarray]


class ArrayFiles:
    """Write and read flat mappings of path to array; every process must call each method."""

    def __init__(self):
        self._orbax: ocp.AsyncCheckpointer | None = None

    def save(self, folder: Path, arrays: Arrays) -> None:
        """Write arrays into a new folder; they are complete on return.

        Raises:
          Exception: whatever Orbax and TensorStore raise when the disk fails.
        """
        import orbax.checkpoint as ocp

        # Orbax rejects arrays without entries; their shape is all there is to restore
        filled = {path: array for path, array in arrays.items() if 0 not in array.shape}
        checkpointer = self._checkpointer()
        checkpointer.save(folder, args=ocp.args.StandardSave(filled))
        crash_point("during_save")
        checkpointer.wait_until_finished()

    def restore(
        self, folder: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Return the arrays of a folder that `abstract` names, with its shardings.

        Args:
          folder: a folder that `save` wrote.
          abstract: path -> the shape and dtype that was saved (others are cast, not refused) and the
            target sharding, None for the first device.
        """
        import jax
        import jax.numpy as jnp
        import orbax.checkpoint as ocp

        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
            for path, leaf in abstract.items()
        }
        filled = {path: leaf for path, leaf in wanted.items() if 0 not in leaf.shape}
        arguments = ocp.args.PyTreeRestore(
            filled,
            restore_args=ocp.checkpoint_utils.construct_restore_args(filled),
            partial_restore=True,  # a large model's parameters can be restored without the rest
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(folder, args=arguments)
        return {
            path: found[path]
            if path in filled
            else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            for path, leaf in wanted.items()
        }

    def close(self) -> None:
        """Stop Orbax's threads; the next use starts new ones."""
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def _checkpointer(self) -> ocp.AsyncCheckpointer:
        import orbax.checkpoint as ocp

        if self._orbax is None:
            # Orbax logs every save there, and with tracebacks what it raises as well.
            logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
            _ignore_late_results()
            self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        return self._orbax


def copied_to_host(arrays: Arrays) -> dict[str, np.ndarray]:
    """Return copies in host memory, safe from the caller donating or changing `arrays`.

    On CPU the NumPy view of a JAX array is the buffer that gets donated, hence real copies.
    """
    import jax
    import numpy as np

    for array in arrays.values():
        if isinstance(array, jax.Array):
            array.copy_to_host_async()
    return {path: np.array(array, copy=True) for path, array in arrays.items()}


@functools.cache
def _ignore_late_results() -> None:
    """Ignore, from now on, what TensorStore's threads say to an event loop that is closed.

    Orbax closes its loop at the first write that fails, which `save` raises. The other writes go on,
    and each would print a traceback when it ends.
    """
    hook = sys.unraisablehook

    def without_late_results(unraisable: sys.UnraisableHookArgs) -> None:
        late = unraisable.exc_type is RuntimeError and str(unraisable.exc_value)
        if late != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_late_results
