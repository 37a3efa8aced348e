"""The dry run: memory by optimizer, the report of a walk, loss curves and what fires on them."""

import math

import jax
import numpy as np
import pytest
from test_operations import make_shape
from test_schedule import ONE, entries, entry

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.wording import short_flops
from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.growth.dry_run import read_curve, simulate, simulation_report, walk_report
from jaxmorph.growth.schedule import due, walk
from jaxmorph.model import gpt
from jaxmorph.model.architecture import flops_per_token, gpt_signatures, parameter_count
from jaxmorph.step.memory import memory
from jaxmorph.step.optimizer import make_optimizer

OPTIMIZERS = ("adamw", "muon", "lion", "sgd", "adafactor")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("rank", [0, 8])
def test_memory_is_what_the_optimizer_holds(name, width, rank):
    ranks = {"attn_lora_rank": rank, "vocab_lora_rank": rank, "lora_base": "trained"}
    config = make_shape(d_model=width, **ranks).model
    settings = OptimizerSettings(optimizer=name)
    optimizer = make_optimizer(settings, gpt_signatures(config))
    params = jax.eval_shape(lambda: gpt.init(config, jax.random.key(0)))
    state = jax.eval_shape(optimizer.init, params)
    # The smallest are counts, muon's three coefficients and what adafactor puts for nothing.
    held = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 3)
    found = memory(config, settings)
    assert found.optimizer == 4 * held
    assert found.parameters == found.gradients == 4 * parameter_count(config)
    assert found.total == 4 * (2 * parameter_count(config) + held)


def test_memory_of_wider_numbers_and_of_a_frozen_base():
    shape, adamw = make_shape(), OptimizerSettings()
    trained = make_shape(lora_base="trained")
    assert (
        memory(make_shape(dtype="float64").model, adamw).total
        == 2 * memory(shape.model, adamw).total
    )
    frozen_entries = 4 * 4 * 64 * 64 + 50 * 64
    saved = memory(trained.model, adamw).optimizer - memory(shape.model, adamw).optimizer
    assert saved == 4 * 2 * frozen_entries
    sgd = OptimizerSettings(optimizer="sgd", beta1=0.0)
    assert memory(shape.model, sgd).optimizer == 0


def _cells(report: str, title: str) -> list[list[str]]:
    """The rows of one table of a report, header included; columns are two spaces apart."""
    lines = report.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(title)) + 1
    rows = []
    for line in lines[start:]:
        if not line.startswith("  "):
            break
        rows.append([cell.strip() for cell in line.split("  ") if cell.strip()])
    return rows


def test_walk_report_says_what_every_stage_is():
    rows = entries(
        entry("stack_layers", 2.0, reevaluate=True, options={"order": "middle"}),
        entry("change_lr", 0.5, trigger_loss=None),
        entry("change_batch_size", 1.25, max_wait_iters=None),
        entry("merge_lora_weights", None),
    )
    stages = walk(rows, make_shape(), ONE, "file")
    report = walk_report(stages, OptimizerSettings())
    operations = _cells(report, "Operations")
    assert operations[1:] == [
        ["0", "the start", "at step 0", "yes", "-"],
        [
            "1",
            "stack_layers 2 order=middle",
            "below 3 or after 100 steps, re-evaluates",
            "yes",
            "no",
        ],
        ["2", "change_lr 0.5", "after 100 steps", "no", "yes"],
        ["3", "change_batch_size 1.25", "below 3", "yes", "yes"],
        ["4", "merge_lora_weights", "below 3 or after 100 steps", "no", "yes"],
    ]
    header, *models = _cells(report, "Models")
    assert [row[0] for row in models] == ["0", "1"]
    for row, stage in zip(models, stages, strict=False):
        found, config = dict(zip(header, row, strict=True)), stage.shape.model
        assert found["layers"] == str(config.n_layers)
        assert found["width"] == "64"
        assert found["heads"] == "4 × 16"
        assert found["MLP"] == "96"
        assert found["ranks"] == "16, 8"
        assert found["context"] == "48"
        assert found["parameters"] == f"{parameter_count(config):,}"
        assert found["FLOPs/token"] == short_flops(flops_per_token(config))
        megabytes = memory(config, OptimizerSettings()).total / 1e6
        assert found["memory"] == f"{megabytes:.3g}MB"
    header, *training = _cells(report, "Training")
    assert [row[0] for row in training] == ["0", "2", "3"]
    last = dict(zip(header, training[-1], strict=True))
    assert last == {
        "stage": "3",
        "batch": "12",
        "accum.": "3",
        "tokens/step": "1,728",
        "lr ×": "1",
        "peak lr": "0.001",
        "warmup": "50",
        "alpha": "32",
        "eval iters": "7",
        "eval interval": "100",
    }
    assert report.splitlines()[-2] == "Warnings:"
    assert "stage 3: batch_size: 10 × 1.25 = 12.5, rounded to 12" in report


def test_walk_report_of_a_model_without_lora():
    stages = walk((), make_shape(attn_lora_rank=0, vocab_lora_rank=0), ONE, "file")
    report = walk_report(stages, OptimizerSettings())
    header, row = _cells(report, "Models")
    assert dict(zip(header, row, strict=True))["ranks"] == "-"
    assert "Warnings" not in report


# curve, (trigger, wait) of each entry, total steps, (step, reason, loss, waited) of each firing
SIMULATIONS = {
    "below the threshold": (
        [(0, 5.0), (10, 3.0), (20, 2.9)],
        [(3.0, None)],
        None,
        [(20, "loss", 2.9, 20)],
    ),
    "at the start": ([(0, 5.0)], [(6.0, None)], None, [(0, "loss", 5.0, 0)]),
    "waits to the step": (
        [(0, 5.0), (10, 4.0), (20, 3.0)],
        [(1.0, 13), (1.0, 4)],
        None,
        [(13, "timeout", 4.0, 13), (17, "timeout", 4.0, 4)],
    ),
    "several at one evaluation": (
        [(0, 5.0), (10, 2.0)],
        [(3.0, 50), (2.5, None), (1.0, 5)],
        20,
        [(10, "loss", 2.0, 10), (10, "loss", 2.0, 0), (15, "timeout", 2.0, 5)],
    ),
    "newest loss after a timeout": (
        [(0, 5.0), (10, 2.0), (20, 1.9)],
        [(1.0, 13), (3.0, None)],
        None,
        [(13, "timeout", 2.0, 13), (13, "loss", 2.0, 0)],
    ),
    "an old loss fires nothing later": (
        # The second entry is checked at 13 on 4.0; only the next evaluation gives it a loss again.
        [(0, 5.0), (10, 4.0), (20, 2.0)],
        [(1.0, 13), (3.0, None)],
        None,
        [(13, "timeout", 4.0, 13), (20, "loss", 2.0, 7)],
    ),
    "one that does not fire holds up the rest": (
        [(0, 5.0), (10, 2.0)],
        [(1.0, None), (3.0, 2)],
        100,
        [],
    ),
    "loss before timeout": ([(0, 5.0), (10, 2.0)], [(3.0, 10)], None, [(10, "loss", 2.0, 10)]),
    "NaN satisfies nothing": (
        [(0, 5.0), (10, math.nan), (20, -math.inf)],
        [(3.0, 25), (3.0, 3)],
        30,
        [(25, "timeout", -math.inf, 25), (28, "timeout", -math.inf, 3)],
    ),
    "the run ends first": (
        [(0, 5.0), (10, 4.0), (20, 2.0)],
        [(3.0, None)],
        19,
        [],
    ),
    "timeouts go on after the curve": (
        [(0, 5.0)],
        [(1.0, 7)] * 4,
        21,
        [(7, "timeout", 5.0, 7), (14, "timeout", 5.0, 7), (21, "timeout", 5.0, 7)],
    ),
    "a curve that begins late": ([(50, 2.0)], [(3.0, 20), (3.0, None)], None,
        [(20, "timeout", None, 20), (50, "loss", 2.0, 30)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SIMULATIONS)
def test_simulation_fires_as_the_contract_says(name):
    curve, triggers, total, expected = SIMULATIONS[name]
    rows = [entry(trigger_loss=loss, max_wait_iters=wait) for loss, wait in triggers]
    firings = simulate(entries(*rows), curve, total)
    assert [firing.entry.number for firing in firings] == [*range(1, len(expected) + 1)]
    assert [(f.step, f.reason, f.val_loss, f.waited) for f in firings] == expected


def _step_by_step(schedule, curve, total):
    """The contract read literally: every step of the run, one after the other."""
    losses, fired, last, newest = dict(curve), [], 0, None
    for step in range(total + 1):
        heard = losses.get(step)
        newest = newest if heard is None else heard
        while len(fired) < len(schedule):
            reason = due(schedule[len(fired)], step, last, heard)
            if reason is None:
                break
            fired.append((step, reason))
            last, heard = step, newest
    return fired


def test_simulation_is_that_of_every_step():
    rng = np.random.default_rng(0)
    for _ in range(300):
        total = int(rng.integers(5, 60))
        steps = np.flatnonzero(rng.random(total) < 0.3).tolist() or [0]
        curve = [(step, float(rng.choice([1.0, 2.0, 3.0, math.nan]))) for step in steps]
        triggers = [
            (float(rng.integers(1, 4)) + 0.5, int(rng.integers(1, 12)))
            for _ in range(rng.integers(1, 6))
        ]
        rows = [
            entry(
                trigger_loss=loss if rng.random() < 0.7 else None,
                max_wait_iters=wait,
            )
            for loss, wait in triggers
        ]
        schedule = entries(*rows)
        found = [(f.step, f.reason) for f in simulate(schedule, curve, total)]
        assert found == _step_by_step(schedule, curve, total)


def test_simulation_report_names_what_fires_and_what_does_not():
    schedule = entries(entry(), entry("stack_layers", 2.0, trigger_loss=1.0, max_wait_iters=None))
    firings = simulate(schedule, [(0, 5.0), (50, 2.5)], 200)
    rows = [line.split() for line in simulation_report(schedule, firings, 200).splitlines()[1:]]
    assert rows == [
        ["entry", "operation", "step", "reason", "loss", "waited"],
        ["1", "change_lr", "50", "loss", "2.5", "50"],
        ["2", "stack_layers", "-", "not", "by", "step", "200", "-", "-"],
    ]


def test_curve_is_read(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("step,loss\n0,5.5\n10, 4e0\n20,nan\r\n30,inf\n40,.5\n")
    curve = read_curve(path)
    assert [step for step, _ in curve] == [0, 10, 20, 30, 40]
    np.testing.assert_equal([loss for _, loss in curve], [5.5, 4.0, np.nan, np.inf, 0.5])


MALFORMED_CURVES = {
    "empty": ("", ["line 1", "step,loss"]),
    "no header": ("0,5.5\n", ["line 1", "'0,5.5'", "step,loss"]),
    "another header": ("iter,loss\n0,5.5\n", ["line 1", "step,loss"]),
    "columns the other way": ("loss,step\n5.5,0\n", ["line 1", "step,loss"]),
    "no rows": ("step,loss\n", ["a row for each evaluation"]),
    "one column": ("step,loss\n0\n", ["line 2", "two columns"]),
    "three columns": ("step,loss\n0,5,6\n", ["line 2", "'0,5,6'", "two columns"]),
    "blank line": ("step,loss\n0,5\n\n10,4\n", ["line 3", "two columns"]),
    "fraction of a step": ("step,loss\n0,5\n1.5,4\n", ["line 3: step", "'1.5'", "whole"]),
    "negative step": ("step,loss\n-1,5\n", ["line 2: step", "'-1'"]),
    "underscore": ("step,loss\n1_0,5\n", ["line 2: step", "'1_0'"]),
    "text for a loss": ("step,loss\n0,low\n", ["line 2: loss", "'low'", "a number"]),
    "no loss": ("step,loss\n0,\n", ["line 2: loss", "a number"]),
    "step twice": ("step,loss\n0,5\n0,4\n", ["line 3: step", "'0'", "after 0"]),
    "steps go back": ("step,loss\n10,5\n0,4\n", ["line 3: step", "after 10"]),
    "open quote": ('step,loss\n0,"5\n', ["valid CSV"]),
}


@pytest.mark.parametrize("name", MALFORMED_CURVES)
def test_malformed_curve_is_refused(name, tmp_path):
    content, words = MALFORMED_CURVES[name]
    path = tmp_path / "curve.csv"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_curve(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert [word for word in words if word not in text] == [], text


def test_curve_of_bytes_and_no_curve_are_refused(tmp_path):
    (tmp_path / "curve.csv").write_bytes(b"step,loss\n0,\xff\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_curve(tmp_path / "curve.csv")
    with pytest.raises(InputError, match="readable"):
        read_curve(tmp_path / "none.csv")
