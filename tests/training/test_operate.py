"""Runs that follow a schedule: what fires and when, what it leaves behind, and through what it holds."""

import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import TINY_GPT, train_until_killed, write_text

from jaxmorph.config.mesh import MeshShape, parse_mesh
from jaxmorph.config.resolve import resolve
from jaxmorph.growth.plan import make_plan
from jaxmorph.model.tree_paths import leaves_by_path
from jaxmorph.morphs.gpt import MORPHS
from jaxmorph.step.sharding import make_mesh
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.system.host_memory import available_memory
from jaxmorph.train import main
from jaxmorph.training.operate import perform
from jaxmorph.training.position import Position
from jaxmorph.training.stages import StageCompiler
from jaxmorph.training.tables import Tables

TINY = [
    *(*TINY_GPT, "--learning_rate", "1e-2", "--progress", "lines"),
    *("--eval_interval", "4", "--eval_iters", "2", "--warmup_steps", "2"),
]
CONTRACT = {
    *("index", "name", "value", "step", "reason", "trigger_loss", "val_loss_before"),
    *("val_loss_after", "model_before", "model_after", "params_before", "params_after", "moments"),
    *("function_delta", "seconds"),
}
NEVER, ALWAYS = 1e-6, 1e3  # thresholds


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("corpus") / "text.txt")


def _entry(name, value, loss, wait, again=False, **options):
    triggers = {"trigger_loss": loss, "max_wait_iters": wait, "reevaluate": again}
    return {"name": name, "value": value, **triggers, **({"options": options} if options else {})}


def _write(folder: Path, rows: list[dict], name: str = "schedule.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


def _validation_specs(shape):
    return [jax.ShapeDtypeStruct((4, shape.model.seq_len + 1), np.int32)]


def _argv(text, run_dir, schedule, steps, *more):
    where = ["--data", text, "--run_dir", str(run_dir), "--max_steps", str(steps)]
    return [*TINY, *where, "--scaling_schedule_file", str(schedule), *more]


def _lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def _sha256(run_dir: Path, step: int) -> str:
    return json.loads((run_dir / f"checkpoints/{step}/manifest.json").read_text())["state_sha256"]


GROWTH = [
    _entry("change_lr", 0.5, NEVER, 3, again=True),
    _entry("widen_mlp", 1.5, ALWAYS, None, again=True, recipe="fresh"),  # at once, on that loss
    _entry("change_batch_size", 2, ALWAYS, 2),  # the newest loss is enough
    _entry("stack_layers", 2, ALWAYS, 3, again=False, recipe="masked", anneal_steps=20),
    _entry("reset_lr_schedule", None, None, 5),
    _entry("set_warmup_iters", 3, None, 1),
]
FIRED = [(3, "timeout"), (3, "loss"), (3, "loss"), (3, "loss"), (8, "timeout"), (9, "timeout")]
STEPS = 14


@pytest.fixture(scope="module")
def grown(text, tmp_path_factory):
    """A run that grows, with its schedule and all it printed."""
    folder = tmp_path_factory.mktemp("grown")
    schedule = _write(folder, GROWTH)
    before = schedule.read_bytes()
    assert main(_argv(text, folder / "run", schedule, STEPS)) == 0
    assert schedule.read_bytes() == before
    return folder / "run"


def test_operations_fire_to_the_step_each_once_with_a_complete_record(grown):
    records = _lines(grown, "operations.jsonl")
    assert [(r["name"], r["value"]) for r in records] == [(e["name"], e["value"]) for e in GROWTH]
    assert [(r["step"], r["reason"]) for r in records] == FIRED
    assert [r["index"] for r in records] == list(range(len(GROWTH)))
    assert all(r.keys() >= CONTRACT for r in records)
    assert json.loads((grown / "schedule.json").read_text()) == GROWTH
    lr, mlp, batch, depth, *_ = records
    assert (mlp["model_before"]["d_ff"], mlp["model_after"]["d_ff"]) == (64, 96)
    assert (depth["model_before"]["n_layers"], depth["model_after"]["n_layers"]) == (1, 2)
    for record in (mlp, depth):
        assert 0 <= record["function_delta"] < 1e-5
        assert record["moments"]["reset"] == 0
    # a column of the up-projection, its bias, a row of the down-projection; two moments each
    assert mlp["moments"]["fresh"] == 2 * 32 * (16 + 1 + 16)
    assert mlp["params_after"] - mlp["params_before"] == 32 * (16 + 1 + 16)
    assert depth["moments"]["fresh"] == 0
    assert {lr["function_delta"], batch["function_delta"]} == {None}
    assert lr["val_loss_after"] == mlp["val_loss_before"]
    assert abs(mlp["val_loss_after"] - mlp["val_loss_before"]) < 1e-5
    assert batch["val_loss_after"] is None


def test_metrics_show_the_stages_and_the_reevaluation(grown):
    lines = _lines(grown)
    records = _lines(grown, "operations.jsonl")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert lines[3]["val/loss_after"] == records[1]["val_loss_after"]
    assert [line["stage"] for line in lines[1:]] == [0] * 3 + [4] * 5 + [5] + [6] * (STEPS - 9)
    assert [line["batch_size"] for line in lines[1:]] == [4] * 3 + [8] * (STEPS - 3)
    assert lines[-1]["params"] == records[-1]["params_after"]
    tokens = np.cumsum([4 * 16] * 3 + [8 * 16] * (STEPS - 3))
    assert [line["tokens"] for line in lines[1:]] == tokens.tolist()
    assert all(math.isfinite(line["train/loss"]) for line in lines[1:])


def test_learning_rate_follows_the_operations(grown):
    def rate(s: int) -> float:
        """Update s of the run, from the formula: halved after 3; restarted after 8."""
        start, warmup = (8, 2) if s > 8 else (0, 2)
        warmup = 3 if s > 9 else warmup
        t, span = s - 1 - start, STEPS - start
        cosine = 0.5 * (1 + math.cos(math.pi * (t - warmup) / (span - warmup)))
        factor = t / warmup if t < warmup else 0.1 + 0.9 * cosine
        return 1e-2 * (0.5 if s > 3 else 1.0) * factor

    for line in _lines(grown)[1:]:
        assert abs(line["train/learning_rate"] - rate(line["step"])) < 1e-8


def test_masked_layers_open_step_by_step(grown):
    checkpoints = Checkpoints(grown / "checkpoints", 2, True)
    for step in (12, STEPS):  # the layer came at 3
        np.testing.assert_allclose(_gates(checkpoints, step), [1, (step - 3) / 20], rtol=1e-6)


def _gates(checkpoints, step):
    abstract = {"variables/layer_gate": jax.ShapeDtypeStruct((2,), np.float32)}
    return checkpoints.restore(step, abstract, part=True)["variables/layer_gate"]


@pytest.mark.parametrize("more", [("--precompile", "off"), ("--checkpoint_interval", "1")])
def test_how_programs_are_compiled_and_when_is_saved_change_nothing(more, grown, text, tmp_path):
    schedule = grown.parent / "schedule.json"
    assert main(_argv(text, tmp_path / "run", schedule, STEPS, *more)) == 0
    assert _sha256(tmp_path / "run", STEPS) == _sha256(grown, STEPS)


def test_log_names_trigger_change_and_result(text, tmp_path, capsys):
    rows = [_entry("widen_heads", 2, ALWAYS, 9, again=True), _entry("change_lr", 0.5, NEVER, 1)]
    assert main(_argv(text, tmp_path / "run", _write(tmp_path, rows), 3)) == 0
    printed = capsys.readouterr().out
    loss = _lines(tmp_path / "run")[0]["val/loss"]
    for words in (
        "=== Operation 1 of 2 at step 0: widen_heads 2 ===",
        f"Trigger: loss threshold (validation loss {loss:.4f}, threshold 1000; "
        "0 steps since the last operation, longest wait 9)",
        "n_heads 2 -> 4",
        "transported",
        "step 0: validation loss after it",
        "=== Operation 2 of 2 at step 1: change_lr 0.5 ===",
        "lr_multiplier: 1 -> 0.5",
    ):
        assert words in printed


def test_batch_size_and_accumulation_together_change_nothing(text, tmp_path):
    """16 examples a step in whatever portions: the same examples, so the same losses."""
    rows = [_entry("change_batch_size", 2, None, 2), _entry("change_grad_accum", 0.5, None, 1)]
    rows[1] |= {"trigger_loss": ALWAYS}  # at the same step
    runs = [_argv(text, tmp_path / "a", _write(tmp_path, rows), 6, "--grad_accum_steps", "2")]
    runs.append([*TINY, "--data", text, "--run_dir", str(tmp_path / "b"), "--max_steps", "6"])
    runs[1] += ["--grad_accum_steps", "2"]
    for argv in runs:
        assert main(argv) == 0
    a, b = ([line["train/loss"] for line in _lines(tmp_path / name)[1:]] for name in ("a", "b"))
    assert [line["grad_accum_steps"] for line in _lines(tmp_path / "a")[1:]] == [2, 2, 1, 1, 1, 1]
    np.testing.assert_allclose(a, b, rtol=2e-5)


def test_edited_schedule_on_resume(text, tmp_path, capsys):
    rows = [_entry("change_lr", 0.5, None, 2), _entry("change_lr", 3.0, None, 50)]
    schedule = _write(tmp_path, rows)
    assert main(_argv(text, tmp_path / "run", schedule, 4)) == 0
    capsys.readouterr()

    def go_on(*edited: dict, more: tuple[str, ...] = ()) -> str:
        _write(tmp_path, list(edited))
        status = main(_argv(text, tmp_path / "run", schedule, 6, *more))
        said = capsys.readouterr()
        return f"{status} {said.err if status else said.out}"

    fired, later = rows[0] | {"value": 0.25}, rows[1] | {"value": 0.1, "max_wait_iters": 2}
    allowed = ("--allow_schedule_change",)
    for argv, words in (
        ((fired, rows[1]), "entry 1 (change_lr): got 'edited', expected the entry as it was"),
        (
            (rows[0], later),
            "entry 2 (change_lr): got 'edited', expected the schedule the run began",
        ),
        ((rows[0],), "entry 2 (change_lr): got 'change_lr -> none'"),
    ):
        assert go_on(*argv).startswith("2 ")
        assert words in go_on(*argv)
    assert go_on(fired, rows[1], more=allowed).startswith("2 ")
    assert "changed scaling_schedule_file: entry 2 (change_lr): edited" in go_on(
        rows[0], later, more=allowed
    )
    assert [r["value"] for r in _lines(tmp_path / "run", "operations.jsonl")] == [0.5, 0.1]
    described = rows[0] | {"desc": "a note changes nothing"}
    assert go_on(described, later).startswith("0 ")


def test_growth_on_a_mesh_is_growth_on_one_device(grown, text, tmp_path):
    schedule = grown.parent / "schedule.json"
    more = ("--mesh", "data=2,tensor=2", "--progress", "off")
    assert main(_argv(text, tmp_path / "run", schedule, STEPS, *more)) == 0
    one, many = (_lines(run) for run in (grown, tmp_path / "run"))
    for name in ("train/loss", "val/loss", "val/loss_after"):
        values = [[line[name] for line in lines if name in line] for lines in (one, many)]
        np.testing.assert_allclose(*values, rtol=1e-4)


RETRIED = [
    _entry("widen_mlp", 2, None, 3, again=True),
    _entry("change_lr", 0.5, ALWAYS, None),  # on the loss measured again
]


def test_a_failed_operation_leaves_the_run_as_it_was_and_is_tried_first_on_resume(
    text, tmp_path, capsys, monkeypatch
):
    def too_large(*args, **kwargs):
        raise MemoryError("out of memory")

    def argv(name: str, rows: list[dict] = RETRIED, *more: str) -> list[str]:
        return _argv(text, tmp_path / name, _write(tmp_path, rows), 3, *more)

    assert main(argv("whole")) == 0
    with monkeypatch.context() as patch:
        patch.setitem(MORPHS, "widen_mlp", too_large)
        capsys.readouterr()
        assert main(argv("failed")) == 1
        said = capsys.readouterr().err
    assert "operation 1 of the schedule, widen_mlp 2, could not be done: out of memory" in said
    assert f"last good checkpoint is {tmp_path / 'failed' / 'checkpoints' / '3'}" in said
    assert _lines(tmp_path / "failed", "operations.jsonl") == []
    for name in ("killed", "removed"):
        shutil.copytree(tmp_path / "failed", tmp_path / name)

    train_until_killed(argv("killed"), "operation_recorded:1")
    for name in ("failed", "killed"):
        assert main(argv(name)) == 0
        assert _sha256(tmp_path / name, 3) == _sha256(tmp_path / "whole", 3)
        for file in ("metrics.jsonl", "operations.jsonl"):
            runs = [_timeless(_lines(tmp_path / run, file)) for run in ("whole", name)]
            assert runs[0] == runs[1]
        assert main(argv(name)) == 0
        assert "finished: step 3 of 3" in capsys.readouterr().out
    assert main(argv("removed", [], "--allow_schedule_change")) == 0
    assert _lines(tmp_path / "removed", "operations.jsonl") == []


def test_a_morph_that_would_not_be_finite_is_not_done(text, tmp_path):
    """The live state cannot be widened: it is left as it is, every bit of it."""
    schedule = _write(tmp_path, [_entry("widen_mlp", 2, None, 1)])
    settings, _ = resolve(_argv(text, tmp_path / "run", schedule, 4))
    mesh = make_mesh(parse_mesh("data=1"))
    plan = make_plan(settings, MeshShape(**mesh.shape))
    compiler = StageCompiler(plan, mesh, _validation_specs, Tables())
    state = compiler.initial_state()
    up = state.params["blocks"]["mlp"]["up"]
    state.params["blocks"]["mlp"]["up"] = up.at[0, 3, 5].set(np.inf)
    before = {path: np.array(leaf) for path, leaf in leaves_by_path(state).items()}
    probe = np.zeros((4, 16), np.int32)
    with pytest.raises(ValueError, match="would not be finite"):
        perform(compiler, state, Position(step=1), "timeout", probe)
    for path, leaf in leaves_by_path(state).items():
        np.testing.assert_array_equal(np.array(leaf), before[path])


@pytest.mark.parametrize(("available", "expected"), [(None, []), (1000, []), (1 << 40, [1])])
def test_what_leads_to_a_stage_runs_beforehand_where_memory_is_plenty(
    available, expected, text, tmp_path, monkeypatch
):
    settings, _ = resolve(
        _argv(text, tmp_path / "run", _write(tmp_path, [_entry("set_seq_len", 8, None, 1)]), 4)
    )
    mesh = make_mesh(parse_mesh("data=1"))
    plan = make_plan(settings, MeshShape(**mesh.shape))
    monkeypatch.setattr("jaxmorph.training.stages.available_memory", lambda: available)
    ran = []

    class Compiler(StageCompiler):
        def _compile_change(self, index):
            change = super()._compile_change(index)

            def morph(state):
                ran.append(index)
                return change.morph(state)

            return dataclasses.replace(change, morph=morph)

    compiler = Compiler(plan, mesh, _validation_specs, Tables())
    compiler.prefetch_after(0)
    compiler.wait()  # raises what the work raised
    compiler.close()
    assert ran == expected


@pytest.mark.skipif(sys.platform != "linux", reason="known on Linux alone")
def test_available_memory_is_some_of_the_machine_s():
    available = available_memory()
    assert available is not None
    assert 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


STANDING = [
    _entry("change_lr", 0.5, None, None, again=True) | {"trigger_plateau": 2},
    _entry("set_batch_size", 8, None, 9) | {"trigger_plateau": 1},  # of the loss measured again
    _entry("change_lr", 0.5, None, None) | {"trigger_plateau": 2},  # the first is the best
]


def test_a_loss_that_stands_still_sets_operations_off_also_of_a_resumed_run(text, tmp_path, capsys):
    schedule = _write(tmp_path, STANDING)
    more = ("--plateau_min_change", "0.9", "--eval_interval", "2")  # so that nothing improves
    for steps in (3, 7, 12):
        assert main(_argv(text, tmp_path / "run", schedule, steps, *more)) == 0
    records = _lines(tmp_path / "run", "operations.jsonl")
    # Evaluations are at even steps, and at 3 and 7, where the run ended.
    assert [(r["step"], r["reason"]) for r in records] == [
        *((3, "plateau"), (4, "plateau"), (8, "plateau")),
    ]
    printed = capsys.readouterr().out
    assert "Trigger: no more improvement (validation loss" in printed
    assert "; 2 of 2 evaluations without improvement; " in printed


LORA = ("--attn_lora_rank_divisor", "4", "--vocab_lora_rank_divisor", "8")
AROUND = [
    _entry("stack_layers", 2, None, 3, again=True, recipe="identity"),
    _entry("widen_mlp", 2, None, 3, again=True),
    _entry("merge_lora_weights", None, None, 3, again=True),
]
POINTS = ["step:3", "during_operation:1", "after_arrays:2"]


def test_killed_around_operations_and_resumed_is_the_same_run(text, tmp_path):
    schedule = _write(tmp_path, AROUND)
    whole, killed = (
        _argv(text, tmp_path / name, schedule, 12, *LORA) for name in ("whole", "killed")
    )
    assert main(whole) == 0
    for point in POINTS:
        train_until_killed(killed, point)
    assert main(killed) == 0
    assert _sha256(tmp_path / "killed", 12) == _sha256(tmp_path / "whole", 12)
    for name in ("metrics.jsonl", "operations.jsonl"):
        runs = [_timeless(_lines(tmp_path / run, name)) for run in ("whole", "killed")]
        assert runs[0] == runs[1]


def _timeless(lines: list[dict]) -> list[dict]:
    times = ("step_seconds", "seconds", "compile_wait_seconds")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]
