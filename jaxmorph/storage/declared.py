"""JSON values against the types that declare them.

What a file must hold is declared once, by the dataclass or TypedDict that the code uses; a value is
compared with that before anything else touches it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Never, Protocol, runtime_checkable

from jaxmorph.cli.printing import quoted

_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "null",
    Never: "the name of a field",
}


class _Missing:
    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


@runtime_checkable
class Limit(Protocol):
    """An annotation that limits a number, such as `config.settings.Within`."""

    def holds(self, value: float, /) -> bool:
        """Return whether a number is within it."""
        ...


def mismatch(value: Any, kind: Any, place: str = "") -> str | None:
    """Return what in a JSON value is not of the type that declares it; None if all is.

    A whole number is also a float; true and false are no numbers. A dataclass's value has all its
    fields and no others; a TypedDict's may have more.

    Args:
      value: as `json.loads` returns it.
      kind: dataclasses, TypedDicts, unions, `Literal`, `list`, `tuple`, `dict` and `Mapping`, numbers
        with a `Limit`, `str`, `bool`, None and `Any`, in any combination.
      place: of the value in its file.
    """
    parts = None if value is _MISSING else _parts(value, kind)
    if parts is None:
        return f"{place.lstrip('.') or 'it'} is {quoted(value)}, not {_words(kind)}"
    found = (mismatch(item, of, place + name) for name, item, of in parts)
    return next((each for each in found if each is not None), None)


def _parts(value: Any, kind: Any) -> list[tuple[str, Any, Any]] | None:
    """Name, value and type of what a value of a type consists of; None if it is not of that type."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return [] if any(mismatch(value, member) is None for member in members) else None
    if origin is Annotated:
        return [] if _is_within(value, members) else None
    if origin in (list, tuple) and isinstance(value, list):
        return _entries(value, members if origin is tuple else members * len(value))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return [(f"[{quoted(name)}]", item, members[1]) for name, item in value.items()]
    if (dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)) and isinstance(value, dict):
        return _fields(value, kind)
    holds = value in members if origin is Literal else _is_plain(value, kind)
    return [] if holds else None


def _is_within(value: Any, members: tuple[Any, ...]) -> bool:
    limits = [each for each in members[1:] if isinstance(each, Limit)]
    return mismatch(value, members[0]) is None and all(limit.holds(value) for limit in limits)


def _entries(value: list, kinds: tuple[Any, ...]) -> list[tuple[str, Any, Any]] | None:
    if len(value) != len(kinds):
        return None
    return [(f"[{n}]", item, of) for n, (item, of) in enumerate(zip(value, kinds, strict=True))]


def _fields(value: dict, kind: Any) -> list[tuple[str, Any, Any]]:
    kinds = typing.get_type_hints(kind, include_extras=True)
    known = [(f".{name}", value.get(name, _MISSING), of) for name, of in kinds.items()]
    if typing.is_typeddict(kind):
        return known
    unknown = [name for name in value if name not in kinds]
    return known + [(f"[{quoted(name)}]", value[name], Never) for name in unknown]


def _is_plain(value: Any, kind: Any) -> bool:
    """Whether a value is of a type without parts."""
    if kind is Any:
        return True
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is kind


def _words(kind: Any) -> str:
    """What a value of a type is called."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(member) for member in members)
    if origin is Annotated:
        limits = (f" {each}" for each in members[1:] if isinstance(each, Limit))
        return _words(members[0]) + "".join(limits)
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin is tuple:
        return f"a list of {len(members)}"
    if origin is list:
        return "a list"
    return _PLAIN.get(kind, "an object")
