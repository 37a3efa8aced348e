"""Logs: every line strict JSON, cut back byte for byte, whatever a crash left."""

import json
import math
import os
import re

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.json_lines import JsonLines, cut_back, read_records


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
        (ONE + "oops\n" + TWO, "line 2: got 'oops', expected one JSON object per line"),
        (ONE + '{"loss": 1}\n', "step: got {'loss': 1}, expected a step in every line"),
    ],
)
def test_log_with_a_broken_line_before_the_cut_is_refused_untouched(tmp_path, text, said):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{path}: {said}")):
        JsonLines(path).cut_back_to_step(2)
    assert path.read_text() == text


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
