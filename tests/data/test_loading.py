import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.data import cache, corpora, loading, token_files
from jaxmorph.data.loading import load_tokens
from jaxmorph.data.token_files import TokenFile, chunks

LINE = "The quick brown fox — jumps.\n"


def load(source, tokenizer="byte", **changes):
    options = {
        "seq_len": 8,
        "val_fraction": 0.1,
        "bpe_vocab_size": 300,
        "cache_dir": str(Path(source).parent / "cache") if source != "stdlib" else None,
    }
    return load_tokens(str(source), tokenizer, **(options | changes))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINE * 100, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    for i in range(200):
        path = root / f"part{i % 7}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i} " * (i % 13 + 1), encoding="utf-8")
    (root / "part0" / ".hidden").write_text("hidden")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    (root / "empty.txt").touch()
    return root


def write_bin(path, ids):
    np.array(ids, "<u2").tofile(path)
    return path


# --- corpora ---------------------------------------------------------------------------------


def test_a_text_is_cut_at_a_character_as_nanogpt_does(text_file):
    corpus = load(text_file)
    text = LINE * 100
    cut = int(len(text) * 0.9)
    assert corpus.train.dtype == np.uint8
    assert np.asarray(corpus.train).tobytes() == text[:cut].encode()
    assert np.asarray(corpus.val).tobytes() == text[cut:].encode()


def test_char_covers_what_only_validation_has(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 60 + "xyz" * 20)
    corpus = load(path, "char", val_fraction=0.25)
    assert corpus.tokenizer.decode(np.asarray(corpus.val)) == "xyz" * 20
    assert corpus.tokenizer.vocab_size == 6


def test_a_folder_is_split_by_whole_documents(folder):
    corpus = load(folder)
    train, val = (np.asarray(t).tobytes().split(b"\0")[:-1] for t in (corpus.train, corpus.val))
    expected = {f"document {i} " * (i % 13 + 1) for i in range(200)}
    assert {d.decode() for d in train} | {d.decode() for d in val} == expected
    assert len(train) + len(val) == 200
    share = sum(map(len, val)) / sum(map(len, train + val))
    assert share == pytest.approx(0.1, abs=0.005)


def test_the_split_of_a_document_hangs_on_its_name_alone(folder):
    before = load(folder)
    for path in (folder / "part1").iterdir():  # same names and sizes, other words
        path.write_text(path.read_text().replace("document", "DOCUMENT"))
    after = load(folder)
    assert np.asarray(after.val).tobytes().lower() == np.asarray(before.val).tobytes().lower()
    assert after.sha256 != before.sha256


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.1), (2, 0.9), (3, 0.5)])
def test_few_documents_leave_some_to_each_split(tmp_path, count, fraction):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * 9}) + "\n" for _ in range(count)))
    corpus = load(path, val_fraction=fraction)
    assert len(corpus.train) + len(corpus.val) == count * 46


def test_jsonl_is_read_line_by_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    texts = [f"número {i}\nsecond line" for i in range(40)]
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate(texts)]
    path.write_text("\r\n".join(lines) + "\n\n", encoding="utf-8")
    corpus = load(path)
    found = (np.asarray(corpus.train).tobytes() + np.asarray(corpus.val).tobytes()).split(b"\0")[
        :-1
    ]
    assert sorted(d.decode() for d in found) == sorted(texts)


def test_folder_skips_what_is_not_text_and_says_so(folder, capsys):
    expected = load(folder).sha256
    assert capsys.readouterr().err == ""
    (folder / "image.png").write_bytes(b"\x89PNG\xff")
    assert load(folder).sha256 == expected
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "image.png" in error


def test_stdlib_is_quick_and_has_no_tests():
    started = time.process_time()
    corpus = load("stdlib")
    assert time.process_time() - started < 2
    assert 5e6 < len(corpus.train) + len(corpus.val) < 3e7
    names = corpora.read_documents("stdlib", "--data").names
    assert "os.py" in names
    assert "asyncio/events.py" in names
    assert names == sorted(names, key=lambda name: name.split("/"))
    for name in names:
        assert not {"test", "tests", "idle_test", "site-packages"} & set(name.split("/")), name
        assert name.endswith(".py")
    assert load("stdlib").sha256 == corpus.sha256


def test_bin_files_are_read_where_they_are_and_split(tmp_path):
    ids = np.arange(1000) % 200
    alone = load(write_bin(tmp_path / "tokens.bin", ids))
    np.testing.assert_array_equal(np.concatenate([alone.train, alone.val]), ids)
    assert len(alone.val) == 100
    assert isinstance(alone.train, TokenFile)

    train = write_bin(tmp_path / "train.bin", ids)
    write_bin(tmp_path / "val.bin", ids[:50])
    for source in (train, tmp_path):
        pair = load(source)
        np.testing.assert_array_equal(pair.train, ids)
        np.testing.assert_array_equal(pair.val, ids[:50])
    write_bin(tmp_path / "val.bin", ids[1:51])
    assert load(train).sha256 != pair.sha256


def test_large_arrays_are_hashed_at_both_ends(monkeypatch):
    ids, other = np.arange(200, dtype=np.uint16), np.arange(200, dtype=np.uint16)
    other[100] = 7
    assert cache.digest(ids) != cache.digest(other)
    monkeypatch.setattr(cache, "_HASHED_WHOLE", 399)
    monkeypatch.setattr(cache, "_HASHED_END", 64)
    assert cache.digest(ids) == cache.digest(other)
    for place in (0, 31, 168, 199):
        changed = ids.copy()
        changed[place] = 999
        assert cache.digest(ids) != cache.digest(changed)


def test_the_digest_says_what_was_read(text_file, tmp_path):
    base = load(text_file).sha256
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text_file.read_bytes())
    assert load(moved).sha256 == base
    assert load(text_file, seq_len=4).sha256 == base
    others = [
        load(text_file, val_fraction=0.2).sha256,
        load(text_file, "char").sha256,
        load(text_file, "bpe").sha256,
        load(text_file, "bpe", bpe_vocab_size=260).sha256,
    ]
    text_file.write_text(LINE * 100 + ".", encoding="utf-8")
    others.append(load(text_file).sha256)
    assert len({base, *others}) == 6
    digests = set()
    for text in ("abc" * 99, "bcd" * 99):  # the same ids, other letters
        moved.write_text(text)
        digests.add(load(moved, "char").sha256)
    assert len(digests) == 2


MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_not_text(tmp_path, folder):
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_bytes(LINE.encode() * 100)
    marked.write_bytes(MARK + LINE.encode() * 100)
    for kind in ("byte", "char", "bpe"):
        assert load(marked, kind).sha256 == load(plain, kind).sha256
    expected = load(folder, "char")
    for path in list((folder / "part3").iterdir()):
        path.write_bytes(MARK + path.read_bytes())
    assert load(folder, "char").sha256 == expected.sha256
    line = json.dumps({"text": LINE * 9}).encode() + b"\n"
    (tmp_path / "plain.jsonl").write_bytes(line * 9)
    (tmp_path / "marked.jsonl").write_bytes(MARK + line * 9)
    inside = json.dumps({"text": "\ufeff" + LINE * 9}).encode() + b"\n"
    (tmp_path / "inside.jsonl").write_bytes(inside * 9)
    found = {load(tmp_path / f"{name}.jsonl").sha256 for name in ("plain", "marked", "inside")}
    assert len(found) == 1
    middle = tmp_path / "middle.txt"  # anywhere else it is a character
    middle.write_text((LINE + "\ufeff") * 100, encoding="utf-8")
    assert load(middle, "char").tokenizer.vocab_size == load(plain, "char").tokenizer.vocab_size + 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_another_encoding_is_refused_with_the_reason(tmp_path, encoding, name):
    text = '{"text": "word word word"}\n' * 20
    if encoding.endswith("be"):
        text = "\ufeff" + text
    (tmp_path / name).write_bytes(text.encode(encoding))
    kind = encoding[:6].upper()
    with pytest.raises(InputError, match=rf"{name}: expected UTF-8 .*mark of {kind};.*iconv"):
        load(tmp_path / name)


@pytest.mark.parametrize(("kind", "suffix"), [("byte", "jsonl"), ("char", "txt")])
def test_text_needs_twice_its_size_in_memory_at_most(tmp_path, monkeypatch, kind, suffix):
    monkeypatch.setattr(loading, "_BYTES_IN_MEMORY", 1 << 20)
    path = tmp_path / f"large.{suffix}"
    text = (LINE * 100).replace("fox", "Füchse")
    content = text if suffix == "txt" else json.dumps({"text": text}, ensure_ascii=False) + "\n"
    with path.open("w", encoding="utf-8") as file:
        file.writelines([content] * 4000)
    tracemalloc.start()
    try:
        load(path, kind)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * path.stat().st_size


def test_large_bytes_come_through_the_cache_as_they_are(folder, tmp_path, monkeypatch):
    expected = load(folder)
    monkeypatch.setattr(loading, "_BYTES_IN_MEMORY", 100)
    for _ in range(2):
        found = load(folder)
        assert found.sha256 == expected.sha256
        np.testing.assert_array_equal(found.train, expected.train)
        assert isinstance(found.train, TokenFile)


# --- .bin files are looked through once ------------------------------------------------------


def bin_of(tmp_path, ids):
    path = tmp_path / "ids.bin"
    return write_bin(path, ids)


def test_every_id_of_a_bin_file_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_CHUNK", 64)
    ids = np.arange(1000) % 200
    for place in (0, 499, 899, 900, 999):
        bad = ids.copy()
        bad[place] = 256
        with pytest.raises(InputError, match=r"ids\.bin: got 256, expected ids below 256"):
            load(bin_of(tmp_path, bad))
    load(bin_of(tmp_path, ids))


def test_the_middle_of_a_large_bin_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_HASHED_WHOLE", 100)
    monkeypatch.setattr(cache, "_HASHED_END", 50)
    ids = np.arange(1000) % 200
    before = load(bin_of(tmp_path, ids)).sha256
    ids[450] = 7
    assert load(bin_of(tmp_path, ids)).sha256 != before


def test_a_bin_file_is_read_whole_only_once(tmp_path, monkeypatch):
    path = bin_of(tmp_path, np.arange(1000) % 200)
    first = load(path)
    looks = []
    monkeypatch.setattr(loading, "chunks", lambda tokens: looks.append(tokens) or chunks(tokens))
    assert load(path).sha256 == first.sha256
    assert not looks
    with pytest.raises(InputError, match="val_fraction"):  # what is remembered is still checked
        load(path, val_fraction=0.001)
    looks.clear()
    kept = path.stat()
    bin_of(tmp_path, (np.arange(1000) + 1) % 200)  # the same size, and set back to the same time
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert load(path).sha256 != first.sha256
    assert looks


def test_a_damaged_note_about_a_bin_file_is_not_believed(tmp_path):
    path = bin_of(tmp_path, np.arange(1000) % 200)
    good = load(path).sha256
    notes = list((tmp_path / "cache").iterdir())
    assert len(notes) == 2
    for note in notes:
        content = note.read_bytes()
        for bad in (b"", b"{}", b"[1, 2]", content[:9], content.replace(b"199", b"198")):
            note.write_bytes(bad)
            assert load(path).sha256 == good
            assert note.read_bytes() == content


def test_user_files_are_left_alone(folder, tmp_path):
    def snapshot():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}

    before = snapshot()
    load(folder, "bpe", cache_dir=str(tmp_path / "cache"))
    assert snapshot() == before


# --- the cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_the_cache_gives_what_was_built(text_file, monkeypatch, kind):
    built = load(text_file, kind)
    monkeypatch.setattr(loading, "split_documents", None)  # a hit needs no second look at the text
    cached = load(text_file, kind)
    np.testing.assert_array_equal(cached.train, built.train)
    np.testing.assert_array_equal(cached.val, built.val)
    assert cached.train.dtype == built.train.dtype
    assert isinstance(cached.train, TokenFile)
    assert cached.sha256 == built.sha256
    assert cached.tokenizer.to_json() == built.tokenizer.to_json()


def test_a_damaged_cache_is_rebuilt(text_file, tmp_path):
    built = load(text_file, "bpe")
    train, val = np.asarray(built.train), np.asarray(built.val)
    good = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(good) == 3
    for path, content in good.items():
        flips = [bytes([content[i] ^ 4]) for i in range(len(content))]
        damaged = [content[:i] + flips[i] + content[i + 1 :] for i in range(0, len(content), 97)]
        for bad in (b"", content[: len(content) // 2], *damaged[:8], damaged[-1]):
            path.write_bytes(bad)
            again = load(text_file, "bpe")
            np.testing.assert_array_equal(again.train, train)
            np.testing.assert_array_equal(again.val, val)
            assert again.sha256 == built.sha256
            assert path.read_bytes() == content
    assert set((tmp_path / "cache").iterdir()) == set(good)  # nothing half-written stays


def test_an_unusable_cache_folder_only_warns(text_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    corpus = load(text_file, "char", cache_dir=str(tmp_path / "file"))
    assert corpus.sha256 == load(text_file, "char").sha256
    assert capsys.readouterr().err.count("\n") == 1


def test_the_cache_lives_in_the_users_cache_folder(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(text_file, "char", cache_dir=None)
    assert len(list((tmp_path / "xdg" / "jaxmorph").iterdir())) == 3
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(text_file, "char", cache_dir=None)
    assert len(list((tmp_path / "home" / ".cache" / "jaxmorph").iterdir())) == 3


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "changes", "parts"),
    [
        ("missing", None, {}, ["--data", "stdlib"]),
        ("empty.txt", b"", {}, ["empty.txt", "text"]),
        ("a.txt", b"good \xff bad" * 99, {}, ["a.txt", "byte 5", "UTF-8"]),
        ("a.txt", b"short", {}, ["a.txt", "got 4", "9 training tokens", "--seq_len"]),
        ("a.txt", b"x" * 50, {}, ["a.txt", "got 5", "9 validation tokens", "--val_fraction"]),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', {}, ["a.jsonl", "line 2", '"text"']),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}', {}, ["a.jsonl", "line 3", '"text"']),
        ("a.jsonl", b'{"text": "a"}\n["text"]', {}, ["a.jsonl", "line 2"]),
        ("a.jsonl", b"plain words", {}, ["a.jsonl", "line 1", "plain words"]),
        ("a.jsonl", b'{"text": "\\ud800"}', {}, ["a.jsonl", "line 1", "Unicode"]),
        ("a.jsonl", b'{"text": "\xff"}', {}, ["a.jsonl", "line 1", "Unicode"]),
        ("a.jsonl", b"[" * 100_000, {}, ["a.jsonl", "line 1"]),
        ("a.jsonl", b"\n\n", {}, ["a.jsonl", "text"]),
        ("a.bin", b"", {}, ["a.bin", "uint16"]),
        ("a.bin", b"abc", {}, ["a.bin", "uint16"]),
        ("a.bin", b"\xff\xff" * 99, {}, ["a.bin", "65535", "below 256", "gpt2", "meta.pkl"]),
        ("a.bin", b"\x01\x00" * 99, {"tokenizer": "char"}, ["--tokenizer", "'char'", "a.bin"]),
        ("a.bin", b"\x01\x00" * 99, {"tokenizer": "bpe"}, ["--tokenizer", "'bpe'", "a.bin"]),
        ("a.bin", b"\x01\x00" * 5, {}, ["a.bin", "got 4", "--seq_len"]),
        ("a.txt", b"x" * 500, {"tokenizer": "bpee"}, ["--tokenizer", "'bpee'", "'bpe'"]),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, changes, parts):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(path, **changes)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 500


def test_odd_things_are_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, part in (("nothing", "some text"), ("pipe", "regular file")):
        with pytest.raises(InputError, match=part):
            load(tmp_path / name)
    with pytest.raises(InputError, match="some text"):  # a pipe in a folder is not opened
        load(tmp_path)


def test_an_unreadable_file_is_named(text_file, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"text\.txt.*Permission denied"):
        load(text_file)


def test_importing_needs_numpy_alone():
    code = "import sys, jaxmorph.data; print({'jax', 'grain', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
