"""The YAML file of settings: a flat mapping of flag names to values, read and written."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.cli.yaml_file import read_yaml, write_yaml
from jaxmorph.config.fields import Field, values_of
from jaxmorph.config.settings import Settings


def to_yaml(settings: Settings) -> str:
    """Return the settings as a YAML file that reproduces the run (`--config` reads it)."""
    return write_yaml(values_of(settings))


def read_settings(path: Path, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the values of a settings file, each converted to its setting's type.

    Raises:
      InputError: no such file, not a flat mapping, an unknown name or a value of the wrong type.
    """
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(
            str(path), "", type(content).__name__, "a flat mapping of flag names to values"
        )
    for name, value in content.items():
        if not isinstance(name, str) or name not in fields:
            raise InputError(str(path), "", name, f"a known flag name{nearest(str(name), fields)}")
        content[name] = _typed(str(path), name, value, fields[name].types)
    return content


def _typed(where: str, name: str, value: Any, options: tuple[Any, ...]) -> Any:
    """Convert a YAML value to its setting's type; an integer is accepted for a float."""
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is float and type(value) is int:
            try:
                return float(value)
            except OverflowError:
                return value  # the range check refuses it
        if type(value) is option:
            return value
    shown = "null" if value is None else value
    raise InputError(where, name, shown, " or ".join(map(_describe, options)))


def _describe(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        choices = typing.get_args(option)
        return f"one of {', '.join(map(str, choices))}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return names[option]
