"""What a tokenizer is, and those that need no library: bytes and characters."""

from __future__ import annotations

import functools
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.data.pieces import Text, decoded

FORMAT_KEY = "jaxmorph_tokenizer"  # in our JSON; a Hugging Face tokenizer.json lacks it


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds every id below `vocab_size`."""
    return np.min_scalar_type(max(vocab_size - 1, 0))


@dataclass(frozen=True)
class Tokenizer(ABC):
    """A frozen map between text and ids.

    Attributes:
      vocab_size: every id is below it.
      end_of_document: the id that ends a document, or None.
    """

    vocab_size: int
    end_of_document: int | None

    @abstractmethod
    def encode(self, text: str | Text) -> np.ndarray:
        """Return the ids of `text` (bytes are UTF-8) as a 1-D array of `token_dtype(vocab_size)`.

        Raises:
          InputError: the text cannot be encoded with this vocabulary.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of `ids`.

        Bytes that are not UTF-8 decode to U+FFFD. Ids outside the vocabulary, which a head padded
        by `vocab_multiple` can produce, are dropped.
        """

    @abstractmethod
    def to_json(self) -> str:
        """Return all that `tokenization.from_json` needs."""

    def encoded(self, documents: Iterable[Text], *, separate: bool) -> Iterator[np.ndarray]:
        """Yield the ids of all `documents` (UTF-8) in order, in arrays of a limited size.

        With `separate` each document is followed by the end-of-document id, or by a newline if the
        tokenizer has none.
        """
        end = np.empty(0, token_dtype(self.vocab_size))
        if separate:
            single = self.end_of_document
            end = self.encode("\n") if single is None else np.array([single], end.dtype)
        return self._encode_pieces(self._marked_pieces(documents), end)

    def encode_documents(self, documents: Iterable[Text], *, separate: bool) -> np.ndarray:
        """Return the ids of all `documents` in one 1-D array; see `encoded`."""
        parts = [part for part in self.encoded(documents, separate=separate) if len(part)]
        nothing = np.empty(0, token_dtype(self.vocab_size))
        return parts[0] if len(parts) == 1 else np.concatenate([nothing, *parts])

    def _marked_pieces(self, documents: Iterable[Text]) -> Iterator[str | Text | None]:
        """Yield the pieces of each document, then None."""
        for document in documents:
            yield from self._pieces(document)
            yield None

    def _pieces(self, document: Text) -> Iterable[str | Text]:
        """Cut a document where that changes no ids."""
        return decoded(document)

    def _encode_pieces(
        self, parts: Iterable[str | Text | None], end: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Yield the ids of each piece, and `end` for None."""
        return (end if part is None else self.encode(part) for part in parts)


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """The 256 byte values; byte 0, which plain text does not use, ends a document."""

    vocab_size: int = 256
    end_of_document: int | None = 0

    def encode(self, text: str | Text) -> np.ndarray:
        """Return the bytes of `text`; bytes are returned unchanged."""
        return np.frombuffer(as_bytes(text) if isinstance(text, str) else text, np.uint8)

    def _pieces(self, document: Text) -> Iterable[Text]:
        return [document]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of the bytes `ids`."""
        return bytes(known_ids(ids, 256).tolist()).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Return all that `tokenization.from_json` needs."""
        return json.dumps({FORMAT_KEY: 1, "kind": "byte"})


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """The characters of a corpus, sorted by code point as in nanoGPT, or in the order of a file."""

    characters: str

    @staticmethod
    def of(characters: Iterable[str]) -> CharTokenizer:
        """Return the tokenizer of the distinct `characters`."""
        return CharTokenizer.in_order("".join(sorted(set(characters))))

    @staticmethod
    def in_order(characters: str) -> CharTokenizer:
        """Return the tokenizer in which the n-th of `characters` has id n.

        Raises:
          ValueError: none, one of them twice, or half of a surrogate pair.
        """
        if not isinstance(characters, str) or not characters:
            raise ValueError("no characters")
        if len(set(characters)) < len(characters):
            raise ValueError("a character twice")
        characters.encode("utf-8")
        return CharTokenizer(len(characters), None, characters)

    @staticmethod
    def of_documents(documents: Iterable[Text], *, separate: bool) -> CharTokenizer:
        """Return the tokenizer of all characters in `documents` (and newline, with `separate`)."""
        found = {"\n"} if separate else set()
        for document in documents:
            for part in decoded(document):
                found.update(part)
        return CharTokenizer.of(found)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """Return the id of every code point, and -1 for those that have none."""
        ids = np.full(sys.maxunicode + 1, -1, np.int32)
        ids[np.frombuffer(self.characters.encode("utf-32-le"), "<u4")] = np.arange(self.vocab_size)
        return ids

    def encode(self, text: str | Text) -> np.ndarray:
        """Return the id of every character.

        Raises:
          InputError: a character that is not in the vocabulary.
        """
        codes = np.frombuffer(as_text(text).encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._ids[codes]
        if (ids < 0).any():
            missing = chr(int(codes[np.argmin(ids)]))
            raise InputError("text", "", missing, "characters of the corpus the vocabulary is from")
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the characters `ids`."""
        return "".join(self.characters[i] for i in known_ids(ids, self.vocab_size).tolist())

    def to_json(self) -> str:
        """Return all that `tokenization.from_json` needs."""
        return json.dumps({FORMAT_KEY: 1, "kind": "char", "characters": self.characters})


def known_ids(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the ids that are in the vocabulary."""
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    return array[(array >= 0) & (array < vocab_size)]


def as_text(text: str | Text) -> str:
    """Return the characters of `text`, or refuse what is not UTF-8."""
    try:
        return text if isinstance(text, str) else str(text, "utf-8")
    except UnicodeDecodeError as error:
        raise InputError("text", f"byte {error.start}", None, "UTF-8") from None


def as_bytes(text: str) -> bytes:
    """Return `text` in UTF-8, or refuse what has no such form."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # half a surrogate pair: a shell argument that is not UTF-8
        raise InputError("text", f"character {error.start}", None, "valid Unicode") from None
