"""The properties of each setting, read from its annotation in `config.settings`, and its value."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxmorph.cli.errors import InputError
from jaxmorph.config.settings import MayChange, PathTo, Settings, Within


@dataclass(frozen=True)
class Field:
    """A setting as its annotation describes it.

    Args:
      group: the attribute of `Settings` it belongs to.
      types: the types of its value; all members of a union.
      within: the range of a number; None: any, or not a number.
      path: what the path must point to; None: not a path.
      changeable: whether a resumed run may have another value; by default not.
    """

    group: str
    types: tuple[Any, ...]
    within: Within | None
    path: PathTo | None
    changeable: bool

    def problem(self, value: Any) -> str | None:
        """Return what is expected instead of a number; None if it can be used, or is no number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return (self.within or Within()).problem(value, float if float in self.types else int)


@functools.cache
def fields_of(settings: type[Settings]) -> Mapping[str, Field]:
    """Return every setting of a settings class by flag name, in the order of `--help`."""
    return {
        name: _field(group, hint)
        for group, kind in typing.get_type_hints(settings).items()
        if dataclasses.is_dataclass(kind)
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
    }


def check_flags(command: Any) -> None:
    """Check every number of a command's flags against its annotation.

    Args:
      command: a parsed dataclass whose fields are annotated like settings.

    Raises:
      InputError: names the flag.
    """
    for name, hint in typing.get_type_hints(type(command), include_extras=True).items():
        value = getattr(command, name)
        if problem := _field("", hint).problem(value):
            raise InputError(f"--{name}", "", value, problem)


def changeable(name: str) -> bool:
    """Return whether a run may be resumed with another value of a setting; not of one unknown here."""
    field = fields_of(Settings).get(name)
    return field is not None and field.changeable


def values_of(settings: Settings) -> dict[str, Any]:
    """Return the settings as one flat mapping of flag names to values."""
    fields = fields_of(type(settings))
    return {name: getattr(getattr(settings, field.group), name) for name, field in fields.items()}


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return the settings with the values of some flags replaced."""
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        changes.setdefault(fields_of(type(settings))[name].group, {})[name] = value
    groups = {
        group: dataclasses.replace(getattr(settings, group), **changed)
        for group, changed in changes.items()
    }
    return dataclasses.replace(settings, **groups)


def _field(group: str, hint: Any) -> Field:
    notes = list(_notes(hint))
    return Field(
        group,
        tuple(_types(hint)),
        next((note for note in notes if isinstance(note, Within)), None),
        next((note for note in notes if isinstance(note, PathTo)), None),
        MayChange in notes,
    )


def _notes(hint: Any) -> Iterator[Any]:
    """Yield the annotations of a type and of a union's members."""
    yield from getattr(hint, "__metadata__", ())
    for member in _members(_bare(hint)):
        yield from _notes(member)


def _types(hint: Any) -> Iterator[Any]:
    """Yield a type, or a union's members, without annotations."""
    members = _members(_bare(hint))
    if not members:
        yield _bare(hint)
    for member in members:
        yield from _types(member)


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else ()


def _bare(hint: Any) -> Any:
    return hint.__origin__ if hasattr(hint, "__metadata__") else hint
