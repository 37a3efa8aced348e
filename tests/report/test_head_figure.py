"""Heads over time: heads.jsonl read back, its heatmaps, the command and the report."""

import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.plot import main
from jaxmorph.report.figures import run_figures
from jaxmorph.report.head_figure import head_figure
from jaxmorph.report.head_record import read_heads
from jaxmorph.report.page import report_is_current, write_report
from jaxmorph.report.run_record import read_run
from jaxmorph.step.metrics import DEFAULT, METRIC_TABLE, table_to_json

PNG = b"\x89PNG\r\n\x1a\n"
MORPHS = [
    {
        **{"index": 0, "name": "stack_layers", "value": 2, "step": 420, "reason": "loss"},
        **{"model_before": {"n_layers": 2}, "model_after": {"n_layers": 4}},
    },
    {
        **{"index": 1, "name": "remove_heads", "value": None, "step": 900, "reason": "timeout"},
        **{"model_before": {"n_heads": 3}, "model_after": {"n_heads": 2}},
    },
]


def head_at(step, layer, head):
    """Gate, status and multiplier of a head: 0.1 closes at 200, reopens at 600; 1.0 fades from 700 on.

    The profile is 5, 0.9, 200, 1000: at 600 + t the multiplier is 1 + 4 t / 200, up to t = 200.
    """
    t = step - 600
    if (layer, head) == (0, 1) and step >= 200:
        if t < 0:
            return 0.0, -1, 0.0
        rate = 1 + 4 * t / 200 if t < 200 else 1 + 4 * 0.9 ** ((t - 200) / 8)
        return 1.0, 1 + t, rate
    if (layer, head) == (1, 0) and step >= 700:
        gate = 1 / (1 + math.exp((step - 800) / 20))
        return (0.0, -1, 0.0) if gate <= 0.1 else (gate, 0, 1.0)
    return 1.0, 0, 1.0


def sizes_at(step):
    """Layers and heads: 2 of 3; from 421 on 4 of 3; from 901 on 4 of 2."""
    return (2 if step <= 420 else 4), (3 if step <= 900 else 2)


def head_line(step, status="updated"):
    n_layers, n_heads = sizes_at(step)
    table = [[head_at(step, layer, head) for head in range(n_heads)] for layer in range(n_layers)]
    gates, statuses, rates = np.moveaxis(np.array(table), -1, 0).tolist()
    return {
        "status": status,
        "step": step,
        "controller_lr": 0.95,
        "gate_changes": 0.0125,
        "plateau_counter": 2,
        "early_stopping_triggered": False,
        "heads": {
            "gates": gates,
            "status": [[int(value) for value in row] for row in statuses],
            "multiplier": rates,
            "entropy": [[None] * n_heads] * n_layers,
        },
    }


def write_heads(folder, lines=None):
    """A run folder with a short metrics.jsonl, two morphs and these lines of heads.jsonl."""
    folder.mkdir(exist_ok=True)
    lines = [head_line(step) for step in range(100, 1200, 50)] if lines is None else lines
    contents = {
        "metrics.jsonl": [{"step": step, "val/loss": 2.0} for step in (0, 600, 1200)],
        "operations.jsonl": MORPHS,
        "heads.jsonl": lines,
    }
    for name, rows in contents.items():
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_heatmaps_have_a_row_for_each_head_that_ever_was_and_a_column_for_each_line(tmp_path):
    folder = write_heads(tmp_path / "run")
    heads = read_heads(folder)
    assert heads is not None
    figure: Any = head_figure(read_run(folder), heads)
    steps = np.arange(100, 1200, 50)
    rows = [(layer, head) for layer in range(4) for head in range(3)]
    for panel, number in ((0, 0), (1, 2)):
        axes = figure.axes[panel]
        (mesh,) = axes.collections
        drawn = np.ma.filled(mesh.get_array(), np.nan)
        wanted = [
            [
                head_at(step, *at)[number] if np.all(np.less(at, sizes_at(step))) else np.nan
                for step in steps
            ]
            for at in rows
        ]
        np.testing.assert_allclose(drawn, wanted)
        corners = mesh.get_coordinates()
        begins = [420 if step == 450 else 900 if step == 950 else step for step in steps]
        np.testing.assert_array_equal(corners[0, :, 0], [*begins, 1200])  # as the shape changes
        assert axes.get_ylim() == (12, 0)
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            f"{layer}.{head}" for layer, head in rows
        ]
        assert axes.patch.get_hatch()
    scales = [figure.axes[panel].collections[0].norm for panel in (0, 1)]
    assert (scales[0].vmin, scales[0].vmax) == (0, 1)
    assert scales[1]([0, 1]).tolist() == [0, 0.5]  # diverging around 1
    names = [text.get_text() for text in figure.axes[0].texts]
    assert names == ["stack_layers 2", "remove_heads"]


def test_the_strip_counts_heads_by_status(tmp_path):
    folder = write_heads(tmp_path / "run")
    heads = read_heads(folder)
    assert heads is not None
    closed, own_rate, stable = head_figure(read_run(folder), heads).axes[2].collections

    def top(area: Any, step):
        points = area.get_paths()[0].vertices
        return points[(points[:, 0] == step)][:, 1].max()

    for step, counts in ((150, (0, 0, 6)), (350, (1, 1, 6)), (750, (0, 1, 12)), (1100, (1, 2, 8))):
        assert tuple(top(area, step) for area in (closed, own_rate, stable)) == counts, step


def test_many_rows_are_named_by_layer(tmp_path):
    line = head_line(100)
    line["heads"] = {
        name: [[value] * 16] * 100
        for name, value in (("gates", 1), ("status", 0), ("multiplier", 1))
    }
    folder = write_heads(tmp_path / "run", [line])
    heads = read_heads(folder)
    assert heads is not None
    figure = head_figure(read_run(folder), heads)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        str(n) for n in range(0, 100, 4)
    ]
    assert figure.get_size_inches()[1] < 20


def test_the_command_draws_and_prints_the_end(tmp_path, capsys):
    folder = write_heads(tmp_path / "run")
    with (folder / "heads.jsonl").open("a") as file:
        file.write(json.dumps(head_line(1200, "evaluated")) + '\n{"status": "upda')
    assert main(["heads", str(folder)]) == 0
    assert (folder / "heads.png").read_bytes().startswith(PNG)
    assert capsys.readouterr().out.splitlines() == [
        "  layer   heads   open   closed   with a rate of their own",
        "      0       2      2        0                          1",
        "      1       2      1        1                          0",
        "      2       2      2        0                          0",
        "      3       2      2        0                          0",
        "",
        "After step 1,200 1 of 8 heads are closed.",
        "Last update of the controller: step 1,150, updated, rate 0.95, mean change of the gates "
        "0.0125, 2 in a row that changed little.",
        "",
        f"Figure: {folder / 'heads.png'}",
    ]
    assert main(["heads", str(folder), "--save", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").read_bytes().startswith(b"<?xml")


def test_only_the_report_of_a_run_with_heads_has_them(tmp_path):
    folder = write_heads(tmp_path / "run")
    assert "<h2>Heads</h2>" in write_report(folder).read_text()
    assert (folder / "heads.png").read_bytes().startswith(PNG)
    assert report_is_current(folder)
    with (folder / "heads.jsonl").open("a") as file:
        file.write(json.dumps(head_line(1200)) + "\n")
    assert not report_is_current(folder)
    (folder / "heads.jsonl").unlink()
    assert "Heads" not in write_report(folder).read_text()


def test_a_run_without_heads_is_refused(tmp_path, capsys):
    folder = write_heads(tmp_path / "run")
    (folder / "heads.jsonl").unlink()
    assert main(["heads", str(folder)]) == 2
    complaint = f"error: {folder}: expected the folder of a run that recorded its heads, with heads"
    assert capsys.readouterr().err.startswith(complaint)
    assert not (folder / "heads.png").exists()


def test_a_long_record_is_thinned_in_little_memory_and_keeps_the_last_update(tmp_path):
    folder = write_heads(tmp_path / "run")
    with (folder / "heads.jsonl").open("w") as file:
        for step in range(1, 20_001):
            head_line_text = json.dumps(head_line(1000, "evaluated") | {"step": step})
            if step % 10 == 0 and step < 19_000:
                print(json.dumps(head_line(1000) | {"step": step}), file=file)
            print(head_line_text, file=file)
    size = (folder / "heads.jsonl").stat().st_size
    tracemalloc.start()
    heads = read_heads(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert heads is not None
    assert heads.last_update is not None
    assert heads.last_update.step == 18_990
    steps = [line.step for line in heads.lines]
    assert (steps[0], steps[-1]) == (1, 20_000)
    assert 500 <= len(steps) <= 1000
    assert peak < size / 5


def _with(**heads):
    line = head_line(100)
    return line | {"heads": line["heads"] | heads}


BAD = {
    "no object": ("[]", "line 1: got '[]', expected one JSON object per line"),
    "no step": ({"heads": {}}, "line 1: step: expected a whole number ≥ 0 in every line"),
    "no heads": ({"step": 1}, "line 1: heads: expected gates, status, multiplier of each head"),
    "no gates": (
        {"step": 1, "heads": {}},
        "line 1: heads: gates: expected as many numbers, or null",
    ),
    "a word": (_with(gates=[["x"]]), "line 1: heads: gates: expected as many numbers, or null"),
    "true": (_with(status=[[True]]), "line 1: heads: status: expected as many numbers, or null"),
    "ragged": (_with(gates=[[1], [1, 2]]), "line 1: heads: gates: expected as many numbers"),
    "huge": (_with(gates=[[10**400]]), "line 1: heads: gates: expected as many numbers"),
    "another size": (
        _with(status=[[0, 0]]),
        "line 1: heads: status: got '1 layers of 2 heads', expected 2 layers of 3 heads, like the gates",
    ),
    "no rate": (
        head_line(100) | {"controller_lr": "1"},
        "line 1: controller_lr: got '1', expected a",
    ),
    "no flag": (
        head_line(100) | {"early_stopping_triggered": 1},
        "line 1: early_stopping_triggered: got 1, expected true or false",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_one_message(tmp_path, capsys, name):
    line, message = BAD[name]
    folder = write_heads(tmp_path / "run")
    path = folder / "heads.jsonl"
    path.write_text((line if isinstance(line, str) else json.dumps(line)) + "\n")
    for command in (["heads", str(folder)], ["report", str(folder)]):
        assert main(command) == 2
        out, complaint = capsys.readouterr()
        assert (out, complaint.count("\n")) == ("", 1)
        assert complaint.startswith(f"error: {path}: {message}")
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize(
    "lines", [[], [_with(gates=[], status=[], multiplier=[])], [_with(gates=[[None] * 3] * 2)]]
)
def test_a_record_of_nothing_is_drawn_or_refused_in_words(tmp_path, capsys, lines):
    folder = write_heads(tmp_path / "run", lines)
    assert main(["heads", str(folder)]) == (0 if lines else 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_that_is_a_folder_is_one_message(tmp_path):
    (write_heads(tmp_path / "run") / "heads.jsonl").unlink()
    (tmp_path / "run" / "heads.jsonl").mkdir()
    with pytest.raises(InputError, match="a readable file"):
        read_heads(tmp_path / "run")


@pytest.mark.parametrize(
    ("largest", "mean", "drawn"), [(1, 1, False), (1, 0.9, True), (3, 1, True), (None, None, False)]
)
def test_rates_of_heads_have_a_figure_where_they_are_not_all_one(tmp_path, largest, mean, drawn):
    folder = write_heads(tmp_path / "run")
    rates = {"max_head_lr_multiplier": largest, "avg_head_lr_multiplier": mean}
    rates = {name: value for name, value in rates.items() if value is not None}
    lines = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0} | rates]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for table in (None, table_to_json(DEFAULT)):
        if table is not None:
            (folder / METRIC_TABLE).write_text(table)
        figures = run_figures(read_run(folder))
        assert ("head_learning_rate" in figures) == drawn
        assert "gradient_norm" in figures
