"""Parameter signatures: one line per parameter naming the axes it consumes and produces.

A signature reads `stacked axes | consumed axes ARROW produced axes`, in the order of the array's
dimensions, with three arrows:

    ->   plain
    +>   adds to the residual stream
    *>   is a gain, neutral at one

"layer | embed -> head head_dim" is a query projection of every layer; "layer | +> embed" the bias of
a residual projection; "layer | *> embed" a normalisation scale. An axis has one name and one size
everywhere. The role of an axis in a parameter says how the parameter changes when the axis does
(`morphs`):

    stacked     one slice per entry: entries are copied, dropped, or freshly initialised
    consumed    input: a copy takes its share of the weights, a fresh entry has zeros
    produced    output: a copy has the same weights, a fresh entry is freshly initialised

Initialisation, decay masks, sharding and every change of shape are derived from the signatures;
nothing matches on path names.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

_AXIS = re.compile(r"[a-z][a-z0-9_]*")


class Arrow(Enum):
    """What a parameter does with the axes it produces."""

    PLAIN = "->"
    RESIDUAL = "+>"
    GAIN = "*>"


class Role(Enum):
    """The role of an axis in a parameter."""

    STACKED = "stacked"
    CONSUMED = "consumed"
    PRODUCED = "produced"


class SignatureError(ValueError):
    """A signature that cannot be read, or a table that does not cover its parameters."""


@dataclass(frozen=True)
class Signature:
    """The axes of one parameter, in the order of its dimensions."""

    stacked: tuple[str, ...]
    consumed: tuple[str, ...]
    arrow: Arrow
    produced: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """Return the axis of each dimension."""
        return self.stacked + self.consumed + self.produced

    @property
    def matrix_dimensions(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the indices of the consumed and of the produced dimensions."""
        first = len(self.stacked)
        middle = first + len(self.consumed)
        return tuple(range(first, middle)), tuple(range(middle, len(self.axes)))

    @property
    def is_matrix(self) -> bool:
        """Return whether it maps axes to axes; otherwise it is a bias or a gain."""
        return bool(self.consumed and self.produced) and self.arrow is not Arrow.GAIN

    @property
    def is_gain(self) -> bool:
        """Return whether it multiplies, so that one is its neutral value."""
        return self.arrow is Arrow.GAIN

    @property
    def adds_to_residual(self) -> bool:
        """Return whether its output is added to the residual stream."""
        return self.arrow is Arrow.RESIDUAL

    def role(self, axis: str) -> Role:
        """Return the role of `axis` here.

        Raises:
          KeyError: the parameter does not have that axis.
        """
        for role, axes in (
            (Role.STACKED, self.stacked),
            (Role.CONSUMED, self.consumed),
            (Role.PRODUCED, self.produced),
        ):
            if axis in axes:
                return role
        raise KeyError(axis)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the array shape for the given axis sizes."""
        return tuple(sizes[axis] for axis in self.axes)

    def __str__(self) -> str:
        words = [*self.consumed, self.arrow.value, *self.produced]
        return " ".join([*self.stacked, "|", *words] if self.stacked else words)


@functools.cache  # a plan of a thousand stages asks for the same few signatures at each
def parse_signature(text: str) -> Signature:
    """Parse a signature.

    Raises:
      SignatureError: not exactly one arrow, an axis that is not a plain name, or named twice.
    """
    stacked, bar, rest = text.rpartition("|")
    arrows = [arrow for arrow in Arrow if arrow.value in rest]
    if len(arrows) != 1 or rest.count(arrows[0].value) != 1:
        raise SignatureError(f"signature {text!r}: expected exactly one of ->, +> and *>")
    consumed, _, produced = rest.partition(arrows[0].value)
    signature = Signature(
        tuple(stacked.split()), tuple(consumed.split()), arrows[0], tuple(produced.split())
    )
    for axis in signature.axes:
        if not _AXIS.fullmatch(axis):
            raise SignatureError(f"signature {text!r}: {axis!r} is not an axis name")
    if len(set(signature.axes)) < len(signature.axes):
        raise SignatureError(f"signature {text!r}: each axis once")
    if not signature.axes or (bar and not signature.stacked):
        raise SignatureError(f"signature {text!r}: an axis name is missing")
    return signature


def parse_table(table: Mapping[str, str]) -> dict[str, Signature]:
    """Return the signatures of a table of `path: signature` lines.

    Raises:
      SignatureError: names the path and what is wrong with its line.
    """
    parsed = {}
    for path, text in table.items():
        try:
            parsed[path] = parse_signature(text)
        except SignatureError as error:
            raise SignatureError(f"{path}: {error}") from None
    return parsed


def check_coverage(
    signatures: Mapping[str, Signature], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that signatures and parameters match one to one, and agree on sizes.

    Args:
      signatures: signature by parameter path.
      shapes: array shape by parameter path.

    Raises:
      SignatureError: a parameter without signature, a signature without parameter, a wrong number of
        dimensions, or an axis with two sizes; each names the paths.
    """
    if missing := sorted(shapes.keys() - signatures.keys()):
        raise SignatureError(f"parameters without a signature: {', '.join(missing)}")
    if unused := sorted(signatures.keys() - shapes.keys()):
        raise SignatureError(f"signatures without a parameter: {', '.join(unused)}")
    axis_sizes(signatures, shapes)


def axis_sizes(
    signatures: Mapping[str, Signature], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Return the size of every axis, as the parameters' shapes give it.

    Raises:
      SignatureError: a shape with the wrong number of dimensions, or two sizes for one axis.
    """
    found: dict[str, tuple[int, str]] = {}
    for path, shape in shapes.items():
        axes = signatures[path].axes
        if len(axes) != len(shape):
            raise SignatureError(f"{path}: shape {shape} for the signature '{signatures[path]}'")
        for axis, size in zip(axes, shape, strict=True):
            known, first = found.setdefault(axis, (size, path))
            if known != size:
                raise SignatureError(f"axis {axis!r} is {known} in {first} and {size} in {path}")
    return {axis: size for axis, (size, _) in found.items()}


def count_parameters(signatures: Iterable[Signature], sizes: Mapping[str, int]) -> int:
    """Return the number of scalars in parameters of these signatures."""
    return sum(math.prod(signature.shape(sizes)) for signature in signatures)
