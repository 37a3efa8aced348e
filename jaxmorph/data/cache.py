"""The cache folder: tokenised corpora, and what a look through a large file found."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxmorph.cli.printing import named, say
from jaxmorph.data.plain_tokenizers import Tokenizer, token_dtype
from jaxmorph.data.token_files import TokenFile, Tokens, chunks
from jaxmorph.data.tokenization import from_json

_FORMAT = "2"  # part of every key: increment it when the layout of the files changes
_HASHED_WHOLE = 1 << 30  # bytes
_HASHED_END = 64 << 20  # bytes


def digest(tokens: Tokens) -> str:
    """Return the SHA-256 of ids and their type; above 1 GiB only of both ends, to start at once."""
    found = hashlib.sha256(f"{tokens.dtype.str} ({len(tokens)},)".encode())
    end = _HASHED_END // tokens.dtype.itemsize
    whole = len(tokens) * tokens.dtype.itemsize <= _HASHED_WHOLE
    for part in chunks(tokens) if whole else (tokens[:end], tokens[len(tokens) - end :]):
        found.update(np.ascontiguousarray(part).data)
    return found.hexdigest()


class Cache:
    """A folder of files that can be made again; one that is damaged counts as missing.

    Args:
      folder: None: the user's cache folder.
    """

    def __init__(self, folder: str | None):
        self._folder = Path(folder or _default_folder())
        self._warned = False

    def corpus(self, content: str) -> tuple[TokenFile, TokenFile, Tokenizer, list[str]] | None:
        """Return what `keep_corpus` wrote for `content`: ids, tokenizer and digests of the splits."""
        *files, manifest = self._corpus_files(content)
        try:
            entry = json.loads(manifest.read_text(encoding="utf-8"))
            if _sha256(entry["tokenizer"]) != entry["tokenizer_sha256"]:
                return None
            tokenizer = from_json(entry["tokenizer"], where=str(manifest))
            train, val = (TokenFile(file, token_dtype(tokenizer.vocab_size)) for file in files)
            digests = [digest(train), digest(val)]
        except Exception:  # damaged files make numpy and json raise anything
            return None
        return (train, val, tokenizer, digests) if digests == entry["digests"] else None

    def keep_corpus(
        self,
        content: str,
        train: Iterable[np.ndarray],
        val: Iterable[np.ndarray],
        tokenizer: Tokenizer,
    ) -> tuple[TokenFile, TokenFile, list[str]] | None:
        """Write the ids of both splits as they come, and return them as files with their digests.

        Args:
          content: identifies the corpus, its split and its tokenizer.
          train: arrays of ids, in order.
          val: those of the validation split.
          tokenizer: what the ids mean.

        Returns:
          None, after a warning, if the folder cannot be used.
        """
        train_file, val_file, manifest = self._corpus_files(content)
        dtype, description = token_dtype(tokenizer.vocab_size), tokenizer.to_json()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tokens = []
            for file, parts in ((train_file, train), (val_file, val)):
                _replace(file, (part.astype(dtype, copy=False).data for part in parts))
                tokens.append(TokenFile(file, dtype))
            digests = [digest(split) for split in tokens]
            entry = {"digests": digests, "tokenizer": description}
            entry["tokenizer_sha256"] = _sha256(description)
            _replace(manifest, [json.dumps(entry).encode()])  # last: it validates the other two
        except OSError as error:
            self._warn(error)
            return None
        return tokens[0], tokens[1], digests

    def fact(self, about: str) -> Any:
        """Return the JSON value that `keep_fact` wrote, or None."""
        try:
            value, sha256 = json.loads(self._file(about, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return None
        return value if _sha256(json.dumps(value)) == sha256 else None

    def keep_fact(self, about: str, value: Any) -> None:
        """Write a JSON value under what it is about; warn if the folder cannot be used."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps([value, _sha256(json.dumps(value))])
            _replace(self._file(about, "json"), [content.encode()])
        except OSError as error:
            self._warn(error)

    def _corpus_files(self, content: str) -> list[Path]:
        return [self._file(content, end) for end in ("train.ids", "val.ids", "json")]

    def _file(self, content: str, end: str) -> Path:
        key = _sha256(f"{_FORMAT}\n{content}")
        return self._folder / f"{key}.{end}"

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            folder = named(str(self._folder))
            say(f"{folder}: nothing is cached there ({error.strerror})", file=sys.stderr)
        self._warned = True


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # paths may be odd


def _default_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "jaxmorph")


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file atomically, part by part."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            for part in parts:
                file.write(part)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
