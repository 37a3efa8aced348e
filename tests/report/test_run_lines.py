"""Long runs are read in part: what is left out, and what never is."""

import json

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.report import run_lines
from jaxmorph.report.run_record import read_run, throughput

STEPS = 3_000


@pytest.fixture
def long_run(tmp_path, monkeypatch):
    """A run of 3,000 steps, logged in full every tenth and evaluated every 500th, read in part."""
    monkeypatch.setattr(run_lines, "FEWEST", 20)
    random = np.random.default_rng(0)
    losses = random.uniform(1, 2, STEPS + 1)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            line = {"step": step}
            if step % 10 == 0:
                line |= {"train/loss": losses[step], "tokens": 100 * step, "step_seconds": 0.5}
            if step % 500 == 0:
                line |= {"val/loss": losses[step]}
            if step in (1237, 1240):
                line |= {"train/loss": "NaN"}
            print(json.dumps(line), file=file)
    return read_run(tmp_path), losses


def test_a_long_run_keeps_evenly_spaced_lines_and_both_ends(long_run):
    run, losses = long_run
    steps, values = run.series["train/loss"]
    spaced = [step for step in steps if step % 500]
    assert 20 <= len(spaced) <= 41
    assert set(np.diff(spaced[:-1])) <= {80, 90}  # every eighth that is not evaluated
    assert (run.last_step, steps[0], steps[-1]) == (STEPS, 10, STEPS)
    np.testing.assert_array_equal(values, losses[steps])
    rates, seconds = throughput(run)
    np.testing.assert_allclose(rates.values, 200)
    assert seconds == 0.5 * STEPS


def test_a_long_run_keeps_every_line_it_is_judged_by_and_every_lost_value(long_run):
    run, losses = long_run
    evaluated = np.arange(500, STEPS + 1, 500)
    np.testing.assert_array_equal(run.series["val/loss"].steps, evaluated)
    np.testing.assert_array_equal(run.series["val/loss"].values, losses[evaluated])
    assert run.lost["train/loss"] == 2


def test_lines_left_out_must_look_like_objects(long_run, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[1233] = '{"step": 12\n'
    path.write_text("".join(lines))
    with pytest.raises(InputError, match=r"line 1234: got '{\"step\": 12', expected one JSON obj"):
        read_run(tmp_path)
