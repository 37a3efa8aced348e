"""The shape of the device mesh: the number of devices along each axis. Accesses no devices."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from jaxmorph.cli.errors import nearest

BATCH_AXES = ("data", "fsdp")  # the mesh axes that a batch is sharded over
_SIZE = re.compile("0*[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class MeshShape:
    """The number of devices along each axis of the mesh.

    Args:
      data: shards the batch.
      fsdp: shards the batch, parameters and optimizer state.
      tensor: shards heads, MLP units and vocabulary.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def batch_parts(self) -> int:
        """Return the number of shards of a batch."""
        return math.prod(getattr(self, axis) for axis in BATCH_AXES)

    @property
    def batch_parts_in_words(self) -> str:
        """Return what a batch is sharded over, for messages."""
        return f"the mesh's {' × '.join(BATCH_AXES)} ({self.batch_parts})"


def parse_mesh(text: str) -> MeshShape | None:
    """Parse a mesh such as `data=2,fsdp=4`; None for an empty text: all devices on data.

    Raises:
      ValueError: with a sentence saying what is wrong.
    """
    axes = [field.name for field in dataclasses.fields(MeshShape)]
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in axes:
            raise ValueError(f"axes among {', '.join(axes)}{nearest(name, axes)}")
        if name in sizes or not _SIZE.fullmatch(size):
            raise ValueError("each axis once, with a whole number ≥ 1, as in data=2,fsdp=4")
        sizes[name] = int(size)
    return MeshShape(**sizes) if sizes else None
