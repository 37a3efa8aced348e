"""A run that is extended from outside the package: by tables with one more line, and nothing else."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import write_text

from jaxmorph.growth.changes import unchanged
from jaxmorph.growth.operations import OPERATIONS, Operation, Value
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.morphs.axis_map import AxisMap
from jaxmorph.morphs.gpt import MORPHS
from jaxmorph.morphs.gpt.stage import morph_gpt
from jaxmorph.step.metrics import RUN_METRICS, Metric
from jaxmorph.step.optimizer import make_optimizer
from jaxmorph.step.parts import Parts
from jaxmorph.step.state import VARIABLES, Variable
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.train import main
from jaxmorph.training.tables import Tables
from jaxmorph.training.turns import TURNS, Turn, check_turns

STEPS, STOPPED_AT = 12, 4  # between two changes of shape
LAYERS, HEADS = 2, 2


class HeadAges(NamedTuple):
    """A leaf of an optimizer's state that mirrors no parameter: updates since a head came."""

    age: jax.Array  # int32 [L, H]


def _with_head_ages(settings, trainable):
    """The package's own optimizer, and beside it how old each head is."""

    def init(params: Any) -> HeadAges:
        layers, _, heads, _ = params["blocks"]["attention"]["query"].shape
        return HeadAges(jnp.zeros((layers, heads), jnp.int32))

    def update(updates, state, params=None, **extra):
        return updates, HeadAges(state.age + 1)

    ages = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(make_optimizer(settings, trainable), ages)


def _reverse_heads(transition) -> Any:
    """A morph: every layer's heads in the opposite order, which changes nothing of the function."""
    heads, _ = transition.sizes("head")
    return morph_gpt(transition, [AxisMap("head", heads, np.arange(heads)[::-1], np.ones(heads))])


def _census(run) -> None:
    """A turn: count its calls, raise every head's status by the number of the call, record it."""
    calls = run.recall("census", 0) + 1
    run.remember("census", calls)
    status = run.state["head_wear"]
    raised = jax.device_put(np.asarray(status) + np.int32(calls), status.sharding)
    run.state = run.state.with_variables(head_wear=raised)
    run.record({"heads/calls": calls})


def _turns(stop_once: Path | None = None) -> tuple[Turn, ...]:
    *others, save = TURNS
    census = Turn("census", lambda run: run.step % 2 == 1, _census, ("state", "position"))
    if stop_once is None:
        return (*others, census, save)

    def stop(run) -> None:
        stop_once.touch()
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = Turn("stop", lambda run: run.step == STOPPED_AT and not stop_once.exists(), stop)
    return (*others, census, stopping, save)


def _tables() -> Tables:
    return Tables(
        step=Parts(
            variables={
                **VARIABLES,
                "head_wear": Variable(NamedAxes("layer head", fresh=-100), "int32", lambda _: 0),
            },
            run_metrics=(
                *RUN_METRICS,
                Metric("heads/calls", "calls of the census", figure="census", tile=True),
                Metric("heads/status", "mean status of heads", figure="census",
                       value=lambda update: update.state["head_wear"].astype(float).mean()),
            ),
            make_optimizer=_with_head_ages,
            optimizer_fields={"age": NamedAxes("layer head", fresh=0)},
        ),
        operations={**OPERATIONS,
            "reverse_heads": Operation(
                "reverse_heads", "morph", Value("null", None), "Turn the heads round.", unchanged
            ),
            "calm_heads": Operation(
                "calm_heads", "hyperparameter", Value("null", None), "Set their status to 5.", unchanged
            ),
        },
        morphs={**MORPHS, "reverse_heads": _reverse_heads},
        adjustments={
            "calm_heads": lambda entry, state: {
                "head_wear": np.full(state["head_wear"].shape, 5)
            }
        },
    )  # fmt: skip


SCHEDULE = [
    {"name": "stack_layers", "value": 2, "max_wait_iters": 3, "options": {"order": "interleave"}},
    {"name": "widen_heads", "value": 1.5, "max_wait_iters": 2, "options": {"recipe": "fresh"}},
    {"name": "reverse_heads", "value": None, "max_wait_iters": 1},
    {"name": "calm_heads", "value": None, "max_wait_iters": 4},
]


def _train(folder: Path, turns: tuple[Turn, ...], tables: Tables | None = None) -> int:
    text, schedule = folder / "text.txt", folder / "schedule.json"
    write_text(text, bottles=200)
    schedule.write_text(json.dumps([{"reevaluate": False, **row} for row in SCHEDULE]))
    argv = [
        *("--data", str(text), "--run_dir", str(folder / "run"), "--max_steps", str(STEPS)),
        *("--n_layers", str(LAYERS), "--d_model", "16", "--n_heads", str(HEADS)),
        *("--seq_len", "16", "--batch_size", "4", "--mesh", "data=1", "--progress", "off"),
        *("--eval_interval", "6", "--eval_iters", "1", "--log_interval", "1"),
        *("--scaling_schedule_file", str(schedule), "--precompile", "off", "--scan_layers", "scan"),
    ]
    return main(argv, tables or _tables(), turns)


def _lines(run: Path, name: str) -> list[dict]:
    times = ("step_seconds", "seconds", "compile_wait_seconds")
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A run with one more of everything."""
    folder = tmp_path_factory.mktemp("extended")
    assert _train(folder, _turns()) == 0
    return folder / "run"


def _expected() -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Status and age of every head at the end, and the mean status at each step: in plain lists."""
    status = [[0] * HEADS for _ in range(LAYERS)]
    age, means, calls = [[0] * HEADS for _ in range(LAYERS)], [], 0
    for step in range(1, STEPS + 1):
        age = [[years + 1 for years in row] for row in age]
        means.append(sum(map(sum, status)) / sum(map(len, status)))
        if step == 3:  # interleaved: each layer twice
            status, age = ([list(row) for row in rows for _ in (0, 1)] for rows in (status, age))
        if step == 5:  # half as many heads more, which begin as declared
            status, age = [[*row, -100] for row in status], [[*row, 0] for row in age]
        if step == 6:
            status, age = [row[::-1] for row in status], [row[::-1] for row in age]
        if step == 10:
            status = [[5] * len(row) for row in status]
        if step % 2 == 1:
            calls += 1
            status = [[one + calls for one in row] for row in status]
    return status, age, means


def _leaf(run: Path, path: str) -> np.ndarray:
    checkpoints = Checkpoints(run / "checkpoints", 2, True)
    shape = jax.ShapeDtypeStruct((2 * LAYERS, 3 * HEADS // 2), np.int32)
    return np.asarray(checkpoints.restore(STEPS, {path: shape}, part=True)[path])


def test_leaves_over_layers_and_heads_go_where_these_go(extended):
    status, age, _ = _expected()
    np.testing.assert_array_equal(_leaf(extended, "variables/head_wear"), status)
    np.testing.assert_array_equal(_leaf(extended, "opt_state/1/age"), age)


def test_operations_and_metrics_from_outside_are_recorded(extended):
    fired = _lines(extended, "operations.jsonl")
    assert [(row["name"], row["step"]) for row in fired] == [
        *(("stack_layers", 3), ("widen_heads", 5), ("reverse_heads", 6), ("calm_heads", 10)),
    ]
    assert fired[2]["function_delta"] < 1e-5
    lines = _lines(extended, "metrics.jsonl")
    calls = [line.get("heads/calls") for line in lines[1:]]
    assert calls == [step // 2 + 1 if step % 2 else None for step in range(1, STEPS + 1)]
    np.testing.assert_allclose(
        [line["heads/status"] for line in lines[1:]], _expected()[2], rtol=1e-6
    )
    assert (extended / "census.png").exists()
    assert "Calls of the census" in (extended / "report.html").read_text()


def test_a_run_with_all_of_it_stopped_and_resumed_is_the_same_run(extended, tmp_path):
    turns = _turns(stop_once=tmp_path / "stopped")
    assert _train(tmp_path, turns) == 128 + signal.SIGTERM
    assert _lines(tmp_path / "run", "metrics.jsonl")[-1]["step"] == STOPPED_AT
    assert _train(tmp_path, turns) == 0
    digests = [
        json.loads((run / f"checkpoints/{STEPS}/manifest.json").read_text())["state_sha256"]
        for run in (extended, tmp_path / "run")
    ]
    assert digests[0] == digests[1]
    for name in ("metrics.jsonl", "operations.jsonl"):
        assert _lines(extended, name) == _lines(tmp_path / "run", name)


def test_a_turn_that_changes_what_it_does_not_name_is_stopped(tmp_path):
    def meddle(run) -> None:
        run.state = run.state.with_variables(skipped=run.state["skipped"] + 1)

    meddling = Turn("meddle", lambda run: run.step == 1, meddle, ("position",))
    with pytest.raises(
        RuntimeError, match=r"turn 'meddle' changed what it does not name: \['state'\]"
    ):
        _train(tmp_path, (meddling, *TURNS))


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ((*TURNS, Turn("late", lambda run: True, _census)), "the last one 'save'"),
        ((TURNS[0], *TURNS), "different names"),
        ((), "the last one 'save'"),
    ],
)
def test_turns_that_could_not_be_resumed_are_refused(turns, said):
    with pytest.raises(ValueError, match=said):
        check_turns(turns)


def test_tables_that_lack_a_function_are_refused():
    with pytest.raises(ValueError, match="morphs without a function: reverse_heads"):
        dataclasses.replace(_tables(), morphs=MORPHS)
    with pytest.raises(ValueError, match="adjustments of no operation: calm_head"):
        dataclasses.replace(_tables(), adjustments={"calm_head": lambda entry, state: {}})


def test_after_a_failed_operation_the_turns_behind_it_are_taken_once(extended, tmp_path):
    def fail(transition, **options):
        raise MemoryError("no memory")

    broken = dataclasses.replace(_tables(), morphs={**MORPHS, "stack_layers": fail,
                                                    "reverse_heads": _reverse_heads})  # fmt: skip
    assert _train(tmp_path, _turns(), broken) == 1
    assert _train(tmp_path, _turns()) == 0
    for name in ("metrics.jsonl", "operations.jsonl"):
        assert _lines(extended, name) == _lines(tmp_path / "run", name)
    manifests = [run / f"checkpoints/{STEPS}/manifest.json" for run in (extended, tmp_path / "run")]
    digests = [json.loads(path.read_text())["state_sha256"] for path in manifests]
    assert digests[0] == digests[1]


def test_the_tables_of_the_package_are_as_they_were():
    assert "reverse_heads" not in {**OPERATIONS, **MORPHS}
    assert "head_wear" not in VARIABLES
    names = ["control", "evaluate", "operate", "boost", "save"]
    assert [turn.name for turn in TURNS] == names
