"""Run folders read back, figures and reports made of them, and the plot command end to end."""

import base64
import hashlib
import html.parser
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.wording import aligned, duration, short, short_flops
from jaxmorph.plot import main
from jaxmorph.report.drawing import rendered, smoothed
from jaxmorph.report.figures import loss_figure, run_figures
from jaxmorph.report.page import write_report
from jaxmorph.report.run_record import read_run, throughput
from jaxmorph.report.schedule_figure import schedule_figure
from jaxmorph.report.timeline import architecture_figure
from jaxmorph.step.metrics import DEFAULT, METRIC_TABLE, table_to_json
from jaxmorph.step.schedules import SCHEDULERS, ScheduleShape

TOKENS_PER_STEP, FLOPS_PER_TOKEN = 4096, 65_000_000
COSINE = ScheduleShape("cosine", 0.1, "cosine", 0.04, 0.2, 3, 2.0)
PNG = b"\x89PNG\r\n\x1a\n"


def metrics_lines(steps=300, log_interval=10, eval_interval=50, seed=0):
    """Lines like those of a real run: a first step that compiles, then 0.1 s a step."""
    random = np.random.default_rng(seed)
    lines = []
    for step in range(steps + 1):
        line = {"step": step}
        loss = 1.3 + 4.2 * math.exp(-step / 40)
        if step and (step % log_interval == 0 or step in (1, steps)):
            line |= {
                "train/loss": loss + random.normal(0, 0.05),
                "train/learning_rate": 1e-3 * min(1, (step - 1) / 30),
                "train/grad_norm": 0.8 + 2 * math.exp(-step / 30),
                "train/skipped": 0,
                "step_seconds": 8.0 if step == 1 else 0.1,
                "stage": 0,
                "tokens": step * TOKENS_PER_STEP,
                "flops": step * TOKENS_PER_STEP * FLOPS_PER_TOKEN,
                "params": 10_800_000,
                "batch_size": 16,
            }
        if step % eval_interval == 0:
            line |= {"val/loss": loss + 0.05, "val/accuracy": 1 / (loss + 0.5)}
        lines.append(line)
    return lines


OPERATIONS = [
    {"index": 0, "name": "stack_layers", "value": 2, "step": 100, "reason": "loss"},
    {"index": 1, "name": "set_lr_multiplier", "value": 0.5, "step": 100, "reason": "loss"},
    {"index": 2, "name": "reset_lr_schedule", "value": None, "step": 200, "reason": "timeout"},
]


OPERATION = '{"name": "x", "step": 1, %s}\n'
CONFIG = "learning_rate: 0.001\nresume: true\n"


def write_run(folder, lines=None, operations=(), config: str | None = CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    lines = metrics_lines() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if operations:
        text = "".join(f"{json.dumps(line)}\n" for line in operations)
        (folder / "operations.jsonl").write_text(text)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


class Page(html.parser.HTMLParser):
    """The tags, links and visible text of a page; unbalanced tags fail."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags, self.text = [], [], set(), ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + " "


def drawn_lines(axes):
    return [np.asarray(line.get_xydata()) for line in axes.get_lines()]


def test_series_hold_what_the_lines_say(tmp_path):
    lines = metrics_lines()
    run = read_run(write_run(tmp_path / "run", lines, OPERATIONS))
    wanted = [(line["step"], line["val/loss"]) for line in lines if "val/loss" in line]
    np.testing.assert_array_equal(np.transpose(run.series["val/loss"]), wanted)
    assert len(run.series["train/loss"].steps) == 31
    assert (run.name, run.last_step) == ("run", 300)
    assert run.settings == {"learning_rate": 0.001, "resume": True}
    told = [(one.step, one.name, one.value, one.reason) for one in run.operations]
    assert told == [
        tuple(o[key] for key in ("step", "name", "value", "reason")) for o in OPERATIONS
    ]


@pytest.mark.parametrize(
    "written", ['"NaN"', '"Infinity"', '"-Infinity"', "NaN", "Infinity", "1e999"]
)
def test_non_finite_values_are_counted_and_left_out(tmp_path, written):
    folder = write_run(tmp_path, metrics_lines(50))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 51, "train/loss": {written}, "train/grad_norm": null}}\n')
    run = read_run(folder)
    assert run.lost["train/loss"] == 1
    assert run.lost["train/grad_norm"] == 0
    assert run.series["train/loss"].steps[-1] == 50
    page = write_report(folder).read_text()
    assert "Non-finite losses" in page


@pytest.mark.parametrize("half", ['{"step": 31, "train/lo', '{"step"', "{", "\x00\x00"])
def test_half_written_last_line_is_left_out(tmp_path, half):
    folder = write_run(tmp_path, metrics_lines(30))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(half)
    assert read_run(folder).last_step == 30


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 0}\nnonsense\n', "metrics.jsonl: line 2: got 'nonsense'"),
        ("metrics.jsonl", '{"step": 0}\n{"st\n{"step": 2}\n', "metrics.jsonl: line 2: got"),
        ("metrics.jsonl", "[1]\n", r"line 1: got '\[1\]', expected one JSON object per line"),
        ("metrics.jsonl", "{}\n", "line 1: step: expected a whole number"),
        ("metrics.jsonl", '{"step": 1.5}\n', "line 1: step: got 1.5, expected a whole number"),
        ("metrics.jsonl", '{"step": true}\n', "line 1: step: got True"),
        ("metrics.jsonl", '{"step": -1}\n', "line 1: step: got -1"),
        ("metrics.jsonl", '{"step": 1, "tokens": "many"}\n', "tokens: got 'many', expected a num"),
        ("metrics.jsonl", '{"step": 1, "val/loss": [2]}\n', r"val/loss: got \[2\]"),
        ("metrics.jsonl", '{"step": 1, "val/loss": true}\n', "val/loss: got True"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "line 1: got"),
        ("metrics.jsonl", '{"step": 1, "x": ' + "1" * 5000 + "}\n", "line 1: got"),
        ("metrics.jsonl", b'{"step": \xff}\n', "line 1: got"),
        ("operations.jsonl", '{"step": 1}\n', "operations.jsonl: line 1: name: expected"),
        ("operations.jsonl", '{"name": "x"}\n', "operations.jsonl: line 1: step: expected"),
        ("operations.jsonl", OPERATION % '"reason": 1', "line 1: reason: got 1, expected a word"),
        ("operations.jsonl", OPERATION % '"seconds": "long"', "line 1: seconds: got 'long'"),
        ("operations.jsonl", OPERATION % '"val_loss_after": []', r"val_loss_after: got \[\], exp"),
        (
            "operations.jsonl",
            OPERATION % '"params_after": 1.5',
            "params_after: got 1.5, expected a",
        ),
        ("operations.jsonl", OPERATION % '"moments": 3', "moments: got 3, expected counts by name"),
        ("operations.jsonl", OPERATION % '"moments": {"fresh": -1}', "moments: fresh: got -1, exp"),
        ("operations.jsonl", OPERATION % '"model_before": "big"', "model_before: got 'big', expec"),
        (
            "operations.jsonl",
            OPERATION % '"model_after": {"n_layers": true}',
            "line 1: model_after: n_layers: got True, expected a whole number",
        ),
        ("config.yaml", "- 1\n", "config.yaml: got 'list', expected a mapping"),
        ("config.yaml", "a: [\n", "config.yaml: line"),
    ],
)
def test_malformed_run_folder_is_refused(tmp_path, capsys, file, content, message):
    folder = write_run(tmp_path)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_run(folder)
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_throughput_is_tokens_over_seconds_without_the_compiling_step(tmp_path):
    rates, seconds = throughput(read_run(write_run(tmp_path)))
    np.testing.assert_allclose(rates.values, TOKENS_PER_STEP / 0.1)
    assert rates.steps[0] == 10
    assert seconds == pytest.approx(8.0 + 299 * 0.1)


def test_throughput_sums_seconds_where_every_line_has_them(tmp_path):
    lines = [{"step": 0}]
    lines += [{"step": s, "step_seconds": float(s)} for s in range(1, 9)]
    for step in (4, 8):
        lines[step]["tokens"] = 100 * step
    rates, seconds = throughput(read_run(write_run(tmp_path, lines)))
    np.testing.assert_allclose(rates.values, [400 / (1 + 2 + 3 + 4), 400 / (5 + 6 + 7 + 8)])
    assert seconds == 36


def test_totals_between_logged_lines_are_interpolated(tmp_path):
    run = read_run(write_run(tmp_path))
    np.testing.assert_allclose(
        run.total_at("tokens", np.array([0, 1, 55, 300])),
        np.array([0, 1, 55, 300]) * TOKENS_PER_STEP,
    )


def test_smoothing_keeps_lines_straight_and_damps_noise():
    line = np.linspace(5.0, 1.0, 400)
    np.testing.assert_allclose(smoothed(line)[:-10], line[:-10], atol=1e-12)
    noise = np.random.default_rng(0).normal(size=4000)
    assert smoothed(noise).std() < 0.2
    np.testing.assert_array_equal(smoothed(np.array([3.0])), [3.0])
    assert len(smoothed(np.array([]))) == 0


def test_loss_figure_draws_each_run_against_steps_tokens_and_flops(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "a", metrics_lines(800))),
        read_run(write_run(tmp_path / "b", metrics_lines(300, seed=1))),
    ]
    figure = loss_figure(runs, ["a", "b"])
    factors = {"step": 1, "tokens": TOKENS_PER_STEP}
    factors["training FLOPs"] = TOKENS_PER_STEP * FLOPS_PER_TOKEN
    assert [axes.get_xlabel() for axes in figure.axes] == list(factors)
    for axes, factor in zip(figure.axes, factors.values(), strict=True):
        thin, smooth, validation, *second = drawn_lines(axes)
        steps, losses = runs[0].series["train/loss"]
        np.testing.assert_allclose(thin, np.transpose([steps * factor, losses]))
        np.testing.assert_allclose(smooth, np.transpose([steps * factor, smoothed(losses)]))
        steps, losses = runs[0].series["val/loss"]
        np.testing.assert_allclose(validation, np.transpose([steps * factor, losses]))
        assert len(second) == 2  # few points: no separate smoothed line
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["a", "b", "training", "validation"]


def test_spikes_do_not_squeeze_the_loss(tmp_path):
    lines = metrics_lines(800)
    lines[400]["train/loss"] = 1e6
    figure = loss_figure([read_run(write_run(tmp_path, lines))], ["run"])
    assert figure.axes[0].get_ylim()[1] < 10


def test_operations_are_marked_with_their_names_in_every_figure(tmp_path):
    run = read_run(write_run(tmp_path, operations=OPERATIONS))
    for figure in run_figures(run).values():
        for axes in figure.axes:
            texts = [text.get_text() for text in axes.texts]
            assert texts == ["stack_layers 2", "set_lr_multiplier 0.5", "reset_lr_schedule"]
            marks = [xy[0, 0] for xy in drawn_lines(axes) if len(xy) == 2 and xy[0, 0] == xy[1, 0]]
            assert marks[1] == 2 * marks[0] > 0


def test_names_of_operations_close_to_one_another_do_not_overlap(tmp_path):
    close = [OPERATIONS[0] | {"step": step} for step in (100, 100, 102, 103, 250)]
    run = read_run(write_run(tmp_path, operations=close))
    for figure in run_figures(run).values():
        rendered(figure, "png")
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            assert len(boxes) == 5
            assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))


def test_operations_of_several_runs_at_one_step_are_told_apart(tmp_path):
    run = read_run(write_run(tmp_path, operations=OPERATIONS[:1]))
    figure = loss_figure([run, run], ["a", "b"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3].astype(int)
    for axes, at in zip(figure.axes[:2], (100, 100 * TOKENS_PER_STEP), strict=True):
        column, low = axes.transData.transform((at, 3.0)).astype(int)  # above the curves
        above = pixels[low : int(axes.bbox.y1), column - 1 : column + 2]
        seen = [(abs(above - rgb).max(axis=2) < 40).sum() for rgb in ((37, 99, 235), (234, 88, 12))]
        assert min(seen) > 0.5 * max(seen) > 0
        assert len(axes.texts) == 0


def test_losses_right_after_operations_are_marked_where_there_are_any(tmp_path):
    lines = metrics_lines()
    without = read_run(write_run(tmp_path / "a", lines))
    lines[100]["val/loss_after"], lines[200]["val/loss_after"] = 6.5, "NaN"
    run = read_run(write_run(tmp_path / "b", lines, OPERATIONS))
    figure = loss_figure([run], ["run"])
    for axes, factor in zip(figure.axes[:2], (1, TOKENS_PER_STEP), strict=True):
        (after,) = [line for line in axes.get_lines() if line.get_marker() == "D"]
        assert np.asarray(after.get_xydata()).tolist() == [[100 * factor, 6.5]]
        assert axes.get_ylim()[1] > 6.5
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["training", "validation", "validation right after an operation", "operation"]
    plain = loss_figure([without], ["run"])
    assert [t.get_text() for t in plain.legends[0].get_texts()] == ["training", "validation"]
    assert "Non-finite losses" in write_report(run.folder).read_text()


def test_many_operations_are_marked_without_names(tmp_path):
    many = [OPERATIONS[0] | {"step": step} for step in range(10, 210, 10)]
    run = read_run(write_run(tmp_path, operations=many))
    (axes,) = run_figures(run)["learning_rate"].axes
    assert (len(axes.texts), len(axes.get_lines())) == (0, 21)


def test_report_needs_no_other_file_and_tells_the_run(tmp_path):
    folder = write_run(tmp_path / "<b>run & co", operations=OPERATIONS)
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text())
    assert page.tags.isdisjoint({"script", "link", "b", "iframe"})
    assert len(page.links) == 4
    for link, name in zip(page.links, ("loss", "learning_rate", "throughput", "gradient_norm")):  # noqa: B905
        assert link.startswith("data:image/png;base64,")
        image = base64.b64decode(link.partition(",")[2])
        assert image.startswith(PNG)
        assert image == (folder / f"{name}.png").read_bytes()
    assert not re.search(r"url\(|@import|https?:", path.read_text())
    val = [line["val/loss"] for line in metrics_lines() if "val/loss" in line]
    for part in (
        "<b>run & co",
        "1.23M",  # tokens
        "79.9T",  # FLOPs
        "10.8M",
        "37.9 s",
        f"{val[-1]:.4f}",
        f"from {val[0]:.4f} at step 0",
        "set_lr_multiplier",
        "learning_rate",
    ):
        assert part in page.text
    assert not list(folder.glob(".*"))


def test_report_runs_no_script_and_loads_nothing(tmp_path):
    """The policy names what the page has: its style sheet by digest, and images within it."""
    text = write_report(write_run(tmp_path, operations=OPERATIONS)).read_text()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', text)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert text.index("Content-Security-Policy") < text.index("<title>") < text.index("<style>")
    assert not re.search(r"<[^>]* (style|on\w+)=|<script|javascript:", text)
    assert all(link.startswith("data:image/png;") for link in Page(text).links)


NASTY = "\x1b[31m<img src=x onerror=alert(1)>\u202e\r\n" + "x" * 100_000


def test_what_a_run_folder_says_is_shown_as_text_and_cut(tmp_path, capsys):
    lines = [line | {f"{NASTY}{n}": 1.0 for n in range(2)} for line in metrics_lines()[:20]]
    named = [{"index": 0, "name": NASTY, "step": 9, "value": NASTY, "reason": NASTY}]
    moved = {"moments": {NASTY: 3}, "function_delta": 1.0}
    config = f"{json.dumps(NASTY[:300])}: {json.dumps(NASTY)}\n"
    folder = write_run(tmp_path / "run\x1b\u202e", lines, [named[0] | moved], config)
    text = write_report(folder).read_text()
    plain = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", plain)
    assert len(plain) < 100_000
    page = Page(text)
    assert len(page.links) == text.count("<img") >= 4
    assert r"\x1b[31m<img src=x onerror" in page.text
    assert main(["run", str(folder), "--save", str(tmp_path / "x.png")]) == 0
    assert main(["report", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert r"run\x1b\u202e" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)


@pytest.mark.parametrize(
    "change",
    [
        {"figure": "../../figure"},
        {"figure": "/tmp/figure"},
        {"figure": "x" * 300},
        {"form": ".999999999f"},
        {"form": "999999999"},
        {"style": "\x1b[31m"},
        {"name": "x" * 10**3},
        {"label": 5},
    ],
)
def test_a_table_of_metrics_with_odd_names_or_forms_is_refused(tmp_path, capsys, change):
    folder = write_run(tmp_path / "run")
    table = json.loads(table_to_json(DEFAULT))
    (folder / METRIC_TABLE).write_text(json.dumps([table[0] | change, *table[1:]]))
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(folder)]) == 2
    out, complaint = capsys.readouterr()
    assert complaint.startswith(f"error: {folder / METRIC_TABLE}: expected a table of metrics")
    assert (out, complaint.count("\n"), complaint.isprintable()) == ("", 1, False)
    assert complaint[:-1].isprintable()
    assert len(complaint) < 3000
    assert sorted(tmp_path.rglob("*")) == before


SMALL = {"n_layers": 4, "d_model": 128, "n_heads": 4, "head_dim": 32, "d_ff": 512, "seq_len": 64}
SMALL |= {"attn_lora_rank": 4, "vocab_lora_rank": 0, "positions": "learned"}
DEEP = SMALL | {"n_layers": 8}
WIDE = DEEP | {"d_ff": 768}
RANKED = WIDE | {"attn_lora_rank": 8}


def morph(name, value, step, before, after, **more):
    sizes = {"params_before": 1000 * before["n_layers"], "params_after": 1000 * after["n_layers"]}
    models = {"model_before": before, "model_after": after}
    return {"name": name, "value": value, "step": step} | models | sizes | more


MORPHS = [
    morph("stack_layers", 2.0, 100, SMALL, DEEP, function_delta=0.7312, seconds=0.4123),
    morph("change_batch_size", 2, 145, DEEP, DEEP, function_delta=None, moments=None),
    morph("widen_mlp", 1.5, 200, DEEP, WIDE, moments={"transported": 1230, "fresh": 4, "reset": 0}),
    morph("decrease_attn_lora_scaling", 0.5, 200, WIDE, RANKED, val_loss_after="NaN"),
]


def grown_run(folder, operations=MORPHS):
    lines = metrics_lines()
    for line in lines[146:]:
        if "batch_size" in line:
            line["batch_size"] = 32
    return read_run(write_run(folder, lines, operations))


def panels_of(figure):
    """Return the levels drawn in each panel, by its label, and the levels written there."""
    panels = {}
    for axes in figure.axes:
        curve = axes.get_lines()[0]
        assert curve.get_drawstyle() == "steps-post"
        marks = [int(xy[0, 0]) for xy in drawn_lines(axes)[1:]]
        assert marks == [100, 145, 200]
        texts = [text.get_text() for text in axes.texts]
        panels[axes.get_ylabel().replace("\n", " ")] = curve.get_xydata().tolist(), texts
    return panels


def test_timeline_draws_every_size_that_changed_with_its_levels(tmp_path):
    figure = architecture_figure(grown_run(tmp_path))
    assert figure is not None
    named = ["stack_layers 2", "change_batch_size 2", "widen_mlp 1.5"]
    named.append("decrease_attn_lora_scaling 0.5")
    layers = [[0, 4], [100, 8], [200, 8], [200, 8], [300, 8]]
    parameters = [[x, 1000 * y] for x, y in layers]
    assert panels_of(figure) == {
        "layers": (layers, ["8", "4", *named]),
        "MLP width": ([[0, 512], [100, 512], [200, 768], [200, 768], [300, 768]], ["768", "512"]),
        "attention LoRA rank": ([[0, 4], [100, 4], [200, 4], [200, 8], [300, 8]], ["8", "4"]),
        "parameters": (parameters, ["8k", "4k"]),
        "batch size": ([[0, 16], [145, 32], [300, 32]], ["32", "16"]),
    }
    for axes in figure.axes:
        assert all(tick == round(tick) for tick in axes.get_yticks())


@pytest.mark.parametrize("step", [0, 100, 300])
def test_timeline_of_two_changes_at_one_step_names_the_last(tmp_path, step):
    twice = [MORPHS[0], morph("stack_layers", 2, step, DEEP, DEEP | {"n_layers": 16})]
    twice[0] = twice[0] | {"step": step}
    figure = architecture_figure(grown_run(tmp_path, twice))
    assert figure is not None
    assert drawn_lines(figure.axes[0])[0].tolist() == [[0, 4], [step, 8], [step, 16], [300, 16]]
    written = [text.get_text() for text in figure.axes[0].texts if text.get_rotation() == 0]
    assert written == (["16", "4"] if step else ["16"])


def test_levels_of_a_crowded_timeline_do_not_cover_one_another(tmp_path):
    models = [SMALL | {"n_layers": 100 + n} for n in range(40)]
    steps = [0, *range(7, 280, 7)]
    crowd = [
        morph("stack_layers", 1.01, step, *around)
        for step, around in zip(steps, itertools.pairwise(models), strict=False)
    ]
    figure = architecture_figure(grown_run(tmp_path, crowd))
    assert figure is not None
    rendered(figure, "png")
    for axes, last in zip(figure.axes[:2], ("139", "139k"), strict=True):
        written = [text for text in axes.texts if text.get_rotation() == 0]
        assert written[0].get_text() == last
        assert len(written) > 10
        boxes = [text.get_window_extent() for text in written]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("operations", [(), OPERATIONS, MORPHS[1:2]])
def test_run_whose_architecture_stayed_has_no_timeline(tmp_path, operations):
    run = grown_run(tmp_path, operations)
    assert architecture_figure(run) is None
    page = Page(write_report(tmp_path).read_text())
    assert "Architecture" not in page.text
    assert not (tmp_path / "architecture.png").exists()


def test_timeline_leaves_out_what_the_lines_do_not_say(tmp_path):
    bare = [{"name": "x", "step": 90, "model_before": {"n_layers": 1}, "model_after": {}}]
    assert architecture_figure(grown_run(tmp_path / "a", bare)) is None
    bare[0]["model_after"] = {"n_layers": 3}
    figure = architecture_figure(grown_run(tmp_path / "b", bare))
    assert figure is not None
    assert [axes.get_ylabel() for axes in figure.axes] == ["layers", "batch size"]


def test_report_shows_the_timeline_and_tells_each_operation(tmp_path):
    run = grown_run(tmp_path)
    text = write_report(run.folder).read_text()
    assert "Architecture" in Page(text).text
    assert base64.b64encode((tmp_path / "architecture.png").read_bytes()).decode() in text
    rows = [
        dict(zip(TABLE, re.findall("<td>(.*?)</td>", row), strict=True))
        for row in re.findall("<tr>(<td>.*?)</tr>", text)
    ]
    assert [" ".join(rows[n][k] for k in ("step", "operation", "value")) for n in (0, 3)] == [
        "100 stack_layers 2",
        "200 decrease_attn_lora_scaling 0.5",
    ]
    assert [row["change of the function"] for row in rows] == ["7.3e-01", "", "", ""]
    assert [row["optimizer moments"] for row in rows] == ["", "", "1,230 transported, 4 fresh", ""]
    assert [row["seconds"] for row in rows] == ["0.41", "", "", ""]
    assert [row["loss after"] for row in rows] == ["", "", "", "nan"]
    assert rows[0]["parameters before"] == "4,000"
    assert rows[0]["parameters after"] == "8,000"


TABLE = (
    "step", "operation", "value", "reason", "loss before", "loss after", "parameters before",
    "parameters after", "change of the function", "optimizer moments", "seconds",
)  # fmt: skip


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 0}],
        [{"step": 0, "val/loss": 5.5}],
        [{"step": 1, "train/loss": 0.0, "train/grad_norm": 0.0, "train/learning_rate": 0.0}],
        [{"step": 5, "tokens": 10, "step_seconds": 0.0}],
    ],
)
def test_run_that_has_hardly_begun_has_a_report(tmp_path, capsys, lines):
    folder = write_run(tmp_path, lines, config=None)
    assert "Steps" in Page(write_report(folder).read_text()).text
    assert main(["run", str(folder), "--save", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["$x^$", "_hidden", "\u8a13\u7df4", "a\\b{"])
def test_odd_names_are_drawn_as_they_are(tmp_path, name):
    operations = [OPERATIONS[0] | {"value": name}]
    run = read_run(write_run(tmp_path / name, operations=operations))
    assert rendered(loss_figure([run, run], [name, name]), "png").startswith(PNG)
    assert rendered(run_figures(run)["learning_rate"], "png").startswith(PNG)


def test_schedule_command_prints_the_documented_points_and_draws(tmp_path, capsys):
    path = tmp_path / "lr.png"
    flags = [
        "--warmup_steps",
        "500",
        "--total_steps",
        "5000",
        "--max_lr",
        "6e-4",
        "--min_lr_ratio",
        "0.1",
        "--save",
    ]
    assert main(["schedule", *flags, str(path)]) == 0
    out, complaints = capsys.readouterr()
    assert complaints == ""
    assert path.read_bytes().startswith(PNG)
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 2000 / 4500))
    assert rows[:6] == [
        ["Linear warmup + Cosine decay"],
        ["point", "step", "learning rate", "ratio"],
        ["start", "0", "0", "0.0000"],
        ["mid-warmup", "250", "0.0003", "0.5000"],
        ["end of warmup", "500", "0.0006", "1.0000"],
        ["middle", "2,500", f"{6e-4 * middle:.6g}", f"{middle:.4f}"],
    ]
    assert rows[7] == ["end", "5,000", "6e-05", "0.1000"]
    assert out.endswith(f"Figure: {path}\n")


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_schedule_command_draws_every_shape_into_one_figure(tmp_path, capsys, suffix, start):
    path = tmp_path / f"lr.{suffix}"
    flags = ["--total-steps", "100", "--scheduler", *SCHEDULERS, "--save", str(path)]
    assert main(["schedule", *flags]) == 0
    assert path.read_bytes().startswith(start)
    ends = re.findall(r"^  end of warmup +5 +0.001 +1.0000$", capsys.readouterr().out, re.M)
    assert len(ends) == len(SCHEDULERS)


def test_schedule_figure_draws_the_rates(tmp_path):
    figure = schedule_figure([COSINE], 6e-4, 500, 5000)
    curve, points = drawn_lines(figure.axes[0])
    t = curve[:, 0]
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (t - 500) / 4500))
    np.testing.assert_allclose(curve[:, 1], 6e-4 * np.where(t < 500, t / 500, cosine), atol=6e-10)
    assert {0, 500, 5000} <= set(t)
    assert points[:, 0].tolist() == [0, 250, 500, 2500, 4999, 5000]
    several = schedule_figure([COSINE, COSINE], 6e-4, 0, 10)
    assert len(several.axes[0].get_lines()) == 2


def test_without_save_the_figure_goes_to_the_current_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["schedule", "--total_steps", "10"]) == 0
    write_run(tmp_path / "run")
    assert main(["run", "run"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["lr_schedule.png", "runs.png"]
    assert "Figure: runs.png" in capsys.readouterr().out


def test_run_command_tells_each_run(tmp_path, capsys):
    lines = metrics_lines()
    lines[300]["val/loss"] = 9.0
    folders = [write_run(tmp_path / "a" / "run", lines), write_run(tmp_path / "b" / "run")]
    path = tmp_path / "both.png"
    assert main(["run", *map(str, folders), "--save", str(path)]) == 0
    rows = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    best = lines[250]["val/loss"]
    assert rows[1] == [str(folders[0]), "300", "9.0000", f"{best:.4f} at 250", "1.23M", "79.9T"]
    assert rows[2][0] == str(folders[1])
    assert path.read_bytes().startswith(PNG)


def test_report_command_says_where_the_report_is(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"Report: {folder / 'report.html'}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("schedule --total_steps 1760 --warmup_steps 2000", "--warmup_steps: got 2000, expected f"),
        ("schedule --total_steps 10 --warmup_steps 10", "--warmup_steps: got 10, expected fewer"),
        ("schedule --total_steps 0", "--total_steps: got 0, expected"),
        ("schedule --total_steps 99999999999", "--total_steps: got 99999999999"),
        ("schedule --total_steps 1e3", "--total_steps: got '1e3', expected a whole number"),
        ("schedule --total_steps 10 --warmup_steps -1", "--warmup_steps: got -1"),
        ("schedule --total_steps 10 --max_lr nan", "--max_lr: got nan, expected a finite number"),
        ("schedule --total_steps 10 --max_lr inf", "--max_lr: got inf"),
        ("schedule --total_steps 10 --max_lr 0", "--max_lr: got 0"),
        ("schedule --total_steps 10 --min_lr_ratio 1.5", "--min_lr_ratio: got 1.5"),
        ("schedule --total_steps 10 --min_lr_ratio 0 --scheduler step", "--min_lr_ratio: got 0.0"),
        ("schedule --total_steps 10 --scheduler cosin", "--scheduler: got 'cosin', expected one"),
        ("schedule --total_steps 10 --scheduler", "--scheduler: expected at least one shape"),
        ("schedule --total_steps 10 --lr_stairs 1", "--lr_stairs: got 1"),
        ("schedule --total_steps 10 --wsd_decay_fraction 0", "--wsd_decay_fraction: got 0"),
        ("schedule --total_step 10", "python -m jaxmorph.plot schedule: expected --total_steps"),
        ("schedule --total_steps 10 --save x.gif", "--save: got 'x.gif', expected a file name end"),
        (
            "schedule --total_steps 10 --save none/x.png",
            "--save: got 'none/x.png', expected a",
        ),
        ("schedule --total_steps 10 --color red", "--color: expected a known flag"),
        ("schedule --total_steps ١٢", "--total_steps: got '١٢', expected a whole number in"),
        ("schedule --total_steps 1_0", "--total_steps: got '1_0', expected a whole number in"),
        (
            "schedule --total_steps 10 --max_lr 1e-50",
            "--max_lr: got 1e-50, expected a number > 0, o",
        ),
        ("schedule --total_steps 10 --save ~nosuchuser/x.png", "--save: got '~nosuchuser/x.png'"),
        (f"schedule --total_steps 10 --save {'x' * 300}.png", "--save: got 'xxx"),
        (f"report {'x' * 300}", "xxx"),
        ("report \x1b", r"\x1b: expected a run folder"),
        ("run", "python -m jaxmorph.plot run: expected at least one run folder"),
        ("run nowhere", "nowhere: expected a run folder, with metrics.jsonl in it"),
        ("run nowhere --save x", "--save: got 'x', expected a file name ending in .png, .svg"),
        ("report nowhere", "nowhere: expected a run folder"),
        ("heads nowhere", "nowhere: expected a run folder, with metrics.jsonl in it"),
        ("report", "python -m jaxmorph.plot report: expected RUN_DIR as well"),
        ("", "python -m jaxmorph.plot: expected one of schedule, run, heads, report"),
        ("schedul", "python -m jaxmorph.plot: got 'schedul', expected one of schedule, run, hea"),
    ],
)
def test_bad_input_exits_2_with_one_line(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == 2
    out, complaint = capsys.readouterr()
    assert complaint.startswith(f"error: {message}")
    assert complaint.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_warmup_past_the_end_is_drawn_when_asked_for(tmp_path, capsys):
    flags = [
        "--total_steps",
        "1760",
        "--warmup_steps",
        "2000",
        "--max_lr",
        "0.003",
        "--allow_warmup_past_end",
    ]
    assert main(["schedule", *flags, "--save", str(tmp_path / "x.png")]) == 0
    assert re.search(r"end +1,760 +0.00264 +0.8800", capsys.readouterr().out)


@pytest.mark.parametrize(
    "argv", ["--help", "schedule -h", "schedule --total_steps 5 --sav x", "run x"]
)
def test_help_and_refusals_import_nothing_heavy(argv):
    code = (
        "import sys; from jaxmorph.plot import main; status = main(sys.argv[1:]); "
        "print('loaded:', [m for m in ('jax', 'matplotlib', 'optax', 'flax') if m in sys.modules]);"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv.split()],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if "-h" in argv else 2)
    assert done.stdout.endswith("loaded: []\n")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (12_345_678, "12.3M"), (999_999, "1M")],
)
def test_short_numbers(number, text):
    assert short(number) == text


def test_short_flops_and_durations():
    assert short_flops(3.14e20) == "314E"
    assert [duration(s) for s in (12.34, 59.97, 249, 11_100)] == [
        "12.3 s",
        "60.0 s",
        "4 min 09 s",
        "3 h 05 min",
    ]


def test_tables_set_numbers_right_and_words_left():
    rows = [("name", "n", "when"), ("a", "10", "at 3"), ("long name", "–", "-2.5")]
    assert aligned(rows) == [
        "  name        n  when",
        "  a          10  at 3",
        "  long name   –  -2.5",
    ]
    assert aligned(rows[:2], indent=0, gap=3) == ["name    n   when", "a      10   at 3"]
