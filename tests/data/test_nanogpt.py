"""nanoGPT's files: a meta.pkl names the characters of the .bin files beside it."""

import io
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmorph.cli.errors import InputError
from jaxmorph.config.nanogpt_files import bin_files
from jaxmorph.config.resolve import resolve
from jaxmorph.data.loading import load_tokens
from jaxmorph.data.nanogpt import read_meta
from jaxmorph.data.tokenization import load_tokenizer

TEXT = "Wherefore? — «Ünïcödé» 🙂\n" * 40


def prepare(folder, text=TEXT, protocol=pickle.DEFAULT_PROTOCOL):
    """Write what nanoGPT's data/shakespeare_char/prepare.py writes."""
    characters = sorted(set(text))
    stoi = {character: number for number, character in enumerate(characters)}
    itos = dict(enumerate(characters))
    ids = np.array([stoi[character] for character in text], np.uint16)
    ids[: len(ids) // 2].tofile(folder / "train.bin")
    ids[len(ids) // 2 :].tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": itos, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    return folder


def settings_of(*flags):
    resolved, _ = resolve([*map(str, flags), "--dry_run"])
    return resolved.data


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_ids_are_the_characters_of_the_meta_file(tmp_path, protocol):
    prepare(tmp_path, protocol=protocol)
    for data in (tmp_path, tmp_path / "train.bin", tmp_path / "val.bin"):
        for given_ in ([], ["--tokenizer", "char"]):
            used = settings_of("--data", data, *given_)
            assert used.tokenizer == str(tmp_path / "meta.pkl")
    corpus = load_tokens(
        str(tmp_path),
        used.tokenizer,
        seq_len=8,
        val_fraction=0.1,
        bpe_vocab_size=300,
        cache_dir=str(tmp_path / "cache"),
    )
    decode = corpus.tokenizer.decode
    assert decode(np.asarray(corpus.train)) + decode(np.asarray(corpus.val)) == TEXT
    assert corpus.tokenizer.vocab_size == len(set(TEXT))


def test_a_folder_with_one_of_the_files_is_no_folder_of_text(tmp_path):
    """Small ids are valid UTF-8: read as text they would train a model on raw bytes."""
    prepare(tmp_path)
    (tmp_path / "val.bin").unlink()
    assert bin_files(tmp_path) == [tmp_path / "train.bin"]
    assert settings_of("--data", tmp_path).tokenizer == str(tmp_path / "meta.pkl")
    (tmp_path / "meta.pkl").unlink()
    with pytest.raises(InputError, match=r"the ids of train\.bin are from"):
        settings_of("--data", tmp_path)


def test_another_tokenizer_can_be_given(tmp_path):
    prepare(tmp_path)
    for name in ("byte", "gpt2"):
        assert settings_of("--data", tmp_path, "--tokenizer", name).tokenizer == name


def test_a_config_that_a_run_has_written_names_the_same_characters(tmp_path):
    from jaxmorph.config.settings_file import to_yaml

    prepare(tmp_path)
    first, _ = resolve(["--data", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(to_yaml(first))
    again, _ = resolve(["--config", str(tmp_path / "config.yaml")])
    assert again.data.tokenizer == first.data.tokenizer == str(tmp_path / "meta.pkl")


@pytest.mark.parametrize("flags", [[], ["--tokenizer", "char"], ["--tokenizer", "bpe"]])
def test_ids_without_a_tokenizer_are_refused_with_the_three_ways(tmp_path, flags):
    prepare(tmp_path)
    os.remove(tmp_path / "meta.pkl")
    for data in (tmp_path, tmp_path / "train.bin"):
        with pytest.raises(InputError) as caught:
            settings_of("--data", data, *flags)
        for way in ("train.bin", "meta.pkl", "--tokenizer gpt2", "tokenizer.json"):
            assert way in str(caught.value)


def test_ids_may_have_any_order(tmp_path):
    meta = {"itos": {0: "b", 1: "é", 2: "a"}, "stoi": {"a": 2, "b": 0, "é": 1}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokenizer = load_tokenizer(str(tmp_path / "meta.pkl"))
    assert tokenizer.encode("abé").tolist() == [2, 0, 1]
    assert tokenizer.decode([2, 0, 1]) == "abé"


class Runs:
    def __reduce__(self):
        return os.mkdir, (os.environ["WAS_RUN"],)


def meta_of(itos, stoi, **more):
    return {"itos": itos, "stoi": stoi, **more}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "pickle"),
        (b"not a pickle", "meta.pkl"),
        (pickle.dumps([1, 2]), "EMPTY_LIST"),
        (pickle.dumps({"vocab_size": 3}), "stoi and itos"),
        (pickle.dumps(meta_of({0: "a", 2: "b"}, {"a": 0, "b": 2})), "itos"),
        (pickle.dumps(meta_of({0: "a", 1: "a"}, {"a": 1})), "itos"),
        (pickle.dumps(meta_of({0: "a", 1: "b"}, {"a": 1, "b": 0})), "stoi"),
        (pickle.dumps(meta_of({0: "ab"}, {"ab": 0})), "itos"),
        (pickle.dumps(meta_of({0: 5}, {5: 0})), "itos"),
        (pickle.dumps(meta_of({}, {})), "itos"),
        (pickle.dumps(meta_of({"0": "a"}, {"a": 0})), "itos"),
        (pickle.dumps(meta_of({0: "a"}, {"a": 0}, vocab_size=65)), "vocab_size"),
        (pickle.dumps(meta_of({0: "\ud800"}, {"\ud800": 0})), "meta.pkl"),
        (pickle.dumps({**meta_of({0: "a"}, {"a": 0}), "more": Runs}), "GLOBAL"),
        (b"\x80\x04r\xff\xff\xff\x7f}.", "LONG_BINPUT"),  # would take 16 GB of memory
        (b"\x80\x04}" + b"x" * (9 << 20), "bytes"),
    ],
)
def test_a_bad_meta_file_is_refused_by_name(tmp_path, content, part):
    path = tmp_path / "meta.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_meta(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)


def test_a_meta_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("WAS_RUN", str(tmp_path / "was run"))
    for protocol in range(6):
        content = pickle.dumps({**meta_of({0: "a"}, {"a": 0}), "more": Runs()}, protocol)
        (tmp_path / "meta.pkl").write_bytes(content)
        with pytest.raises(InputError):
            read_meta(tmp_path / "meta.pkl")
        assert not (tmp_path / "was run").exists()
        pickle.load(io.BytesIO(content))  # the file would have
        os.rmdir(tmp_path / "was run")


GOOD = pickle.dumps(meta_of({0: "a", 1: "b"}, {"a": 0, "b": 1}, vocab_size=2))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_other_bytes_are_refused_or_read_right(tmp_path_factory, data):
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("meta") / "meta.pkl"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        found = read_meta(path)
    except InputError:
        return
    assert len(found) == len(set(found)) <= 2
