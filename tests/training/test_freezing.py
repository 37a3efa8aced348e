"""Layers frozen and trained again by operations of a schedule, given from outside the package."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import write_text

from jaxmorph.config.settings import Within
from jaxmorph.growth.operations import OPERATIONS, Operation, Value
from jaxmorph.morphs.gpt import MORPHS
from jaxmorph.morphs.gpt.stage import morph_gpt
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.train import main
from jaxmorph.training.tables import Tables

FREEZE, THAW, STEPS = 3, 6, 8
COUNT = Value("whole number", int, Within(low=0, high=100))


def _frozen(shape, value, options):
    return dataclasses.replace(shape, frozen_layers=tuple(range(value)))


TABLES = Tables(
    operations={
        **OPERATIONS,
        "freeze_layers": Operation(
            "freeze_layers",
            "morph",
            COUNT,
            "Train all but the first layers.",
            _frozen,
            recompiles=True,
        ),
    },
    morphs={**MORPHS, "freeze_layers": lambda transition: morph_gpt(transition, [])},
)


def _train(folder: Path, steps: int = STEPS) -> None:
    text, schedule = folder / "text.txt", folder / "schedule.json"
    write_text(text, bottles=200)
    rows = [
        ("freeze_layers", 1, FREEZE),
        ("widen_mlp", 2, 1),
        ("freeze_layers", 0, THAW - FREEZE - 1),
    ]
    schedule.write_text(
        json.dumps(
            [{"name": n, "value": v, "max_wait_iters": w, "reevaluate": True} for n, v, w in rows]
        )
    )
    argv = [
        *("--data", str(text), "--run_dir", str(folder / "run"), "--max_steps", str(steps)),
        *("--n_layers", "2", "--d_model", "16", "--n_heads", "2", "--seq_len", "16"),
        *("--batch_size", "4", "--mesh", "data=1", "--progress", "off", "--eval_iters", "1"),
        *("--eval_interval", "20", "--checkpoint_interval", "1", "--keep_checkpoints", "20"),
        *("--scaling_schedule_file", str(schedule), "--precompile", "off", "--scan_layers", "scan"),
        *("--scheduler", "constant", "--warmup_steps", "1"),
    ]
    assert main(argv, TABLES) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose first layer is frozen for a while, in which it also grows."""
    folder = tmp_path_factory.mktemp("freezing")
    _train(folder)
    return folder / "run"


def _leaf(run: Path, step: int, end: str) -> np.ndarray:
    manifest = json.loads((run / f"checkpoints/{step}/manifest.json").read_text())
    (path,) = [path for path in manifest["leaves"] if path.endswith(end)]
    dtype, shape = manifest["leaves"][path][:2]
    abstract = {path: jax.ShapeDtypeStruct(tuple(shape), dtype)}
    return np.asarray(
        Checkpoints(run / "checkpoints", 20, True).restore(step, abstract, part=True)[path]
    )


@pytest.mark.parametrize("name", ["attention/query", "mlp/up"])
def test_a_frozen_layer_keeps_every_bit_and_the_other_trains(name, run):
    before, during, after, end = (
        _leaf(run, step, f"params/blocks/{name}") for step in (3, 5, 6, 8)
    )
    units = before.shape[-1]
    np.testing.assert_array_equal(during[0][..., :units], before[0])
    np.testing.assert_array_equal(after[0][..., :units], before[0])
    assert (during[1][..., :units] != before[1]).all()
    assert (end[0] != after[0]).all()


def test_the_optimizer_has_moments_of_trained_layers_alone(run):
    full, frozen, thawed = (_leaf(run, step, "mu/blocks/mlp/up") for step in (2, 5, 6))
    assert (full.shape[0], frozen.shape[0], thawed.shape[0]) == (2, 1, 2)
    assert (frozen != 0).all()
    assert not thawed[0].any()  # begins again; the other layer's moments stay
    np.testing.assert_array_equal(thawed[1], _leaf(run, 6, "mu/blocks/mlp/up")[1])
    assert thawed[1].any()


def test_a_run_resumed_between_the_two_is_the_same_run(run, tmp_path):
    _train(tmp_path, steps=5)
    _train(tmp_path)
    digests = [
        json.loads((each / f"checkpoints/{STEPS}/manifest.json").read_text())["state_sha256"]
        for each in (run, tmp_path / "run")
    ]
    assert digests[0] == digests[1]
