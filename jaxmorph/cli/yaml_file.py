"""YAML as people mean it, without YAML 1.1's surprises.

YAML 1.1, which PyYAML reads, parses `3e-4` as a string, `yes` as a boolean, `017` as 15 and `1:30`
as 90, lets the last of two equal keys win and lets aliases grow without bound. Here numbers are
plain decimals, booleans are `true` and `false`, and repeated keys and aliases are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from jaxmorph.cli.errors import InputError

_LARGEST_FILE = 4 << 20  # bytes; a settings or schedule file is a few kilobytes
LARGEST_NUMBER = 400  # characters; int() refuses more than 4,300 with its own error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the resolver tables below in place of YAML 1.1's."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 -- PyYAML's own class attribute

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias (*name) is not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a plain name", problem_mark=key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is also on line {seen[key_node.value]}",
                    problem_mark=key_node.start_mark,
                )
            seen[key_node.value] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _int(loader: _Loader, node: Any) -> int:
    if len(node.value) > LARGEST_NUMBER:
        raise yaml.MarkedYAMLError(problem="a number is too long", problem_mark=node.start_mark)
    return int(node.value)


_RESOLVERS: list[tuple[str, str, list[str]]] = [
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.inf|\.Inf|\.INF)$|^(?:\.nan|\.NaN|\.NAN)$",
        list("-+.0123456789"),
    ),
]
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def read_text(path: Path) -> str:
    """Return the text of a settings or schedule file.

    Raises:
      InputError: unreadable, not UTF-8 or too large.
    """
    where = str(path)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InputError(where, "", path.stat().st_size, f"at most {_LARGEST_FILE} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(where, "", None, f"UTF-8 text ({error.reason} at {error.start})") from None
    except OSError as error:
        raise InputError(where, "", None, f"a readable file ({error.strerror})") from None


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file (JSON is YAML too) as plain Python values.

    Raises:
      InputError: unreadable, not UTF-8, too large, not valid, more than one document, aliases, or a
        repeated key; the message gives the line.
    """
    where, text = str(path), read_text(path)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(where, line, None, f"valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(where, "", None, f"valid YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise InputError(where, "", None, "a flat mapping (nested too deep)") from None
