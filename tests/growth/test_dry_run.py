"""The dry run: memory by optimizer, the report of a walk, loss curves and what fires on them."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from schedule_entries import (
    ONE,
    entries,
    entry,
    make_shape,
    random_schedules,
    schedule_of,
    step_by_step,
)

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.wording import short_flops
from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.growth.dry_run import read_curve, simulate, simulation_report, walk_report
from jaxmorph.growth.plan import walk
from jaxmorph.model import gpt
from jaxmorph.model.architecture import (
    flops_per_token,
    gpt_axis_sizes,
    gpt_signatures,
    parameter_count,
)
from jaxmorph.model.trainable import trainable_of
from jaxmorph.step.memory import memory
from jaxmorph.step.optimizer import make_optimizer
from jaxmorph.train import main

OPTIMIZERS = ("adamw", "muon", "lion", "sgd", "adafactor")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("rank", [0, 8])
def test_memory_is_what_the_optimizer_holds(name, width, rank):
    ranks = {"attn_lora_rank": rank, "vocab_lora_rank": rank, "lora_base": "trained"}
    shape = make_shape(d_model=width, **ranks)
    config = shape.model
    settings = OptimizerSettings(optimizer=name)
    optimizer = make_optimizer(settings, trainable_of(shape))
    params = jax.eval_shape(lambda: gpt.init(config, jax.random.key(0)))
    state = jax.eval_shape(optimizer.init, params)
    # The smallest are counts, muon's three coefficients and what adafactor puts for nothing.
    held = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 3)
    found = memory(shape, settings)
    assert found.optimizer == 4 * held
    assert found.parameters == found.gradients == 4 * parameter_count(config)
    assert found.total == 4 * (2 * parameter_count(config) + held)


def test_memory_of_wider_numbers_and_of_a_frozen_base():
    shape, adamw = make_shape(), OptimizerSettings()
    trained = make_shape(lora_base="trained")
    assert memory(make_shape(dtype="float64"), adamw).total == 2 * memory(shape, adamw).total
    frozen_entries = 4 * 4 * 64 * 64 + 50 * 64
    saved = memory(trained, adamw).optimizer - memory(shape, adamw).optimizer
    assert saved == 4 * 2 * frozen_entries
    saved = memory(trained, adamw).gradients - memory(shape, adamw).gradients
    assert saved == 4 * frozen_entries
    # Two of four layers frozen: half of what the blocks hold.
    half = dataclasses.replace(trained, frozen_layers=(0, 2))
    saved = memory(trained, adamw).gradients - memory(half, adamw).gradients
    signatures, sizes = gpt_signatures(trained.model), gpt_axis_sizes(trained.model)
    stacked = [s.shape(sizes) for s in signatures.values() if s.stacked]
    assert saved == 4 * sum(math.prod(shape) for shape in stacked) // 2
    sgd = OptimizerSettings(optimizer="sgd", beta1=0.0)
    assert memory(shape, sgd).optimizer == 0


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


def _bytes(number: int) -> str:
    return f"{number / 1e6:.3g}MB" if number >= 1e6 else f"{number / 1e3:.3g}kB"


def test_walk_report_says_what_every_stage_is():
    rows = entries(
        entry("stack_layers", 2.0, reevaluate=True, options={"order": "middle"}),
        entry("change_lr", 0.5, trigger_loss=None),
        entry("change_batch_size", 1.25, max_wait_iters=None),
        entry("merge_lora_weights", None, trigger_plateau=4),
        entry("change_lr", 2.0, trigger_plateau=1, trigger_loss=None, max_wait_iters=None),
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
        [
            "4",
            "merge_lora_weights",
            "below 3 or after 4 evaluations without improvement or after 100 steps",
            "no",
            "yes",
        ],
        ["5", "change_lr 2", "after 1 evaluation without improvement", "no", "yes"],
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
    header, *held = _cells(report, "Memory")
    # The batch of stage 3 has more activations; the merge of stage 4 moves the state.
    assert [row[0] for row in held] == ["0", "1", "3", "4"]
    for row in held:
        found = dict(zip(header, row, strict=True))
        need = memory(stages[int(row[0])].shape, OptimizerSettings())
        assert found["memory"] == _bytes(need.total)
        assert found["= parameters"] == _bytes(need.parameters)
        assert found["+ optimizer"] == _bytes(need.optimizer)
        assert found["fits"] == "-"
    before, after = (memory(stage.shape, OptimizerSettings()).state for stage in stages[:2])
    moved = ["-", _bytes(before + after), "-", _bytes(2 * after)]
    assert [row[header.index("old + new state")] for row in held] == moved
    header, *training = _cells(report, "Training")
    assert [row[0] for row in training] == ["0", "2", "3", "5"]
    last = dict(zip(header, training[-1], strict=True))
    assert last == {
        "stage": "5",
        "batch": "12",
        "accum.": "3",
        "tokens/step": "1,728",
        "lr ×": "2",
        "peak lr": "0.002",
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
    firings = simulate(entries(*rows), curve, min_change=0.0, total=total)
    assert [firing.entry.number for firing in firings] == [*range(1, len(expected) + 1)]
    assert [(f.step, f.reason, f.val_loss, f.waited) for f in firings] == expected


# curve, (evaluations to wait for, re-evaluates) of each entry, (step, loss) of each firing; 10 % counts
PLATEAUS = {
    "at the n-th without improvement": (
        [(0, 5.0), (10, 4.0), (20, 3.9), (30, 4.1)],
        [(2, False)],
        [(30, 4.1)],
    ),
    "an improvement begins again": (
        [(0, 5.0), (10, 4.9), (20, 4.0), (30, 3.9), (40, 3.8)],
        [(2, False)],
        [(40, 3.8)],
    ),
    "an operation begins again": (
        # After the first at 20 there is no best: 4.1 becomes it.
        [(0, 4.0), (10, 4.0), (20, 4.0), (30, 4.1), (40, 4.1), (50, 4.1)],
        [(2, False), (2, False)],
        [(20, 4.0), (50, 4.1)],
    ),
    "a re-evaluated loss is the first best": (
        [(0, 4.0), (10, 4.0), (20, 4.0), (30, 4.1), (40, 4.1), (50, 4.1)],
        [(2, True), (2, False)],
        [(20, 4.0), (40, 4.1)],
    ),
    "a re-evaluation that is not finite is none": (
        [(0, 4.0), (10, math.nan), (20, 4.1), (30, 4.1)],
        [(1, True), (1, False)],
        [(10, math.nan), (30, 4.1)],
    ),
    "the first is not finite": ([(0, math.nan), (10, 4.0)], [(1, False)], [(0, math.nan)]),
}


@pytest.mark.parametrize("name", PLATEAUS)
def test_simulation_of_a_loss_that_stands_still(name):
    curve, triggers, expected = PLATEAUS[name]
    none = {"trigger_loss": None, "max_wait_iters": None}
    rows = [entry(trigger_plateau=n, reevaluate=again, **none) for n, again in triggers]
    firings = simulate(entries(*rows), curve, min_change=0.1)
    assert {firing.reason for firing in firings} == {"plateau"}
    np.testing.assert_equal([(f.step, f.val_loss) for f in firings], expected)


def test_simulation_is_that_of_every_step():
    reasons = set()
    for rows, curve, total, min_change in random_schedules(10_000):
        firings = simulate(schedule_of(rows), curve, min_change=min_change, total=total)
        found = [
            (f.step, f.reason, math.nan if f.val_loss is None else f.val_loss, f.waited)
            for f in firings
        ]
        expected = step_by_step(rows, curve, total, min_change)
        assert repr(found) == repr(expected), (rows, curve, min_change)  # as NaN is not NaN
        reasons |= {(firing.reason, firing.entry.reevaluate) for firing in firings}
    assert len(reasons) == 6


def test_simulation_report_names_what_fires_and_what_does_not():
    schedule = entries(
        entry(),
        entry("widen_mlp", 2.0, trigger_plateau=1, max_wait_iters=None, trigger_loss=None),
        entry("stack_layers", 2.0, trigger_loss=1.0, max_wait_iters=None),
    )
    curve = [(0, 5.0), (50, 2.5), (60, 2.5), (70, 2.49)]
    firings = simulate(schedule, curve, min_change=0.1, total=200)
    rows = [line.split() for line in simulation_report(schedule, firings, 200).splitlines()[1:]]
    assert rows == [
        ["entry", "operation", "step", "reason", "loss", "waited"],
        ["1", "change_lr", "50", "loss", "2.5", "50"],
        ["2", "widen_mlp", "70", "plateau", "2.49", "20"],
        ["3", "stack_layers", "-", "not", "by", "step", "200", "-", "-"],
    ]


def test_dry_run_simulates_the_schedule_on_a_curve(tmp_path, capsys):
    row = entry(trigger_plateau=2, trigger_loss=None, max_wait_iters=None)
    (tmp_path / "schedule.json").write_text(json.dumps([row]))
    (tmp_path / "curve.csv").write_text("step,loss\n0,5\n10,4\n20,3.5\n30,3\n40,2.9\n")
    argv = ["--dry_run", "--max_steps", "90", "--simulate_loss", str(tmp_path / "curve.csv")]
    argv += ["--scaling_schedule_file", str(tmp_path / "schedule.json")]
    for min_change, fired in ((0.25, ["40", "plateau"]), (0.15, ["-", "not", "by", "step", "90"])):
        assert main([*argv, "--plateau_min_change", str(min_change)]) == 0
        last = capsys.readouterr().out.splitlines()[-1].split()
        assert last[: 2 + len(fired)] == ["1", "change_lr", *fired]


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
