"""The table of metrics."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmorph.step.metrics import DEFAULT, Metric, by_figure, objective


def test_names_are_told_apart_and_one_judges_the_run():
    assert len({metric.name for metric in DEFAULT}) == len(DEFAULT)
    judged = objective(DEFAULT)
    assert judged is not None
    assert judged.name == "val/loss"
    assert list(by_figure(DEFAULT)) == [
        "learning_rate",
        "throughput",
        "gradient_norm",
        "head_learning_rate",
        "loss",
    ]


def test_what_an_update_gives_is_taken_from_its_facts():
    state: dict = {"newly_activated_heads": 1, "newly_pruned_heads": 2}
    state["head_status"] = np.asarray([[-1, 0, 1], [7, 0, 0]])
    update = SimpleNamespace(
        loss=1.5, grad_norm=2.5, learning_rate=0.1, skipped=3, state=state,
        head_multipliers=np.asarray([0.0, 3.0]), mean_head_multiplier=1.5,
    )  # fmt: skip
    values = {metric.name: metric.value(update) for metric in DEFAULT if metric.value is not None}
    assert values == {
        "train/learning_rate": 0.1,
        "train/grad_norm": 2.5,
        "train/skipped": 3,
        "newly_activated_heads": 1,
        "newly_pruned_heads": 2,
        "cooling_down_heads": 2,
        "max_head_lr_multiplier": 3.0,
        "avg_head_lr_multiplier": 1.5,
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
