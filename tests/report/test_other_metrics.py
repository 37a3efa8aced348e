"""Runs of another task, whose metrics have other names, words and units, read back and drawn."""

import json
import math
import re

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.report.drawing import rendered
from jaxmorph.report.figures import loss_figure, run_figures
from jaxmorph.report.page import write_report
from jaxmorph.report.run_record import read_run
from jaxmorph.step.metrics import DEFAULT, RUN_METRICS, Metric

SQUARED = "squared error"
METRICS = (
    *RUN_METRICS,
    Metric("train/loss", "training loss", SQUARED, ".3e", "loss", "training", style="smooth"),
    Metric(
        *("val/error", "validation error", SQUARED, ".3e", "loss", "validation"),
        style="marked",
        tile=True,
        best="lowest",
    ),
    Metric("train/weight_norm", "norm of the weights", "root mean square", figure="weights"),
    Metric("train/hits", "training hits", form=".0%", figure="hits", style="smooth"),
    Metric("val/hits", "validation hits", form=".0%", figure="hits", style="marked", tile=True),
    Metric("images", "images", figure="throughput", kind="total", tile=True),
)
FIGURES = ("loss", "learning_rate", "throughput", "gradient_norm", "weights", "hits")


def lines_of_another_task(steps=60):
    lines: list[dict[str, object]] = [{"step": 0, "val/error": 2.5, "val/hits": 0.0}]
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "train/loss": 2 * math.exp(-step / 20),
            "train/learning_rate": 1e-3,
            "train/grad_norm": 1.0,
            "train/weight_norm": 0.1 + step / 100,
            "train/hits": step / 100,
            "step_seconds": 0.5,
            "tokens": 64 * step,
            "images": 32 * step,
        }
        if step % 20 == 0:
            line |= {"val/error": 2.5 * math.exp(-step / 20), "val/hits": step / 120}
        lines.append(line)
    return lines


def write_run(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_page_and_files_are_named_by_the_metrics(tmp_path):
    folder = write_run(tmp_path / "run", lines_of_another_task())
    page = write_report(folder, METRICS).read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == ["Loss", "Learning rate", "Throughput", "Gradient norm", "Weights", "Hits"]
    assert sorted(path.stem for path in folder.glob("*.png")) == sorted(FIGURES)
    tiles = re.findall("<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small>", page)
    assert tiles == [
        ("Steps", "60", ""),
        ("Tokens", "3.84k", ""),
        ("Time in steps", "30.0 s", ""),
        ("Tokens per second", "128", "median"),
        ("Images per second", "64", "median"),
        ("Validation error", "1.245e-01", "from 2.500e+00 at step 0"),
        ("Best validation error", "1.245e-01", "at step 60"),
        ("Validation hits", "50%", "from 0%"),
        ("Images", "1920", ""),
    ]
    assert "nats" not in page


def test_figures_take_words_units_and_forms_from_the_metrics(tmp_path):
    run = read_run(write_run(tmp_path, lines_of_another_task()), METRICS)
    figures = run_figures(run)
    assert set(figures) == set(FIGURES)
    labels = {name: figure.axes[0].get_ylabel() for name, figure in figures.items()}
    assert labels == {
        "loss": "loss (squared error)",
        "learning_rate": "learning rate",
        "throughput": "throughput",
        "gradient_norm": "gradient norm",
        "weights": "norm of the weights (root mean square)",
        "hits": "hits",
    }
    assert [axes.get_xlabel() for axes in figures["loss"].axes] == [
        *("step", "tokens", "training FLOPs", "images")
    ]
    assert legend(figures["loss"]) == ["training", "validation"]
    assert legend(figures["hits"]) == ["training hits", "validation hits"]
    assert legend(figures["throughput"]) == ["images per second", "tokens per second"]
    curves = [np.asarray(line.get_xydata()) for line in figures["weights"].axes[0].get_lines()]
    np.testing.assert_array_equal(curves, [np.transpose(run.series["train/weight_norm"])])
    rendered(figures["hits"], "png")
    ticks = [text.get_text() for text in figures["hits"].axes[0].get_yticklabels()]
    assert all(re.fullmatch(r"\d+%", tick) for tick in ticks)


def test_metrics_of_one_figure_and_style_differ_in_colour(tmp_path):
    run = read_run(write_run(tmp_path, lines_of_another_task()), METRICS)
    images, *tokens = run_figures(run)["throughput"].axes[0].get_lines()
    assert {line.get_color() for line in tokens}.isdisjoint({images.get_color()})


def test_runs_are_compared_by_what_they_are_judged_by(tmp_path):
    run = read_run(write_run(tmp_path, lines_of_another_task()), METRICS)
    figure = loss_figure([run, run], ["a", "b"])
    assert figure.axes[0].get_ylabel() == "loss (squared error)"
    assert legend(figure) == ["a", "b", "training", "validation"]


def test_what_is_best_at_its_highest_is_drawn_whole_and_told(tmp_path):
    score = Metric("score", "score", figure="score", style="marked", tile=True, best="highest")
    rising = [{"step": step, "score": step * (20 - step) + 1} for step in range(20)]
    folder = write_run(tmp_path, rising)
    assert loss_figure([read_run(folder, (score,))], ["run"]).axes[0].get_ylim()[1] > 101
    page = write_report(folder, (score,)).read_text()
    assert "<dt>Best score</dt><dd>101<small>at step 10</small>" in page


def test_numbers_the_table_does_not_know_are_read_by_their_names(tmp_path):
    lines = lines_of_another_task(2)
    lines[1] |= {"new/gain": 3, "note": "begun", "parts": {"a": 1}, "flag": True, "none": None}
    lines[2] |= {"new/gain": "NaN", "note": 7.5}
    lines.append({"step": 3, "note": "over"})
    run = read_run(write_run(tmp_path, lines), DEFAULT)
    names = [metric.name for metric in run.metrics]
    assert names[: len(DEFAULT)] == [metric.name for metric in DEFAULT]
    found = ["val/error", "val/hits", "train/weight_norm", "train/hits", "images"]
    assert names[len(DEFAULT) :] == [*found, "new/gain", "note"]
    assert run.metrics[-2] == Metric("new/gain", "new/gain")
    assert np.transpose(run.series["new/gain"]).tolist() == [[1, 3]]
    assert run.lost["new/gain"] == 1
    assert np.transpose(run.series["note"]).tolist() == [[2, 7.5]]
    assert write_report(tmp_path).exists()


def test_known_metric_that_is_no_number_is_refused(tmp_path):
    folder = write_run(tmp_path, [{"step": 0, "val/error": "small"}])
    with pytest.raises(InputError, match="line 1: val/error: got 'small', expected a number"):
        read_run(folder, METRICS)
    assert read_run(folder).last_step == 0
