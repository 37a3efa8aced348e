"""Logs: every line strict JSON, known by its digest, cut back byte for byte, whatever a crash left."""

import errno
import hashlib
import json
import math
import os
import re

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.json_lines import JsonLines, LogMark, cut_back, read_records, salvaged
from jaxmorph.system import files


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
def test_log_is_cut_back_byte_for_byte(tmp_path, before, after, gone):
    path = tmp_path / "log.jsonl"
    path.write_text(before)
    assert cut_back(path, lambda record: record["step"] <= 2) == gone
    assert path.read_text() == after
    with JsonLines(path) as lines:
        lines.write({"step": 3})
    assert path.read_text() == after + THREE
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_cutting_back_a_missing_log_is_nothing(tmp_path):
    assert cut_back(tmp_path / "log.jsonl", lambda record: True) == 0
    assert not (tmp_path / "log.jsonl").exists()


def mark_of(text: str) -> LogMark:
    """The mark as any program would compute it."""
    data = text.encode()
    return LogMark(text.count("\n"), len(data), hashlib.sha256(data).hexdigest())


def test_a_mark_says_what_has_been_written_so_far(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(ONE + '{"st')  # of a killed process
    with JsonLines(path) as lines:
        assert lines.mark() == mark_of(ONE)
        for text in ("", TWO, THREE, "é" * 100_000):
            lines.write({"text": text})
            assert lines.mark() == mark_of(path.read_text())
    assert JsonLines(tmp_path / "none.jsonl").mark() == mark_of("") == LogMark.of(())
    assert LogMark.of([ONE.encode(), TWO.encode()]) == mark_of(ONE + TWO)


LONG = json.dumps({"step": 2, "text": "x" * 200_000}) + "\n"


@pytest.mark.parametrize("known", ["", ONE, ONE + LONG, LONG + LONG + ONE])
@pytest.mark.parametrize("rest", ["", '{"st', THREE, "\0\n" + LONG])
def test_a_log_goes_on_behind_the_lines_of_a_mark(tmp_path, known, rest):
    path = tmp_path / "log.jsonl"
    path.write_text(known + rest)
    with JsonLines(path) as lines:
        assert lines.begins_with(mark_of(known))
        assert path.read_text() == known + rest  # not changed yet
        lines.cut()
        assert path.read_text() == known
        lines.write({"step": 3})
        assert lines.mark() == mark_of(known + THREE)
    assert path.read_text() == known + THREE


@pytest.mark.parametrize(
    "text",
    [
        *("", ONE, TWO, ONE + THREE + TWO, TWO + ONE, ONE + TWO[:-1]),
        *(
            ONE + "\n" + TWO,
            ONE.replace("1", "3") + TWO,
            "oops\n" + ONE + TWO,
            ONE + TWO[:-2] + " \n",
        ),
    ],
)
def test_a_log_that_begins_otherwise_is_noticed_and_left_alone(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    assert not JsonLines(path).begins_with(mark_of(ONE + TWO))
    assert path.read_text() == text


def test_the_last_line_is_taken_back_and_written_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(ONE + TWO + '{"st')
    with JsonLines(path) as lines:
        assert lines.take_back(1) is None
        assert lines.take_back(2) == {"step": 2, "a": "NaN"}
        assert path.read_text() == ONE + TWO + '{"st'  # until the next write
        lines.write({"step": 2, "b": 1})
        lines.write({"step": 3})
        written = ONE + '{"step": 2, "b": 1}\n' + THREE
        assert (path.read_text(), lines.mark()) == (written, mark_of(written))
    assert JsonLines(tmp_path / "none.jsonl").take_back(0) is None


def test_only_the_end_of_a_log_is_read_to_write_it(tmp_path, monkeypatch):
    """Once a log is open, its lines are counted, hashed and replaced without being read again."""
    path, read = tmp_path / "log.jsonl", []
    with JsonLines(path) as lines:
        lines.write({"step": 1})
        monkeypatch.setattr("builtins.open", lambda *_, **__: read.append(1))
        for step in range(2, 50):
            lines.write({"step": step})
            assert lines.take_back(step) == {"step": step}
            lines.write({"step": step, "more": 1})
            lines.mark()
    assert read == []


def test_a_line_that_cannot_be_written_leaves_no_part_of_it(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    write, lines = os.write, JsonLines(path)
    lines.write({"step": 1})

    def full(descriptor, content):
        if len(content) <= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:5])

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", full)
        with pytest.raises(OSError, match="No space left") as failure:
            lines.write({"step": 2})
    assert failure.value.filename == str(path)
    assert path.read_text() == '{"step": 1}\n{"step": 2'
    lines.write({"step": 3})
    lines.close()
    assert path.read_text() == '{"step": 1}\n' + THREE


def test_writing_after_a_torn_line_removes_it(tmp_path):
    (tmp_path / "log.jsonl").write_text(ONE + '{"st')
    with JsonLines(tmp_path / "log.jsonl") as lines:
        lines.write({"step": 3})
    assert (tmp_path / "log.jsonl").read_text() == ONE + THREE


def test_log_with_a_broken_line_before_the_cut_is_refused_untouched(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(ONE + "oops\n" + TWO)
    said = f"{path}: line 2: got 'oops', expected one JSON object per line"
    with pytest.raises(InputError, match=re.escape(said)):
        cut_back(path, lambda record: True)
    assert path.read_text() == ONE + "oops\n" + TWO


def test_what_can_be_read_of_a_damaged_log_is_salvaged(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(ONE + "oops\n[2]\n" + "[" * 9999 + "\n" + TWO + '{"step": 3}')
    assert b"".join(salvaged(path, lambda record: True)) == (ONE + TWO).encode()
    assert b"".join(salvaged(path, lambda record: record["step"] == 2)) == TWO.encode()
    assert list(salvaged(tmp_path / "none.jsonl", lambda record: True)) == []


def test_cutting_back_replaces_the_file_and_never_rewrites_it_in_place(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(ONE + TWO)
    inode = path.stat().st_ino
    assert cut_back(path, lambda record: record["step"] == 2) == 1
    assert path.stat().st_ino != inode  # replaced, never rewritten in place


def test_records_are_read_up_to_the_damage_of_a_crash(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_records(path) == []
    path.write_text(ONE + THREE + "\0\0\n" + '{"step": 4')
    assert read_records(path) == [{"step": 1}, {"step": 3}]
    path.write_text(ONE + "oops\n" + THREE)
    with pytest.raises(InputError, match="line 2: got 'oops', expected one JSON object per line"):
        read_records(path)
