"""Numbers on the command line: plain decimals, where Python's own conversions accept more."""

from __future__ import annotations

import math
import re
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jaxmorph.cli.text_file import LARGEST_NUMBER, plain_float

_PLAIN = {
    int: re.compile(r"[-+]?[0-9]+"),
    float: re.compile(
        r"[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|inf|nan)", re.IGNORECASE
    ),
}


class PlainNumbers:
    """Convert the numbers of one command line, and remember the last text that is none.

    `int` and `float` also accept `1_000`, surrounding spaces and the digits of every script.

    Attributes:
      refused: that text, and the rule that it breaks in words, "" if it is no number at all.
    """

    def __init__(self) -> None:
        self.refused: tuple[str, str] | None = None

    def registry(self) -> ConstructorRegistry:
        """Return tyro's rules with these for `int` and `float`."""
        registry = ConstructorRegistry()
        registry.primitive_rule(self._rule)
        return registry

    def _rule(self, info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        kind: Any = info.type
        if kind not in _PLAIN:
            return None
        accepted = (int,) if kind is int else (int, float)
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=lambda words: self._number(kind, words[0]),
            is_instance=lambda value: isinstance(value, accepted) and not isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )

    def _number(self, kind: type, text: str) -> float:
        if len(text) > LARGEST_NUMBER:
            self.refused = text, f" of at most {LARGEST_NUMBER} characters"
        elif _PLAIN[kind].fullmatch(text):
            if kind is int:
                return int(text)
            number = plain_float(text)
            if math.isfinite(number) or "n" in text.lower():  # inf and nan, as written
                return number
            self.refused = text, " that is not infinite as a float"
        else:
            unusual = "_" in text or text != text.strip() or not text.isascii()
            self.refused = text, " in the digits 0 to 9" if unusual and _converts(text) else ""
        raise ValueError("not a plain number")


def _converts(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
