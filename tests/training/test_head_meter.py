"""Heads measured in a run: each stage's own, while nothing else of the run changes."""

import json
from collections.abc import Collection

import numpy as np
from tiny_runs import TINY_GPT, write_text

from jaxmorph.train import main
from jaxmorph.training.turns import TURNS, Turn

GROWING = [{"name": "stack_layers", "value": 2, "max_wait_iters": 3, "reevaluate": False}]


def _train(folder, found: list, steps: Collection[int]) -> str:
    """A run that grows after 3 of 6 steps, and measures its heads at some; its final digest."""

    def measure(run) -> None:
        entries = list(np.ndindex(*run.state["head_gate"].shape))
        found.append((run.step, run.head_measures(), run.ablation(entries)))

    folder.mkdir()
    (schedule := folder / "schedule.json").write_text(json.dumps(GROWING))
    measuring = Turn("measure", lambda run: run.step in steps, measure)
    flags = ["--max_steps", "6", "--eval_interval", "6", "--eval_iters", "1", "--progress", "off"]
    flags += ["--data", write_text(folder / "text.txt"), "--run_dir", str(folder / "run")]
    flags += ["--scaling_schedule_file", str(schedule)]
    assert main([*TINY_GPT, *flags], None, (*TURNS[:-1], measuring, TURNS[-1])) == 0
    manifest = json.loads((folder / "run/checkpoints/6/manifest.json").read_text())
    return manifest["state_sha256"]


def test_measuring_leaves_the_run_as_it_is_and_follows_its_stages(tmp_path):
    found: list = []
    assert _train(tmp_path / "measured", found, (2, 4)) == _train(tmp_path / "never", [], ())
    assert [step for step, *_ in found] == [2, 4]
    for step, measures, rises in found:
        shape = (1 if step < 3 else 2, 2)
        assert {values.shape for values in measures.values()} == {shape} == {rises.shape}
        assert all(np.isfinite(values).all() for values in (*measures.values(), rises))
