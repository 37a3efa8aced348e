import os
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.data import token_files
from jaxmorph.data.examples import ExampleStream, validation_batches
from jaxmorph.data.token_files import TokenFile, chunks, windows

IDS = np.random.default_rng(0).integers(0, 50_000, 5000).astype("<u2")


@pytest.fixture
def path(tmp_path):
    IDS.tofile(tmp_path / "ids.bin")
    return tmp_path / "ids.bin"


def test_a_file_reads_as_the_array_it_holds(path, monkeypatch):
    monkeypatch.setattr(token_files, "_CHUNK", 512)
    tokens = TokenFile(path, IDS.dtype)
    for each, ids in ((tokens, IDS), (tokens.part(100, 4000).part(7, 3000), IDS[107:3100])):
        assert len(each) == len(ids)
        np.testing.assert_array_equal(each, ids)
        np.testing.assert_array_equal(np.concatenate(list(chunks(each))), ids)
        for key in (slice(3, 90), slice(-8, None), slice(5, 5), slice(9, 2)):
            np.testing.assert_array_equal(each[key], ids[key])
        starts = np.array([0, 17, len(ids) - 40])
        np.testing.assert_array_equal(windows(each, starts, 40), windows(ids, starts, 40))
    with pytest.raises(ValueError, match="step 2"):
        tokens[::2]


def test_examples_are_the_same_from_a_file_and_from_memory(path):
    tokens = TokenFile(path, IDS.dtype)
    sizes = {"seq_len": 9, "batch_size": 4, "n_batches": 5}
    np.testing.assert_array_equal(
        validation_batches(tokens, **sizes), validation_batches(IDS, **sizes)
    )
    read, held = (ExampleStream(each, seq_len=9, seed=1) for each in (tokens, IDS))
    np.testing.assert_array_equal(read.batch(550, 64), held.batch(550, 64))


def test_the_length_is_that_at_the_time_of_opening(path):
    tokens = TokenFile(path, IDS.dtype)
    with path.open("ab") as file:
        file.write(b"\xff" * 100)
    np.testing.assert_array_equal(tokens, IDS)


def test_a_shortened_file_is_reported_by_name(path):
    tokens = TokenFile(path, IDS.dtype)
    os.truncate(path, 6000)
    np.testing.assert_array_equal(tokens[:3000], IDS[:3000])
    with pytest.raises(InputError, match=r"ids\.bin: got '6000 bytes'.*10000 bytes.*shortened"):
        tokens[2999:3001]
    with pytest.raises(InputError, match="shortened"):  # out of the prefetching thread
        next(ExampleStream(tokens, seq_len=9, seed=1).batches(0, 500))


def test_a_file_is_closed_when_nothing_uses_it(path):
    def open_files():
        return os.listdir("/proc/self/fd")

    before = len(open_files())
    part = TokenFile(path, IDS.dtype).part(0, 50)
    assert len(open_files()) == before + 1
    del part
    assert len(open_files()) == before


def test_a_run_whose_file_is_shortened_ends_with_a_message(tmp_path):
    np.tile(np.arange(200, dtype="<u2"), 5000).tofile(tmp_path / "ids.bin")
    flags = "--tokenizer byte --n_layers 1 --d_model 16 --n_heads 1 --seq_len 16 --batch_size 8"
    command = [sys.executable, "-m", "jaxmorph.train", "--data", str(tmp_path / "ids.bin")]
    command += [
        *flags.split(),
        "--max_steps",
        "1000000",
        "--progress",
        "lines",
        "--log_interval",
        "1",
    ]
    command += ["--run_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.truncate(tmp_path / "ids.bin", 1000)
        _, error = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "ids.bin: got '1000 bytes', expected the 2000000 bytes" in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
