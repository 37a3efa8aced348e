"""Tokenizers by name, of files, and of the JSON in a run folder, which can so decode its own samples."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.cli.printing import named, say
from jaxmorph.cli.text_file import read_text
from jaxmorph.config.settings import TOKENIZER_KINDS
from jaxmorph.data.nanogpt import read_meta
from jaxmorph.data.plain_tokenizers import FORMAT_KEY, ByteTokenizer, CharTokenizer, Tokenizer
from jaxmorph.data.subword import SubwordTokenizer, gpt2, library_errors, library_for
from jaxmorph.data.tokenizer_files import corrected

_FLAG = "--tokenizer"
_LARGEST_FILE = 256 << 20  # bytes; those of large multilingual models have 35 million


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer of a `--tokenizer` value that needs no corpus: byte, gpt2 or a file.

    Raises:
      InputError: char or bpe, no such file, not a tokenizer, or a package is missing.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec == "gpt2":
        return gpt2()
    if spec in TOKENIZER_KINDS:
        raise InputError(_FLAG, "", spec, "a tokenizer that is not made from text, such as gpt2")
    path = Path(spec)
    if not os.path.isfile(path):
        choices = f"{', '.join(TOKENIZER_KINDS)} or an existing tokenizer.json or meta.pkl"
        raise InputError(_FLAG, "", spec, choices + nearest(spec, TOKENIZER_KINDS))
    if path.suffix == ".pkl":
        try:
            return CharTokenizer.in_order(read_meta(path))
        except OSError as error:
            raise InputError(spec, "", None, f"a readable file ({error.strerror})") from None
    return from_json(read_text(path, _LARGEST_FILE), where=spec)


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
        kind = content["kind"] if FORMAT_KEY in content else "file"
        if kind == "byte":
            return ByteTokenizer()
        if kind == "char":
            return CharTokenizer.in_order(content["characters"])
        definition = content["definition"] if kind == "subword" else content
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(where, "", None, f"{expected} ({problem})") from None
    if not isinstance(definition, dict):
        raise InputError(where, "definition", None, expected)
    return _of_definition(definition, where, expected)


def _of_definition(definition: dict[str, Any], where: str, expected: str) -> SubwordTokenizer:
    """Return the tokenizer of the library's JSON; what makes encodings vary is left out, and said."""
    library = library_for("bpe")
    definition, removed = corrected(definition, where)
    with library_errors(where, expected):
        tokenizer = SubwordTokenizer.of(library.Tokenizer.from_str(json.dumps(definition)))
    if removed:
        parts = " and ".join(removed)
        said = f"{named(where)}: without its {parts}, so that a text always has the same ids"
        say(said, file=sys.stderr)
    return tokenizer
