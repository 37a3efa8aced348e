"""Runs with the controller: what it closes, what it records, and through what it goes on the same."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import TINY_GPT, train_until_killed, write_text

from jaxmorph.train import main
from jaxmorph.training.turns import TURNS, Turn

TINY = [
    *(*TINY_GPT, "--n_heads", "4", "--learning_rate", "1e-2", "--progress", "lines"),
    *("--eval_interval", "8", "--eval_iters", "1", "--keep_checkpoints", "9"),
]
CONTROLLED = [
    *("--enable_controller", "--controller_warmup", "2", "--controller_interval", "2"),
    *("--controller_batches", "1", "--max_pruned_heads", "0.5", "--controller_patience", "2"),
    *("--enable_head_lr", "--head_lr_warmup", "2", "--head_lr_cooldown", "6"),
    *("--head_lr_adaptive", "importance"),
]
STEPS = 24
SOURCE = {
    *("status", "step", "active_gates", "pruned_percent", "controller_lr", "gate_changes"),
    *("early_stopping_triggered", "plateau_counter", "head_lr_info"),
}
PER_HEAD = {"gates", "status", "multiplier", "entropy", "grad_norm", "importance", "ablation"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("corpus") / "text.txt")


def argv(text: str, run_dir: Path, *more: str, steps: int = STEPS) -> list[str]:
    where = ["--data", text, "--run_dir", str(run_dir), "--max_steps", str(steps)]
    return [*TINY, *where, *more]


def lines(run_dir: Path, name: str = "heads.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def sha256(run_dir: Path, step: int = STEPS) -> str:
    return json.loads((run_dir / f"checkpoints/{step}/manifest.json").read_text())["state_sha256"]


def updates(run_dir: Path) -> list[dict]:
    return [line for line in lines(run_dir) if line["status"] == "updated"]


@pytest.fixture(scope="module")
def compiled() -> list[str]:
    """What JAX has compiled since the test session began."""
    seen: list[str] = []

    def heard(event: str, *_: object, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    return seen


def each_step(look) -> tuple[Turn, ...]:
    """The loop's turns, and one that looks at the run after every step."""
    return (*TURNS[:-1], Turn("look", due=lambda run: True, act=look), TURNS[-1])


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory, compiled) -> Path:
    """A run with the controller that was left alone; nothing is compiled after its first update."""
    run_dir, counts, scales = tmp_path_factory.mktemp("whole") / "run", {}, {}

    def look(run):
        counts[run.step] = len(compiled)
        scales[run.step] = np.asarray(run.state["head_boost"]).copy()

    assert main(argv(text, run_dir, *CONTROLLED), turns=each_step(look)) == 0
    assert counts[2] > 0
    assert counts[STEPS] == counts[2]
    worth = np.asarray(updates(run_dir)[0]["heads"]["importance"])
    assert (scales[1] == 1).all()
    np.testing.assert_allclose(scales[2], np.clip(worth / np.median(worth), 0.5, 2), rtol=1e-6)
    return run_dir


def test_heads_close_until_the_limit_and_then_it_stops(whole):
    record = updates(whole)
    gates = np.asarray([line["heads"]["gates"] for line in record])
    assert [line["step"] for line in record] == list(range(2, 2 + 2 * len(record), 2))
    assert gates[0].max() == 1
    assert ((gates <= 0.1).sum(axis=(1, 2)) <= 2).all()
    assert (gates[-1] == 0).sum() == 2
    assert record[-1]["step"] < STEPS - 1
    assert [line["early_stopping_triggered"] for line in record] == [False] * (len(record) - 1) + [
        True
    ]
    last = lines(whole, "metrics.jsonl")[-1]
    assert last["avg_head_lr_multiplier"] == 0.5


def test_lines_hold_what_the_controller_knew_and_did(whole):
    seen = lines(whole)
    assert [line["step"] for line in seen if line["status"] == "evaluated"] == [0, 8, 16, 24]
    assert seen == sorted(seen, key=lambda line: line["step"])
    for line in seen:
        assert line.keys() == SOURCE | {"heads"}
        assert line["heads"].keys() == PER_HEAD
        info = line["head_lr_info"]
        assert info["head_status"].keys() == {
            *("newly_activated", "newly_deactivated", "cooling_down")
        }
        assert info["lr_updates"].keys() == {
            *("changes_made", "max_multiplier", "min_multiplier", "avg_multiplier")
        }
        gates, status = (np.asarray(line["heads"][name]) for name in ("gates", "status"))
        closed = gates <= 0.1
        assert line["active_gates"] == (~closed).sum()
        assert line["pruned_percent"] == 100 * closed.mean()
        assert info["head_status"]["newly_deactivated"] == (closed & (status != -1)).sum()
        assert (np.asarray(line["heads"]["multiplier"]) == (status != -1)).all()  # none opened
    before = seen[0]["heads"]["gates"]
    for line in updates(whole):
        gates, found = line["heads"]["gates"], line["heads"]
        moved = np.abs(np.asarray(gates) - before).mean()
        np.testing.assert_allclose(line["gate_changes"], moved, atol=1e-7)
        was_open = (np.asarray(before) > 0.1).tolist()
        known = [[value is not None for value in row] for row in found["ablation"]]
        if (line["step"] - 2) // 2 % 5 == 0:
            assert known == was_open  # an audit
        else:
            assert np.sum(known) <= 1  # a quarter of four
        assert all(value is not None for row in found["importance"] for value in row)
        before = gates


def test_killed_as_it_decides_and_resumed_it_is_the_same_run(text, whole, tmp_path):
    killed = argv(text, tmp_path / "run", *CONTROLLED, "--checkpoint_interval", "3")
    for point in ("controller_update:6", "controller_update:1"):
        train_until_killed(killed, point)
    assert main(killed) == 0
    assert sha256(tmp_path / "run") == sha256(whole)
    assert (tmp_path / "run/heads.jsonl").read_bytes() == (whole / "heads.jsonl").read_bytes()


def test_a_log_that_lost_a_line_is_refused_or_accepted_and_kept(text, whole, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    path, record = run_dir / "heads.jsonl", lines(whole)
    kept = (whole / "heads.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:1] + kept[2:]))
    shutil.rmtree(run_dir / f"checkpoints/{STEPS}")
    again = argv(text, run_dir, *CONTROLLED)
    assert main(again) == 2
    error = capsys.readouterr().err
    assert "heads.jsonl" in error
    assert "--accept_damaged_log" in error
    assert main([*again, "--accept_damaged_log"]) == 0
    assert lines(run_dir) == record[:1] + record[2:]  # two lines of one step are both sound
    assert sha256(run_dir) == sha256(whole)


def test_a_new_stage_has_boosts_by_layer_and_a_stopped_controller_goes_on(text, tmp_path):
    """It stops once the one head that it may close is closed; then there are two layers."""
    schedule = tmp_path / "schedule.json"
    grow = {"name": "stack_layers", "value": 2, "max_wait_iters": 9, "trigger_loss": None}
    schedule.write_text(json.dumps([grow | {"reevaluate": False}]))
    flags = [*CONTROLLED, "--max_pruned_heads", "0.25", "--controller_patience", "1"]
    flags += ["--controller_warmup", "1", "--controller_interval", "1"]
    flags += ["--head_lr_adaptive", "layer", "--scaling_schedule_file", str(schedule)]
    scales = {}

    def look(run):
        scales[run.step] = np.asarray(run.state["head_boost"]).copy()

    assert main(argv(text, tmp_path / "run", *flags, steps=11), turns=each_step(look)) == 0
    record = updates(tmp_path / "run")
    assert [line["step"] for line in record] == [1, 2, 3, 4, 5, 6, 7, 10]
    stops = [line["early_stopping_triggered"] for line in record]
    assert stops[:7] == [False] * 6 + [True]
    assert record[-1]["plateau_counter"] <= 1
    assert np.sum(np.asarray(record[-1]["heads"]["gates"]) == 0) == 2  # of 8, a copy too
    assert (scales[8] == 1).all()  # of a single layer
    for step in (9, 11):
        np.testing.assert_array_equal(scales[step], [[0.5] * 4, [2] * 4])
