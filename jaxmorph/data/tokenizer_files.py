"""What a tokenizer.json may contain here, and where its tokenizer lets text be cut.

A definition is the parsed JSON of the `tokenizers` library; a library tokenizer is its object.
"""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from jaxmorph.cli.errors import InputError

# A vocabulary may skip ids (files do, for tokens reserved or removed), but each id is a row of the
# embedding, and the library needs memory for each as well.
_ROWS_PER_TOKEN = 2
_SPARE_ROWS = 1024

_BLANKS = " \t\r\n"
# Pre-tokenizers that drop blanks, and normalizers after which a blank is still one.
_DROP_BLANKS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_KEEP_BLANKS = {"NFC", "NFD", "Lowercase"}
_TURN_INTO_BLANKS = {"NFKC", "NFKD", "StripAccents", "BertNormalizer"}
# The patterns of GPT-4's and Llama 3's, and of Qwen 2's tokenizers. They may take line ends into the
# word before, but never another blank.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_GPT4 % "{1,3}", _GPT4 % ""}
# Pre-tokenizers that treat each word of the one before alike, wherever it stands.
_WORD_BY_WORD = {*_DROP_BLANKS, "ByteLevel", "Digits", "Punctuation", "Split"}


def corrected(definition: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return a checked definition with one encoding for a text, and what was taken out for that.

    Args:
      definition: of a tokenizer.
      where: its file, for messages.

    Raises:
      InputError: a vocabulary that is empty, too sparse, or gives an id twice or a wrong one; merges
        that do not fit it.
    """
    model = definition.get("model")
    if not isinstance(model, dict):
        raise InputError(where, "model", None, "a tokenizer's model")
    _check_vocabulary(model.get("vocab"), definition.get("added_tokens"), where)
    _check_merges(model, where)
    removed = ["dropout"] if model.get("dropout") else []
    removed += [name for name in ("padding", "truncation") if definition.get(name) is not None]
    whole = {**definition, "padding": None, "truncation": None}
    return {
        **whole,
        "model": {**model, "dropout": None} if "dropout" in removed else model,
    }, removed


def _check_vocabulary(vocab: Any, added: Any, where: str) -> None:
    if not isinstance(vocab, dict | list) or not vocab:
        raise InputError(where, "model.vocab", None, "at least one token")
    ids = list(vocab.values()) if isinstance(vocab, dict) else range(len(vocab))
    added = added if isinstance(added, list) else []
    added_ids = [token.get("id") for token in added if isinstance(token, dict)]
    limit = _ROWS_PER_TOKEN * (len(ids) + len(added_ids)) + _SPARE_ROWS
    for field, numbers in (("model.vocab", ids), ("added_tokens", added_ids)):
        for number in numbers:
            if type(number) is not int or not 0 <= number < limit:
                expected = f"ids from 0 to below {limit} (there are {len(ids)} tokens)"
                short = type(number) is int and abs(number) < 1 << 64
                raise InputError(where, field, number if short else reprlib.repr(number), expected)
    if len(set(ids)) < len(ids):
        raise InputError(where, "model.vocab", None, "an id of its own for each token")


def _last(pair: Any) -> Any:
    return pair[-1] if isinstance(pair, list) and pair else None


def _check_merges(model: dict[str, Any], where: str) -> None:
    """Refuse merges that do not fit the prefix; the library cuts it off unseen, and can abort."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    for merge in merges:
        second = merge.rpartition(" ")[2] if isinstance(merge, str) else _last(merge)
        if not isinstance(second, str) or not second.startswith(prefix):
            expected = "second parts that begin with the continuing_subword_prefix"
            raise InputError(where, "model.merges", reprlib.repr(merge), expected)


def blanks_to_cut_before(library_tokenizer: Any) -> str:
    """Return blanks before which a text can be cut without any of its ids changing.

    The cut is before the first blank after another character: there the pre-tokenizer cuts anyway,
    and what it does on either side does not depend on the other. "" if that cannot be known.
    """
    added = library_tokenizer.get_added_tokens_decoder().values()
    if any(_joins_blanks(token) for token in added if not token.special):
        return ""
    normalizers = set(_kinds(_steps(library_tokenizer.normalizer, "normalizers")))
    steps = list(_steps(library_tokenizer.pre_tokenizer, "pretokenizers"))
    if not steps or not _WORD_BY_WORD.issuperset(_kinds(steps[1:])):
        return ""
    if steps[0]["type"] in _DROP_BLANKS:
        return _BLANKS if normalizers <= _KEEP_BLANKS | _TURN_INTO_BLANKS else ""
    return _blanks_of(steps[0]) if normalizers <= _KEEP_BLANKS else ""


def _blanks_of(step: dict[str, Any]) -> str:
    if step["type"] == "ByteLevel":
        return _BLANKS if step["use_regex"] and not step["add_prefix_space"] else ""
    if step["type"] == "Split" and step["pattern"].get("Regex") in _PATTERNS:
        return " \t" if step["behavior"] == "Isolated" and not step["invert"] else ""
    return ""


def _joins_blanks(token: Any) -> bool:
    """Return whether an added token is, or takes, a word with the blanks that follow it."""
    text = token.content
    inside = any(b.isspace() and not a.isspace() for a, b in itertools.pairwise(text))
    return token.rstrip or inside


def _steps(part: Any, several: str) -> Iterator[dict[str, Any]]:
    """Yield the states of a normalizer or pre-tokenizer, one for each of a sequence."""
    waiting = [json.loads(part.__getstate__())] if part is not None else []
    while waiting:
        state = waiting.pop(0)
        if state["type"] == "Sequence":
            waiting = [*state[several], *waiting]
        else:
            yield state


def _kinds(steps: Iterable[dict[str, Any]]) -> list[str]:
    return [step["type"] for step in steps]


def unknown_to(library_tokenizer: Any, characters: Iterable[str]) -> str | None:
    """Return the first of some (normalised) characters that the tokenizer would drop, or None.

    A BPE without a token for unknown characters leaves them out without a word.
    """
    model, split = library_tokenizer.model, library_tokenizer.pre_tokenizer
    prefix, suffix = model.continuing_subword_prefix or "", model.end_of_word_suffix or ""
    forms = {before + "{}" + after for before in ("", prefix) for after in ("", suffix)}

    def is_known(symbol: str) -> bool:
        if all(model.token_to_id(form.format(symbol)) is not None for form in forms):
            return True
        in_bytes = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        return model.byte_fallback and all(model.token_to_id(b) is not None for b in in_bytes)

    for character in characters:
        words = [character] if split is None else [w for w, _ in split.pre_tokenize_str(character)]
        if not all(map(is_known, "".join(words))):
            return character
    return None


def drops_unknown(library_tokenizer: Any) -> bool:
    """Return whether the tokenizer leaves out characters that it does not know."""
    model = library_tokenizer.model
    if type(model).__name__ != "BPE" or model.unk_token is not None:
        return False
    steps = _kinds(_steps(library_tokenizer.pre_tokenizer, "pretokenizers"))
    alphabet = type(library_tokenizer.pre_tokenizer).alphabet() if steps == ["ByteLevel"] else ()
    return not alphabet or any(model.token_to_id(symbol) is None for symbol in alphabet)
