"""Strict JSON for files that people write: nothing is accepted or dropped silently."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.text_file import LARGEST_NUMBER, plain_float, read_text


class _Object(dict):
    """A JSON object that remembers a repeated key."""

    repeated: str | None = None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file as plain Python values.

    NaN and Infinity, which Python writes, and numbers out of range are returned as non-finite floats,
    so that the caller can refuse them by field name.

    Raises:
      InputError: as `read_text`; not valid, or a key given twice.
    """
    where = str(path)
    try:
        content = json.loads(
            read_text(path), object_pairs_hook=_object, parse_int=_int, parse_float=plain_float
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(where, place, None, f"valid JSON ({error.msg})") from None
    except RecursionError:
        raise InputError(where, "", None, "a list of mappings (nested too deep)") from None
    _refuse_repeated(where, content)
    return content


def _int(text: str) -> float:
    return int(text) if len(text) <= LARGEST_NUMBER else math.inf


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object()
    for key, value in pairs:
        if key in found:
            found.repeated = key
        found[key] = value
    return found


def _refuse_repeated(where: str, content: Any) -> None:
    """Refuse the first object with a repeated key, naming its path from the top."""
    waiting: list[tuple[list[str], Any]] = [([], content)]
    while waiting:
        place, node = waiting.pop()
        if isinstance(node, _Object):
            if node.repeated is not None:
                spot = ": ".join([*place, node.repeated])
                raise InputError(where, spot, None, "each field once (it is given twice)")
            waiting += [([*place, key], child) for key, child in node.items()]
        elif isinstance(node, list):
            held = [(n, child) for n, child in enumerate(node, 1) if isinstance(child, dict | list)]
            waiting += [([*place, f"entry {n}"], child) for n, child in reversed(held)]
