"""UTF-8 text in pieces: a long text is never decoded or encoded at once."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

Text = bytes | memoryview  # UTF-8
_PIECE = 1 << 14  # bytes


def decoded(text: Text) -> Iterator[str]:
    """Yield the characters of `text`, some of them at a time.

    Raises:
      UnicodeDecodeError: not UTF-8; its `start` counts from the beginning of `text`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _PIECE):
        kept = len(decoder.getstate()[0])  # bytes of a character that the piece before began
        part = text[start : start + _PIECE]
        try:
            yield decoder.decode(part, final=start + len(part) == len(text))
        except UnicodeDecodeError as error:
            error.start += start - kept
            raise


def count_characters(text: Text) -> int:
    """Return the number of characters.

    Raises:
      UnicodeDecodeError: not UTF-8.
    """
    return sum(map(len, decoded(text)))


def byte_of_character(text: Text, number: int) -> int:
    """Return the index of the first byte of character `number`, which may be the end of `text`."""
    place = 0
    for part in decoded(text):
        if number <= len(part):
            return place + len(part[:number].encode())
        number, place = number - len(part), place + len(part.encode())
    return place


def pieces(text: Text, blanks: str) -> Iterator[str]:
    """Yield `text` cut before some of its `blanks` that follow another character, or in one piece.

    Args:
      text: UTF-8.
      blanks: characters to cut before; "": in one piece.
    """
    waiting: list[str] = []
    for part in decoded(text):
        before = waiting[-1][-1] if waiting else " "
        cut = _last_cut(before + part, blanks) - 1
        if cut < 0:
            waiting += [part] if part else []
            continue
        yield "".join([*waiting, part[:cut]])
        waiting = [part[cut:]]
    yield "".join(waiting)


def _last_cut(text: str, blanks: str) -> int:
    """Return the index of the last of `blanks` that follows no white space, or 0."""
    for index in range(len(text) - 1, 0, -1) if blanks else ():
        if text[index] in blanks and not text[index - 1].isspace():
            return index
    return 0
