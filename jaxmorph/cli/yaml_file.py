"""YAML as people mean it, without YAML 1.1's surprises.

YAML 1.1, which PyYAML reads, parses `3e-4` as a string, `yes` as a boolean, `017` as 15 and `1:30`
as 90, lets the last of two equal keys win, lets aliases grow without bound and lets tags (`!!bool`)
convert what they name. Here numbers are plain decimals, booleans are `true` and `false`, and repeated
keys, aliases and tags are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.text_file import LARGEST_NUMBER, plain_float, read_text

_MOST_NODES = 30_000  # names and values; PyYAML reads some 40,000 in a second


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the resolver tables below in place of YAML 1.1's."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 -- PyYAML's own class attribute
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, problem = self.peek_event(), ""
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            problem = "an alias (*name) is not allowed"
        elif event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"a tag ({tag}) is not allowed"
        elif self.nodes > _MOST_NODES:
            problem = f"at most {_MOST_NODES:,} names and values"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
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

    def construct_number(self, node: Any) -> float:
        if len(node.value) > LARGEST_NUMBER:
            problem = f"a number of at most {LARGEST_NUMBER} characters, this one is too long"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if node.tag.endswith(":int"):
            return int(node.value)
        special = node.value.lower().endswith(("inf", "nan"))
        return self.construct_yaml_float(node) if special else plain_float(node.value)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes text that is no text to YAML 1.1 or to the loader here."""


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
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def write_yaml(content: Any) -> str:
    """Return plain Python values as YAML that `read_yaml`, and YAML 1.1, read as the same."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file (JSON is YAML too) as plain Python values.

    Raises:
      InputError: as `read_text`; not valid, more than one document, an alias, a tag, a repeated key,
        or too many values; the message gives the line.
    """
    where, text = str(path), read_text(path)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(where, line, None, f"valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InputError(where, "", None, f"valid YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise InputError(where, "", None, "a flat mapping (nested too deep)") from None
