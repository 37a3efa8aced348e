"""The table of metrics."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxmorph.step.metrics import DEFAULT, Metric, by_figure, objective


def test_names_are_told_apart_and_one_judges_the_run():
    assert len({metric.name for metric in DEFAULT}) == len(DEFAULT)
    judged = objective(DEFAULT)
    assert judged is not None
    assert judged.name == "val/loss"
    assert list(by_figure(DEFAULT)) == ["learning_rate", "throughput", "gradient_norm", "loss"]


def test_what_an_update_gives_is_taken_from_its_facts():
    update = SimpleNamespace(loss=1.5, grad_norm=2.5, learning_rate=0.1, skipped=3)
    values = {metric.name: metric.value(update) for metric in DEFAULT if metric.value is not None}
    assert values == {
        "train/learning_rate": 0.1,
        "train/grad_norm": 2.5,
        "train/skipped": 3,
    }


def test_values_are_written_as_the_table_says():
    written = {metric.name: metric.written(12345.678) for metric in DEFAULT}
    assert written["val/loss"] == "12345.6780"
    assert written["tokens"] == "12.3k"
    assert written["batch_size"] == "12,346"


@pytest.mark.parametrize("wrong", [{"figure": "a/b"}, {"best": "lowest"}])
def test_metric_that_could_not_be_drawn_is_refused(wrong):
    with pytest.raises(AssertionError):
        Metric("x", "x", **wrong)


def test_the_table_loads_no_jax():
    code = "import sys, jaxmorph.step.metrics; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
