"""The shape of the device mesh: the number of devices along each axis. Accesses no devices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxmorph.cli.errors import nearest

BATCH_AXES = ("data", "fsdp")  # the mesh axes that a batch is sharded over
# parameter axis -> mesh axis; other axes are replicated
AXIS_RULES = {"embed": "fsdp", "vocab": "tensor", "head": "tensor", "mlp": "tensor"}
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
    def size(self) -> int:
        """Return the number of devices."""
        return self.data * self.fsdp * self.tensor

    def split(self, axes: Sequence[str], shape: Sequence[int]) -> list[str | None]:
        """Return the mesh axis that each dimension of an array is sharded over; None: it is whole.

        A dimension is sharded by the rule of its axis, if the mesh axis divides it and is still free.

        Args:
          axes: the axis of every dimension.
          shape: its size.
        """
        chosen: list[str | None] = []
        for axis, size in zip(axes, shape, strict=True):
            name = AXIS_RULES.get(axis)
            usable = name is not None and size % getattr(self, name) == 0 and name not in chosen
            chosen.append(name if usable else None)
        return chosen

    def part(self, axes: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the part of an array that each device holds."""
        split = self.split(axes, shape)
        return tuple(
            n // getattr(self, by) if by else n for n, by in zip(shape, split, strict=True)
        )

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
