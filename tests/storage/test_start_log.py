"""The log of a run's starts, and what a resumed run says of other software."""

import datetime
import json
import os
import platform
import socket
from importlib.metadata import version

import jax
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.start_log import record_start, software_facts

NOW = {"jax": "0.12.0", "python": "3.13.1", "device": "cpu", "device_count": 1}


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "runs.jsonl").read_text().splitlines()]


def test_a_line_says_when_where_and_with_what(tmp_path):
    facts = software_facts(jax.devices()[:2])
    assert record_start(tmp_path, 0, False, facts) == []
    (line,) = lines_of(tmp_path)
    started = datetime.datetime.fromisoformat(line["started"])
    assert abs(datetime.datetime.now(datetime.UTC) - started) < datetime.timedelta(minutes=1)
    assert (line["step"], line["resumed"], line["device"], line["device_count"]) == (
        *(0, False),
        *(jax.devices()[0].device_kind, 2),
    )
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        assert line[name] == version(name)
    assert line["python"] == platform.python_version()
    assert platform.machine() in line["platform"]
    text = (tmp_path / "runs.jsonl").read_text()
    for private in (str(tmp_path), os.path.expanduser("~"), socket.gethostname()):
        assert private not in text


def test_a_resumed_run_says_what_differs_from_its_last_start(tmp_path):
    older = NOW | {"jax": "0.10.2", "device_count": 8}
    assert record_start(tmp_path, 0, False, NOW | {"jax": "0.9.0"}) == []
    assert record_start(tmp_path, 0, False, older) == []  # nothing was kept of the first start
    assert record_start(tmp_path, 4, True, NOW) == [
        "This run continues with other software: jax 0.10.2 -> 0.12.0, device_count 8 -> 1; "
        "results may differ in the last bits."
    ]
    assert record_start(tmp_path, 8, True, NOW) == []
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 0, 4, 8]


def test_facts_that_an_older_line_lacks_are_no_difference(tmp_path):
    record_start(tmp_path, 0, False, {"jax": "0.12.0"})
    assert record_start(tmp_path, 1, True, NOW) == []
    (tmp_path / "runs.jsonl").unlink()
    assert record_start(tmp_path, 2, True, NOW) == []


@pytest.mark.parametrize("damage", ['{"started": "2026', "\0\0\0\n", "[1]\n"])
def test_a_damaged_last_line_gives_way(tmp_path, damage):
    record_start(tmp_path, 0, False, NOW)
    with open(tmp_path / "runs.jsonl", "a") as file:
        file.write(damage)
    record_start(tmp_path, 4, True, NOW)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 4]


def test_an_unreadable_log_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("oops\n" + json.dumps({"step": 0, **NOW}) + "\n")
    with pytest.raises(InputError, match=r"runs\.jsonl: line 1: got 'oops', expected one JSON"):
        record_start(tmp_path, 4, True, NOW)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"runs\.jsonl: expected a writable file"):
        record_start(tmp_path, 4, True, NOW)
