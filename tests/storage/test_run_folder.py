"""Locks held by real processes, logs cut back byte for byte, and the crash points."""

import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.storage import run_folder
from jaxmorph.storage.run_folder import JsonLines, RunLock, cut_back, write_text_atomically
from jaxmorph.system import crash_points
from jaxmorph.system.crash_points import crash_point

HOLD = """
import sys, time
from pathlib import Path
from jaxmorph.storage.run_folder import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path until its stdin closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_second_process_is_refused_with_the_first_ones_name(tmp_path, holder):
    with pytest.raises(InputError) as refusal, RunLock(tmp_path):
        pass
    message = str(refusal.value)
    assert str(tmp_path) in message
    assert f"process {holder.pid} on {socket.gethostname()}, started 20" in message
    holder.communicate()  # ends normally
    with RunLock(tmp_path) as lock:
        assert lock.taken_over_from == ""


def test_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path) as lock:
        assert f"process {holder.pid} " in lock.taken_over_from
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
        with pytest.raises(InputError, match=f"process {os.getpid()} "), RunLock(tmp_path):
            pass
    with RunLock(tmp_path) as lock:
        assert lock.taken_over_from == ""


def test_lock_is_released_when_the_body_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / "new" / "run"):
        raise ZeroDivisionError
    with RunLock(tmp_path / "new" / "run"):
        pass


def test_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--run_dir: got '.*file'.*\(File exists\)"):
        RunLock(tmp_path / "file").__enter__()


def refuse_constant(word):
    raise AssertionError(f"{word} is not strict JSON")


def test_every_line_is_strict_json_and_loses_nothing(tmp_path):
    values = [1, -0.0, 0.1, 1e-300, math.inf, -math.inf, math.nan, 2**60]
    record = {
        "step": np.int64(3),
        "loss": np.float32(0.1),
        "lost": np.float32(np.nan),
        "list": values,
        "nested": {"none": None, "text": "é\n\u2028", "flag": True},
    }
    with JsonLines(tmp_path / "log.jsonl") as lines:
        lines.write(record)
        lines.sync()
        lines.write({"step": 4})
        assert (tmp_path / "log.jsonl").read_text().count("\n") == 2  # nothing waits in a buffer
    first, second = (tmp_path / "log.jsonl").read_text().split("\n")[:2]
    read = json.loads(first, parse_constant=refuse_constant)
    assert read["nested"] == record["nested"]
    assert read["loss"] == float(np.float32(0.1))
    assert (read["step"], read["lost"], json.loads(second)) == (3, "NaN", {"step": 4})
    assert str([float(value) for value in read["list"]]) == str([float(value) for value in values])


def test_what_json_cannot_say_leaves_the_file_alone(tmp_path):
    with JsonLines(tmp_path / "log.jsonl") as lines:
        lines.write({"step": 1})
        with pytest.raises(TypeError, match="no JSON for a ndarray"):
            lines.write({"step": 2, "loss": np.zeros(2)})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


ONE, TWO, THREE = '{"step":  1}\n', '{"step": 2, "a": "NaN"}\n', '{"step": 3}\n'


@pytest.mark.parametrize(
    ("before", "after", "gone"),
    [
        (ONE + TWO + THREE, ONE + TWO, 1),
        (ONE + TWO, ONE + TWO, 0),
        (ONE + TWO + THREE[:-1], ONE + TWO, 1),  # whole but for its line end
        (ONE + TWO + '{"step": 3, "lo', ONE + TWO, 1),
        (ONE + '{"st', ONE, 1),
        (ONE + TWO + "\0\0\0\n" + THREE, ONE + TWO, 2),  # garbage of a power cut, past the cut
        (ONE + TWO + "[2]\n", ONE + TWO, 1),
        (THREE, "", 1),
        ("", "", 0),
    ],
)
def test_log_is_cut_back_to_a_step(tmp_path, before, after, gone):
    path = tmp_path / "log.jsonl"
    path.write_text(before)
    lines = JsonLines(path)
    assert lines.cut_back_to_step(2) == gone
    assert path.read_text() == after
    lines.write({"step": 3})
    lines.close()
    assert path.read_text() == after + THREE
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_cutting_back_a_missing_log_is_nothing(tmp_path):
    assert JsonLines(tmp_path / "log.jsonl").cut_back_to_step(2) == 0
    assert not (tmp_path / "log.jsonl").exists()


def test_log_can_be_cut_while_it_is_written(tmp_path):
    with JsonLines(tmp_path / "log.jsonl") as lines:
        for index in range(6):
            lines.write({"index": index})
        assert lines.cut_back(lambda record: record["index"] % 2 == 0) == 3
        lines.write({"index": 6})
    text = (tmp_path / "log.jsonl").read_text()
    kept = [json.loads(line)["index"] for line in text.splitlines()]
    assert kept == [0, 2, 4, 6]


def test_writing_after_a_torn_line_removes_it(tmp_path):
    (tmp_path / "log.jsonl").write_text(ONE + '{"st')
    with JsonLines(tmp_path / "log.jsonl") as lines:
        lines.write({"step": 3})
    assert (tmp_path / "log.jsonl").read_text() == ONE + THREE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ONE + "oops\n" + TWO, "line 2: got 'oops', expected one JSON object a line"),
        (ONE + '{"loss": 1}\n', "step: got {'loss': 1}, expected a step in every line"),
    ],
)
def test_log_with_a_broken_line_before_the_cut_is_refused_untouched(tmp_path, text, said):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{path}: {said}")):
        JsonLines(path).cut_back_to_step(2)
    assert path.read_text() == text


def test_replacing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_text_atomically(path, "é: 1\n")
    assert path.read_bytes() == "é: 1\n".encode()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            write_text_atomically(path, "other")
    assert path.read_text() == "é: 1\n"
    write_text_atomically(path, "other")
    assert path.read_text() == "other"
    assert os.listdir(tmp_path) == ["config.yaml"]
    path.write_text(ONE + TWO)
    inode = path.stat().st_ino
    assert cut_back(path, lambda record: record["step"] == 2) == 1
    assert path.stat().st_ino != inode  # replaced, never rewritten in place


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, "no space")


@pytest.fixture
def kills(monkeypatch):
    """The signals this process would have been sent."""
    sent = []
    monkeypatch.setattr(crash_points.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(crash_points, "_passed", type(crash_points._passed)())
    return sent


@pytest.mark.parametrize(("wanted", "passing"), [("step", 1), ("step:1", 1), ("step:3", 3)])
def test_crash_point_kills_at_the_named_passing_only(monkeypatch, kills, wanted, passing):
    monkeypatch.setenv("JAXMORPH_CRASH_AT", wanted)
    for number in range(1, 6):
        crash_point("before_save")
        crash_point("step")
        assert len(kills) == (number >= passing)
    assert kills == [(os.getpid(), signal.SIGKILL)]


def test_crash_point_is_inert_by_default(monkeypatch, kills):
    monkeypatch.delenv("JAXMORPH_CRASH_AT", raising=False)
    for name in crash_points.POINTS:
        crash_point(name)
    assert kills == []


@pytest.mark.parametrize(
    "wanted", ["stepp", "step:0", "step:x", "step:", "step:-1", ":2", "step:²"]
)
def test_unknown_crash_point_is_refused(monkeypatch, kills, wanted):
    monkeypatch.setenv("JAXMORPH_CRASH_AT", wanted)
    with pytest.raises(InputError, match="JAXMORPH_CRASH_AT"):
        crash_point("step")
    with pytest.raises(AssertionError):
        crash_point("nowhere")
    assert kills == []
