"""From `--data` and `--tokenizer` to tokenised corpora."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.printing import named, say
from jaxmorph.config.nanogpt_files import bin_files, ways_to_name
from jaxmorph.data.cache import Cache, digest
from jaxmorph.data.corpora import STDLIB, Documents, read_documents, split_documents
from jaxmorph.data.nanogpt import open_bin
from jaxmorph.data.plain_tokenizers import CharTokenizer, Tokenizer
from jaxmorph.data.subword import train_bpe
from jaxmorph.data.token_files import TokenFile, Tokens, chunks
from jaxmorph.data.tokenization import load_tokenizer

_FORMAT = "1"  # part of every hash: increment it when reading, splitting or tokenising changes
_BYTES_IN_MEMORY = 64 << 20
_LONG_LOOK = 2 << 30  # bytes, which take seconds


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A corpus ready for training.

    Attributes:
      train: [tokens] unsigned ids of the training split, in memory (do not write) or in a file.
      val: [tokens] of the validation split.
      tokenizer: what the ids mean.
      sha256: digest of the text, of both splits' ids and of the vocabulary size.
      description: one line for people.
    """

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    sha256: str
    description: str


@dataclass(frozen=True, eq=False)
class _Splits:
    """Both splits' ids, their digests, and their tokenizer."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    digests: list[str]


def load_tokens(
    data: str,
    tokenizer: str,
    *,
    seq_len: int,
    val_fraction: float,
    bpe_vocab_size: int,
    cache_dir: str | None,
    where: str = "--data",
) -> TokenizedCorpus:
    """Read, split and tokenise a corpus. The user's files are never written.

    With several documents (stdlib, folder, JSONL) whole ones are held out, chosen by a hash of their
    names so that close to `val_fraction` of the bytes is validation; with one text (or .bin without
    its val.bin) the end is. Text is read into memory once; its ids are written to the cache as they
    come, and read from there. A .bin file is read where it is.

    Args:
      data: `stdlib`, a text file, a folder of text files, a .jsonl file with a "text" per line, a
        nanoGPT .bin file (uint16 ids), or a folder with train.bin and val.bin.
      tokenizer: a `--tokenizer` value; for .bin files, the one they were made with.
      seq_len: tokens read per example; each split must hold one example.
      val_fraction: in (0, 1).
      bpe_vocab_size: size of the vocabulary that `bpe` learns from the training split.
      cache_dir: where tokenised text is cached; None: the user's cache folder.
      where: what to name in an error about `data`.

    Raises:
      InputError: missing, unreadable, not UTF-8, malformed, empty or too short; a tokenizer that
        is unknown, missing or does not match the data.
    """
    if data != STDLIB and not os.path.exists(data):
        raise InputError(where, "", data, "stdlib, or an existing file or folder")
    cache = Cache(cache_dir)
    try:
        if files := bin_files(Path(data)) if data != STDLIB else []:
            content = "nanogpt"
            splits = _load_bin(files, tokenizer, val_fraction, cache)
        else:
            text = read_documents(data, where)
            content = text.digest()
            splits = _tokenise(text, content, tokenizer, val_fraction, bpe_vocab_size, cache)
    except OSError as error:
        place = str(error.filename or data)
        raise InputError(where, place, None, f"to be readable ({error.strerror})") from None
    train, val, used = splits.train, splits.val, splits.tokenizer
    _check_length("training", train, data, seq_len, val_fraction, where)
    _check_length("validation", val, data, seq_len, val_fraction, where)
    parts = (_FORMAT, content, *splits.digests, str(used.vocab_size))
    sha256 = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    description = (
        f"{data}: {len(train):,} training and {len(val):,} validation tokens, "
        f"{Path(tokenizer).name} tokenizer of {used.vocab_size:,}"
    )
    return TokenizedCorpus(train, val, used, sha256, description)


def _check_length(
    split: str, tokens: Tokens, data: str, seq_len: int, val_fraction: float, where: str
) -> None:
    if len(tokens) <= seq_len:
        expected = (
            f"at least {seq_len + 1} {split} tokens (--seq_len + 1): give more text, lower "
            f"--seq_len or change --val_fraction (now {val_fraction:g})"
        )
        raise InputError(where, data, len(tokens), expected)


def _tokenise(
    text: Documents,
    content: str,
    spec: str,
    val_fraction: float,
    bpe_vocab_size: int,
    cache: Cache,
) -> _Splits:
    """Return both splits' ids and their tokenizer, from the cache if it has them."""
    learnt = {"char": "char", "bpe": f"bpe {bpe_vocab_size}"}
    ready = None if spec in learnt else load_tokenizer(spec)
    kind = learnt[spec] if ready is None else ready.to_json()
    key = f"{_FORMAT}\n{content}\n{val_fraction!r}\n{kind}"
    # Few bytes are read as fast as the cache; a second copy of many would be too much memory.
    through_cache = spec != "byte" or sum(map(len, text.documents)) > _BYTES_IN_MEMORY
    if through_cache and (cached := cache.corpus(key)) is not None:
        return _Splits(*cached)
    split = split_documents(text, val_fraction)
    if spec == "char":
        ready = CharTokenizer.of_documents(text.documents, separate=split.separate)
    elif spec == "bpe":
        ready = train_bpe(split.train, bpe_vocab_size)
    assert ready is not None
    if through_cache:
        ids = [ready.encoded(part, separate=split.separate) for part in (split.train, split.val)]
        if (kept := cache.keep_corpus(key, ids[0], ids[1], ready)) is not None:
            train, val, digests = kept
            return _Splits(train, val, ready, digests)
    train = ready.encode_documents(split.train, separate=split.separate)
    val = ready.encode_documents(split.val, separate=split.separate)
    return _Splits(train, val, ready, [digest(train), digest(val)])


def _load_bin(files: list[Path], spec: str, val_fraction: float, cache: Cache) -> _Splits:
    if spec in ("char", "bpe"):
        raise InputError("--tokenizer", "", spec, ways_to_name(files[0]))
    tokenizer = load_tokenizer(spec)
    opened = [open_bin(file) for file in files]
    if len(opened) == 1:
        cut = int(len(opened[0]) * (1 - val_fraction))
        opened = [opened[0].part(0, cut), opened[0].part(cut, len(opened[0]))]
    train, val = opened
    seen = [_looked_through(split, cache) for split in opened]
    for split, (highest, _) in zip(opened, seen, strict=True):
        if highest >= tokenizer.vocab_size:
            expected = f"ids below {tokenizer.vocab_size}, the vocabulary of --tokenizer {spec}"
            raise InputError(
                str(split.path), "", highest, f"{expected}; give {ways_to_name(split.path)}"
            )
    return _Splits(train, val, tokenizer, [sha256 for _, sha256 in seen])


def _looked_through(tokens: TokenFile, cache: Cache) -> tuple[int, str]:
    """Return the highest id (-1: none) and a digest of all of a file; it is read once."""
    about = f"{_FORMAT} {os.path.realpath(tokens.path)} {tokens.stamp} {tokens.span}"
    match cache.fact(about):
        case [int(highest), str(sha256)]:
            return highest, sha256
    if tokens.stamp[0] > _LONG_LOOK:
        say(f"{named(str(tokens.path))}: checking all of its ids, once", file=sys.stderr)
    found, highest = hashlib.sha256(f"{tokens.dtype.str} ({len(tokens)},)".encode()), -1
    for part in chunks(tokens):
        found.update(part.data)
        highest = max(highest, int(part.max()))
    cache.keep_fact(about, [highest, found.hexdigest()])
    return highest, found.hexdigest()
