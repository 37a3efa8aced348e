"""Arrays on disk, by Orbax: all that this package asks of it.

Orbax (and with it JAX) is imported where it is used: it takes a third of a second.
"""

from __future__ import annotations

import logging
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
    """Writes and reads flat mappings of path to array; with several processes, all of them call."""

    def __init__(self):
        self._orbax: ocp.AsyncCheckpointer | None = None

    def save(self, folder: Path, arrays: Arrays) -> None:
        """Write arrays into a new folder; they are whole on return.

        Raises:
          Exception: whatever Orbax and TensorStore raise when the disk fails them.
        """
        import orbax.checkpoint as ocp

        # Orbax refuses arrays without entries; their shape is all there is to know of them
        filled = {path: array for path, array in arrays.items() if 0 not in array.shape}
        checkpointer = self._checkpointer()
        checkpointer.save(folder, args=ocp.args.StandardSave(filled))
        crash_point("during_save")
        checkpointer.wait_until_finished()

    def restore(
        self, folder: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Return those arrays of a folder that `abstract` names, laid out as it says.

        Args:
          folder: what `save` wrote.
          abstract: path -> the shape and dtype that was saved (others are cast, not refused) and
            the sharding wanted, None for the first device.
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
            partial_restore=True,  # of a large model one may want the parameters alone
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
        """End Orbax's threads; another use starts new ones."""
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def _checkpointer(self) -> ocp.AsyncCheckpointer:
        import orbax.checkpoint as ocp

        if self._orbax is None:
            logging.getLogger("absl").setLevel(logging.ERROR)  # where Orbax narrates each save
            self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        return self._orbax


def copied_to_host(arrays: Arrays) -> dict[str, np.ndarray]:
    """Return copies in host memory, which the caller's donating or changing `arrays` cannot reach.

    On CPU the NumPy view of a JAX array is the very buffer that gets donated, hence true copies.
    """
    import jax
    import numpy as np

    for array in arrays.values():
        if isinstance(array, jax.Array):
            array.copy_to_host_async()
    return {path: np.array(array, copy=True) for path, array in arrays.items()}
