"""tokenizer.json files: what would lose or change text is corrected or refused, and said."""

import itertools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers

from jaxmorph.cli.errors import InputError
from jaxmorph.data import pieces as pieces_module
from jaxmorph.data import subword
from jaxmorph.data.subword import SubwordTokenizer, train_bpe
from jaxmorph.data.tokenization import from_json, load_tokenizer
from jaxmorph.data.tokenizer_files import _PATTERNS, blanks_to_cut_before

BYTES = pre_tokenizers.ByteLevel.alphabet()


def definition(model, **parts):
    """The JSON of a tokenizer, some of its parts replaced."""
    built = tokenizers.Tokenizer(model)
    for name in ("normalizer", "pre_tokenizer"):
        if name in parts:
            setattr(built, name, parts.pop(name))
    return json.loads(built.to_str()) | parts


def load(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    return load_tokenizer(str(path))


def byte_level(**changes):
    """A byte-level BPE with one merge."""
    vocab = {symbol: number for number, symbol in enumerate(sorted(BYTES))}
    model = models.BPE(vocab | {"ab": 256}, [("a", "b")], **changes)
    return definition(model, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))


# --- corrected, and said ---------------------------------------------------------------------


def test_dropout_padding_and_truncation_are_left_out_in_one_line(tmp_path, capsys):
    plain = load(tmp_path, byte_level())
    assert capsys.readouterr().err == ""
    varying = tokenizers.Tokenizer.from_str(json.dumps(byte_level(dropout=0.5)))
    varying.enable_truncation(5)
    varying.enable_padding(length=400)
    text = "abab " * 50
    assert len({tuple(varying.encode(text).ids[:5]) for _ in range(9)}) > 1
    tokenizer = load(tmp_path, json.loads(varying.to_str()))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "tokenizer.json" in said
    assert "dropout and padding and truncation" in said
    for _ in range(10):
        assert tokenizer.encode(text).tolist() == plain.encode(text).tolist()
    again = from_json(tokenizer.to_json())
    assert again.encode(text).tolist() == plain.encode(text).tolist()
    assert capsys.readouterr().err == ""


# --- refused ---------------------------------------------------------------------------------


def with_vocab(vocab, kind: type = models.WordLevel):
    found = byte_level() if kind is models.BPE else definition(models.WordLevel({"a": 0}, "a"))
    found["model"]["vocab"] = vocab
    return found


def with_added(number):
    added = {"id": number, "content": "<x>", "single_word": False, "lstrip": False}
    return byte_level() | {
        "added_tokens": [added | {"rstrip": False, "normalized": False, "special": True}]
    }


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (with_vocab({}), ["model.vocab", "at least one token"]),
        (definition(models.Unigram([])), ["model.vocab", "at least one token"]),
        (with_vocab({"a": 0, "b": 2**31}), ["model.vocab", "2147483648", "below"]),
        (with_vocab({"a": 0, "b": 2**31 - 1}, models.BPE), ["model.vocab", "2147483647"]),
        (with_vocab({"a": 0, "b": 10**30}), ["model.vocab", "ids from 0"]),
        (with_vocab({"a": 0, "b": -1}), ["model.vocab", "-1"]),
        (with_vocab({"a": 0, "b": 1.5}), ["model.vocab", "1.5"]),
        (with_vocab({"a": 0, "b": True}), ["model.vocab", "True"]),
        (with_vocab({"a": 0, "b": 0}), ["model.vocab", "an id of its own"]),
        (with_vocab(None), ["model.vocab"]),
        (with_added(2**31), ["added_tokens", "2147483648"]),
        (with_added("7"), ["added_tokens", "'7'"]),
        (with_vocab({"a": 0, "b": "x" * 1000}), ["model.vocab", "xx"]),
        ({"model": []}, ["model"]),
        ({"model": {"type": "New", "vocab": {"a": 0}}}, ["tokenizer.json"]),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused_at_once(tmp_path, content, parts):
    with pytest.raises(InputError) as caught:
        load(tmp_path, content)
    for part in ["tokenizer.json", *parts]:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("prefix", ["longer than any token", "x"])
def test_merges_that_would_abort_the_process_are_refused(tmp_path, prefix):
    content = definition(models.BPE({"a": 0, "é": 1, "aé": 2}, [("a", "é")]))
    content["model"]["continuing_subword_prefix"] = prefix
    for merge in (["a", "é"], "a é", [], None):
        content["model"]["merges"] = [merge]
        with pytest.raises(InputError, match=r"tokenizer\.json: model\.merges"):
            load(tmp_path, content)


def test_gaps_between_ids_are_allowed(tmp_path):
    assert load(tmp_path, with_vocab({"a": 0, "b": 1000})).vocab_size == 1001


@pytest.mark.parametrize(
    "characters", ["", "aba", "a\ud800", None, 5, ["a", "b"]], ids=lambda c: repr(c)
)
def test_a_run_folders_alphabet_is_checked(characters):
    with pytest.raises(InputError, match=r"run\.json"):
        from_json(
            json.dumps({"jaxmorph_tokenizer": 1, "kind": "char", "characters": characters}),
            where="run.json",
        )


# --- characters that would be dropped --------------------------------------------------------

ASCII = {chr(code): code for code in range(128)}
DROPPING = {
    "characters": definition(models.BPE(ASCII, [])),
    "bytes seen in training": definition(
        models.BPE({c: i for i, c in enumerate(BYTES) if c.isascii() or c == "Ġ"}, []),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "some bytes to fall back to": definition(
        models.BPE(ASCII | {f"<0x{b:02X}>": 128 + b for b in range(128, 190)}, [], byte_fallback=True)
    ),
    "suffixes": definition(
        models.BPE({c + end: i * 2 + bool(end) for c, i in ASCII.items() for end in ("", "$")}, [],
                   end_of_word_suffix="$"),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPING)
def test_text_that_a_tokenizer_would_drop_is_refused(tmp_path, name):
    tokenizer = load(tmp_path, DROPPING[name])
    library = tokenizers.Tokenizer.from_str(json.dumps(DROPPING[name]))
    assert library.encode("xöy").ids == library.encode("xy").ids or "suffixes" in name
    for _ in range(2):
        assert tokenizer.encode("x, y").tolist() == library.encode("x, y").ids
        with pytest.raises(InputError, match=r"text: got 'ö'.*leave them out"):
            tokenizer.encode("x, y: xöy")


@pytest.mark.parametrize(
    "content",
    [
        byte_level(),
        definition(models.BPE(ASCII | {"?!": 128}, [], unk_token="?!")),
        definition(
            models.BPE(
                ASCII | {f"<0x{b:02X}>": 128 + b for b in range(256)}, [], byte_fallback=True
            )
        ),
        definition(models.BPE(ASCII | {"é": 128}, []), normalizer=normalizers.NFC()),
    ],
)
def test_what_drops_nothing_is_accepted(tmp_path, content):
    tokenizer = load(tmp_path, content)
    assert len(tokenizer.encode("xe\u0301")) >= 2


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0}, unk_token="[UNK]"),
        models.WordPiece({"a": 0}, unk_token="[UNK]"),
        models.Unigram([("a", -1.0)]),
        models.BPE({"a": 0}, [], unk_token="[UNK]"),
    ],
)
def test_text_that_the_library_refuses_is_one_message(tmp_path, model):
    tokenizer = load(tmp_path, definition(model))
    with pytest.raises(InputError, match="text: expected text that the tokenizer can encode"):
        tokenizer.encode("ö")


# --- pieces ----------------------------------------------------------------------------------

CHARACTERS = " \n\r\t\u00a0\x1c\x85\u2028abIİ09.,!'sé\u0301´—日。🙂_"


def trained(pre_tokenizer, normalizer=None, model=None, **special):
    built = tokenizers.Tokenizer(model or models.BPE(unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        built.normalizer = normalizer
    text = "".join(map("".join, itertools.permutations("a b\n.é", 4))) + CHARACTERS * 3
    tokens = ["<unk>", *sorted(set(BYTES) | set(CHARACTERS))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>"], initial_alphabet=tokens[1:], show_progress=False
    )
    built.train_from_iterator([text] * 3, trainer)
    for content, options in special.items():
        built.add_tokens([tokenizers.AddedToken(content, normalized=False, **options)])
    return built


def split_then_bytes(pattern):
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte])


GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUT = {
    "gpt2": trained(GPT2_SPLIT),
    "normalised": trained(
        GPT2_SPLIT, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    ),
    "llama": trained(split_then_bytes(min(_PATTERNS, key=len)), normalizers.NFC()),
    "qwen": trained(split_then_bytes(max(_PATTERNS, key=len))),
    "bert": trained(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
    "words": trained(pre_tokenizers.Whitespace(), normalizers.NFKC()),
    "added": trained(
        GPT2_SPLIT, **{"  ": {}, "a.": {"single_word": True}, "\n\n": {"lstrip": True}}
    ),
}
WHOLE = {
    "no pre-tokenizer": trained(None),
    "a prefix": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "metaspace": trained(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "another pattern": trained(split_then_bytes(r"\n+|[^\n]+")),
    "prepended": trained(GPT2_SPLIT, normalizers.Prepend("_")),
    "added over blanks": trained(GPT2_SPLIT, **{"a b": {}}),
    "added that strips": trained(GPT2_SPLIT, **{"b.": {"rstrip": True}}),
    "blanks made of blanks": trained(GPT2_SPLIT, normalizers.StripAccents()),
}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces_module, "_PIECE", 7)
    monkeypatch.setattr(subword, "_AT_ONCE", 40)


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_pieces_have_the_ids_of_the_whole_text(small_pieces, name):
    library = (CUT | WHOLE)[name]
    assert bool(blanks_to_cut_before(library)) == (name in CUT)

    @settings(max_examples=60, deadline=None)
    @given(st.text(alphabet=CHARACTERS, max_size=80))
    def check(text):
        tokenizer = SubwordTokenizer.of(library)
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids

    check()


def test_documents_are_encoded_in_order_and_in_groups(small_pieces):
    tokenizer = SubwordTokenizer.of(CUT["gpt2"])
    documents = ["a b. a\nb " * 20, "", "é.", *["ab a"] * 9]
    expected = [i for text in documents for i in [*tokenizer.encode(text), *tokenizer.encode("\n")]]
    arrays = list(tokenizer.encoded([text.encode() for text in documents], separate=True))
    np.testing.assert_array_equal(np.concatenate(arrays), expected)
    assert len(arrays) > len(documents) * 2


def test_a_vocabulary_learnt_from_pieces_is_that_of_the_whole(monkeypatch):
    text = ("the cat's hat, é—日\r\n  and\tmore\n\n" * 40 + "x y") * 2
    whole = train_bpe([text.encode()], 300).to_json()
    monkeypatch.setattr(pieces_module, "_PIECE", 50)
    assert train_bpe([text.encode()], 300).to_json() == whole
