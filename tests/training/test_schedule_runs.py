"""Schedules in the later style of nano_gpt, run to their end; `benchmarks/moving_over.py` runs all."""

import itertools
import json
from pathlib import Path

import pytest
from tiny_runs import write_text

from jaxmorph.config.resolve import resolve
from jaxmorph.growth.plan import make_plan
from jaxmorph.morphs import Report
from jaxmorph.train import main
from jaxmorph.training.announcement import announcement
from jaxmorph.training.operate import OperationResult
from jaxmorph.training.position import Position

GROWTH = Path(__file__).parents[1] / "growth"


# The lists of layers are gone on with after the first of them.
RUNS = {"layer_lists.json": ("3", "16"), "lora_merges.yaml": ("16",)}


@pytest.mark.parametrize("name", RUNS)
def test_schedule_runs_to_its_end(name, tmp_path, capsys):
    text = tmp_path / "text.txt"
    write_text(text)
    argv = ["--config", str(GROWTH / "tiny_lora.yaml"), "--run_dir", str(tmp_path / "run")]
    argv += ["--data", str(text), "--progress", "lines"]
    argv += ["--scaling_schedule_file", str(GROWTH / "schedules" / name)]
    plan = make_plan(resolve(argv)[0], None)
    for steps in RUNS[name]:
        assert main([*argv, "--max_steps", steps]) == 0
    lines = (tmp_path / "run" / "operations.jsonl").read_text().splitlines()
    fired = [json.loads(line) for line in lines]
    assert [(f["name"], f["value"]) for f in fired] == [
        (row.name, list(row.value) if isinstance(row.value, tuple) else row.value)
        for row in plan.entries
    ]
    assert "loss" not in {f["reason"] for f in fired if f["trigger_loss"] is None}
    end = plan.stages[-1].shape.model
    assert (fired[-1]["model_after"]["n_layers"], fired[-1]["model_after"]["d_ff"]) == (
        end.n_layers,
        end.d_ff,
    )
    exact = [stage.exact for stage in plan.stages[1:]]
    deltas = [f["function_delta"] for f in fired]
    assert all(d < 1e-5 for d, kept in zip(deltas, exact, strict=True) if kept and d is not None)
    said = capsys.readouterr().out
    assert all(f": {row.title} ===" in said for row in plan.entries)
    assert "never by loss" in said


def test_an_operation_that_is_not_exact_says_so_when_it_is_done(tmp_path):
    schedule, row = (
        tmp_path / "schedule.json",
        {"value": 2, "max_wait_iters": 1, "reevaluate": False},
    )
    names = [{"name": "set_attn_lora_rank", "completed": False}, {"name": "set_vocab_lora_rank"}]
    merged = {"options": {"merge_first": True}}
    schedule.write_text(json.dumps([names[0] | row, names[1] | row | merged]))
    argv = ["--config", str(GROWTH / "tiny_lora.yaml"), "--scaling_schedule_file", str(schedule)]
    plan = make_plan(resolve(argv)[0], None)
    lossy, exact = (
        announcement(
            OperationResult(before, after, Position(), "timeout", Report(()), 0.78, 1, 0), 2
        )
        for before, after in itertools.pairwise(plan.stages)
    )
    assert "  Warning: set_attn_lora_rank 2 changes the function: a smaller attn_lora_rank" in lossy
    assert lossy.count("Warning") == 1  # not those of the file
    assert "Warning" not in exact
