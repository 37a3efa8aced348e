"""Text that comes from outside, from a file, a corpus, a model, a path or a flag, as it is printed.

Control characters act on a terminal: they can hide, overwrite or reorder what stands there. Here they
become visible escapes, and what is quoted is cut to a length that a reader can take in.
"""

from __future__ import annotations

import re
import reprlib
import sys
from typing import Any, TextIO

LONGEST_QUOTE, LONGEST_NAME, _LONGEST_SENTENCE = 300, 500, 2000  # characters

# The control characters of ASCII and of Latin-1, line and paragraph separators, the overrides of the
# direction of writing, and halves of surrogate pairs, which no encoding can print.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str, kept: str = "") -> str:
    r"""Return text whose control characters are written as escapes, such as `\x1b`.

    Args:
      text: from anywhere.
      kept: control characters that stay, for example a newline.
    """
    return _CONTROLS.sub(
        lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], text
    )


def clipped(text: str, longest: int) -> str:
    """Return text with its middle left out where it has more than `longest` characters."""
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]}… ({len(text):,} characters) …{text[head - longest :]}"


def named(text: str) -> str:
    """Return a name or a path in one line of bounded length, without control characters."""
    return escaped(clipped(text, LONGEST_NAME))


def sentence(text: str) -> str:
    """Return words in one line of bounded length, without control characters."""
    return escaped(clipped(" ".join(text.splitlines()), _LONGEST_SENTENCE))


def quoted(value: Any) -> str:
    """Return the `repr` of a value of any size and depth, of bounded length and time."""
    if isinstance(value, str):
        return clipped(repr(clipped(value, LONGEST_QUOTE)), 4 * LONGEST_QUOTE)  # escapes are longer
    return clipped(_QUOTE.repr(value), LONGEST_QUOTE)


def say(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print text at once, with its control characters escaped except newlines and tabs.

    Args:
      text: what to print.
      end: printed after it.
      file: where to; None: stdout.
    """
    print(escaped(text, kept="\n\t"), end=end, file=file or sys.stdout, flush=True)


class _Quote(reprlib.Repr):
    """The `repr` of values as files have them: cut in depth, in length, and between entries."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict = 3, 6, 6
        self.maxstring, self.maxlong, self.maxother = 100, 100, 100

    def repr1(self, x: Any, level: int) -> str:
        """Treat a subclass of dict, as the JSON reader returns, like a dict."""
        return self.repr_dict(dict(x), level) if isinstance(x, dict) else super().repr1(x, level)

    def repr_dict(self, x: Any, level: int) -> str:
        """Quote the first entries in their order (reprlib sorts them)."""
        if x and level <= 0:
            return "{...}"
        pairs = [f"{self.repr1(k, level - 1)}: {self.repr1(x[k], level - 1)}" for k in [*x][:6]]
        return f"{{{', '.join(pairs + ['...'] * (len(x) > len(pairs)))}}}"


_QUOTE = _Quote()
