"""Read the JSON lines of a run folder, of a long run only as many as a figure can show."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxmorph.cli.errors import InputError

FEWEST = 2_000  # lines of each kind that a long run keeps at least; at most twice as many


class Line(NamedTuple):
    """A line: its number from 1, and its JSON object."""

    number: int
    content: dict[str, Any]


def read_lines(path: Path) -> Iterator[Line]:
    """Yield all lines; a last line without a newline may be incomplete.

    Raises:
      InputError: the file cannot be read, or a line is not a JSON object.
    """
    for number, text in _texts(path):
        yield from _parsed(path, number, text)


def number_of_keys(text: bytes) -> int:
    """Return how many keys a line has, so that full lines and shorter ones are two kinds."""
    return text.count(b'":')


def read_thinned_lines(
    path: Path,
    whole: Iterable[str] = (),
    kind: Callable[[bytes], Hashable] = number_of_keys,
    fewest: int | None = None,
) -> Iterator[Line]:
    """Yield the lines, in order; of a long file evenly spaced ones.

    Lines are thinned kind by kind. The first and the last of a kind stay, and every line in which one
    of the texts `whole` occurs. Lines left out are not parsed, which is what takes the time.

    Args:
      path: the file.
      whole: texts of lines that all stay.
      kind: which lines are thinned by themselves.
      fewest: lines of each kind that a long file keeps at least; at most twice as many. Default: FEWEST.

    Raises:
      InputError: see `read_lines`.
    """
    marks = [text.encode() for text in whole]
    kept: list[tuple[int, bytes]] = []
    kinds: dict[Hashable, _Sample] = {}
    for number, text in _texts(path):
        if any(mark in text for mark in marks):
            kept.append((number, text))
        else:
            kinds.setdefault(kind(text), _Sample(fewest or FEWEST)).add(number, text)
    for number, text in heapq.merge(kept, *(sample.lines() for sample in kinds.values())):
        yield from _parsed(path, number, text)


@dataclass
class _Sample:
    """Every n-th of a series of lines, n a power of two that grows with their number."""

    fewest: int
    every: int = 1
    seen: int = 0
    last: tuple[int, bytes] = (0, b"")
    kept: list[tuple[int, bytes]] = field(default_factory=list)

    def add(self, number: int, text: bytes) -> None:
        self.last = number, text
        if self.seen % self.every == 0:
            self.kept.append(self.last)
            if len(self.kept) == 2 * self.fewest:
                self.kept, self.every = self.kept[::2], 2 * self.every
        self.seen += 1

    def lines(self) -> list[tuple[int, bytes]]:
        return self.kept if self.kept[-1] == self.last else [*self.kept, self.last]


def _texts(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, text) of each line that looks like an object, and of an incomplete last one."""
    try:
        with open(path, "rb") as file:
            for number, text in enumerate(file, start=1):
                if text.endswith(b"\n") and not (text.startswith(b"{") and text.endswith(b"}\n")):
                    raise _no_object(path, number, text)
                yield number, text
    except OSError as error:
        raise InputError(str(path), "", None, f"a readable file ({error.strerror})") from None


def _parsed(path: Path, number: int, text: bytes) -> Iterator[Line]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        if not text.endswith(b"\n"):
            return
        content = None
    if not isinstance(content, dict):
        raise _no_object(path, number, text)
    yield Line(number, content)


def _no_object(path: Path, number: int, text: bytes) -> InputError:
    shown = text[:60].decode(errors="replace").rstrip("\n")
    return InputError(str(path), f"line {number}", shown, "one JSON object per line")
