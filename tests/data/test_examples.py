import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.data import corpora, examples
from jaxmorph.data.examples import ExampleStream, load_tokens, validation_batches

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
    assert corpus.train.tobytes() == text[:cut].encode()
    assert corpus.val.tobytes() == text[cut:].encode()


def test_char_covers_what_only_validation_has(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 60 + "xyz" * 20)
    corpus = load(path, "char", val_fraction=0.25)
    assert corpus.tokenizer.decode(corpus.val) == "xyz" * 20
    assert corpus.tokenizer.vocab_size == 6


def test_a_folder_is_split_by_whole_documents(folder):
    corpus = load(folder)
    train, val = (t.tobytes().split(b"\0")[:-1] for t in (corpus.train, corpus.val))
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
    assert after.val.tobytes().lower() == before.val.tobytes().lower()
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
    found = (corpus.train.tobytes() + corpus.val.tobytes()).split(b"\0")[:-1]
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


def test_bin_files_are_mapped_and_split(tmp_path):
    ids = np.arange(1000) % 200
    alone = load(write_bin(tmp_path / "tokens.bin", ids))
    np.testing.assert_array_equal(np.concatenate([alone.train, alone.val]), ids)
    assert len(alone.val) == 100
    assert alone.train.base is not None
    assert isinstance(alone.train.base.base, np.memmap)

    train = write_bin(tmp_path / "train.bin", ids)
    write_bin(tmp_path / "val.bin", ids[:50])
    for source in (train, tmp_path):
        pair = load(source)
        np.testing.assert_array_equal(pair.train, ids)
        np.testing.assert_array_equal(pair.val, ids[:50])
    write_bin(tmp_path / "val.bin", ids[1:51])
    assert load(train).sha256 != pair.sha256


def test_large_arrays_are_hashed_at_both_ends(monkeypatch):
    monkeypatch.setattr(examples, "_CHUNK", 64)
    ids = np.arange(200, dtype=np.uint16)
    whole = [chunk.tolist() for chunk in examples._chunks(ids)]
    assert [i for chunk in whole for i in chunk] == ids.tolist()
    monkeypatch.setattr(examples, "_HASHED_WHOLE", 399)
    ends = [chunk.tolist() for chunk in examples._chunks(ids)]
    assert ends == [ids[:32].tolist(), ids[-32:].tolist()]


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
    monkeypatch.setattr(examples, "split_documents", None)  # a hit needs no second look at the text
    cached = load(text_file, kind)
    np.testing.assert_array_equal(cached.train, built.train)
    np.testing.assert_array_equal(cached.val, built.val)
    assert cached.train.dtype == built.train.dtype
    assert isinstance(cached.train.base, np.memmap)
    assert cached.sha256 == built.sha256
    assert cached.tokenizer.to_json() == built.tokenizer.to_json()


def test_a_damaged_cache_is_rebuilt(text_file, tmp_path):
    built = load(text_file, "bpe")
    good = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(good) == 3
    for path, content in good.items():
        flips = [bytes([content[i] ^ 4]) for i in range(len(content))]
        damaged = [content[:i] + flips[i] + content[i + 1 :] for i in range(0, len(content), 97)]
        for bad in (b"", content[: len(content) // 2], *damaged[:8], damaged[-1]):
            path.write_bytes(bad)
            again = load(text_file, "bpe")
            np.testing.assert_array_equal(again.train, built.train)
            np.testing.assert_array_equal(again.val, built.val)
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
        ("a.bin", b"\xff\xff" * 99, {}, ["a.bin", "65535", "below 256", "gpt2"]),
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


# --- the stream ------------------------------------------------------------------------------

T = 7
TOKENS = np.arange(1003, dtype=np.uint16)  # every token is its own position


def stream(tokens=TOKENS, **changes):
    return ExampleStream(tokens, **({"seq_len": T, "seed": 5} | changes))


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


@pytest.mark.parametrize("length", [T + 1, T + 2, 2 * T, 2 * T + 1, 3 * T, 99, 1003])
def test_an_epoch_predicts_no_token_twice_and_uses_every_window(length):
    examples = stream(TOKENS[:length])
    n = examples.examples_per_epoch
    assert n >= max(1, (length - 1) // T - 1)  # at most one window is given up for the shift
    for epoch in range(4):
        rows = examples.batch(epoch * n, n)
        assert rows.dtype == np.int32
        assert rows.shape == (n, T + 1)
        np.testing.assert_array_equal(rows - rows[:, :1], np.tile(np.arange(T + 1), (n, 1)))
        predicted = np.sort(rows[:, 1:].ravel())
        np.testing.assert_array_equal(predicted, predicted[0] + np.arange(n * T))
        ids = examples.example_ids(epoch * n, n)
        assert set(ids[:, 0]) == {epoch}
        assert sorted(ids[:, 1]) == list(range(n))


def test_epochs_differ_in_order_and_in_cut():
    examples = stream()
    n = examples.examples_per_epoch
    orders = [tuple(examples.example_ids(e * n, n)[:, 1]) for e in range(6)]
    assert len(set(orders)) == 6
    cuts = {int(examples.batch(e * n, n).min()) for e in range(60)}
    assert cuts == set(range(T))


def test_the_seed_decides_everything():
    first, again, other = (take(stream(seed=s).batches(0, 12), 30) for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(processes):
    whole = take(stream().batches(24, 12), 20)
    parts = [
        take(stream(process_index=p, process_count=processes).batches(24, 12), 20)
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([p[step] for p in parts]), batch)


def test_changing_the_batch_size_changes_no_example():
    rows, position = [], 0
    for size, count in ((4, 10), (12, 9), (1, 5), (50, 3), (8, 4)):
        rows += take(stream().batches(position, size), count)
        position += size * count
    np.testing.assert_array_equal(np.concatenate(rows), stream().batch(0, position))
    assert position > stream().examples_per_epoch  # an epoch ends on the way


def test_resuming_gives_the_batches_that_would_have_come():
    examples = stream()
    straight = take(examples.batches(0, 12), 40)
    np.testing.assert_array_equal(take(stream().batches(25 * 12, 12), 15), straight[25:])
    far = 10**12
    np.testing.assert_array_equal(
        take(stream().batches(far, 12), 3), [stream().batch(far + 12 * i, 12) for i in range(3)]
    )


def test_two_iterators_do_not_disturb_each_other():
    examples = stream()
    one, two = examples.batches(0, 12), examples.batches(0, 12)
    for _ in range(20):
        np.testing.assert_array_equal(next(one), next(two))
    one.close()
    two.close()


def grain_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain")]


@pytest.mark.parametrize("end", ["close", "forget"])
def test_threads_end_with_their_iterator(end):
    iterator = stream().batches(0, 12)
    next(iterator)
    assert grain_threads()
    if end == "close":
        iterator.close()
    del iterator
    gc.collect()
    deadline = time.monotonic() + 5
    while grain_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not grain_threads()


def test_an_open_iterator_does_not_hold_up_the_exit():
    code = (
        "import numpy as np; from jaxmorph.data.examples import ExampleStream;"
        "i = ExampleStream(np.arange(10**6), seq_len=64, seed=0).batches(0, 64); next(i)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(InputError, match=r"--batch_size: got 13.*multiple of the 4 processes"):
        stream(process_count=4).batches(0, 13)
    with pytest.raises(ValueError, match="7 tokens"):
        stream(TOKENS[:T])


# --- validation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "batch_size", "n_batches", "shape"),
    [
        (1003, 4, 5, (5, 4)),
        (141, 4, 5, (5, 4)),  # exactly enough
        (140, 4, 5, (4, 4)),
        (30, 4, 5, (1, 4)),
        (27, 4, 5, (1, 3)),  # not one whole batch
        (T + 1, 4, 5, (1, 1)),
        (1003, 1, 1, (1, 1)),
    ],
)
def test_validation_windows_are_spread_and_do_not_overlap(length, batch_size, n_batches, shape):
    arguments = {"seq_len": T, "batch_size": batch_size, "n_batches": n_batches}
    batches = validation_batches(TOKENS[:length], **arguments)
    assert (len(batches), *batches[0].shape) == (*shape, T + 1)
    rows = np.concatenate(batches)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows - rows[:, :1], np.tile(np.arange(T + 1), (len(rows), 1)))
    gaps = np.diff(rows[:, 0])
    assert (gaps >= T).all()
    assert rows[0, 0] == 0
    if len(rows) > 1:
        assert rows[-1, -1] == length - 1
        assert gaps.max() - gaps.min() <= 1
    np.testing.assert_array_equal(validation_batches(TOKENS[:length], **arguments), batches)


def test_validation_needs_one_window():
    with pytest.raises(ValueError, match="7 tokens"):
        validation_batches(TOKENS[:T], seq_len=T, batch_size=1, n_batches=1)
