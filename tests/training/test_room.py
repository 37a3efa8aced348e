"""Operations that may need more memory than there is: saved before, named, tried again."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_runs import TINY_GPT, write_text

from jaxmorph.config.mesh import parse_mesh
from jaxmorph.config.resolve import resolve
from jaxmorph.growth.plan import make_plan
from jaxmorph.step.sharding import make_mesh
from jaxmorph.train import main
from jaxmorph.training import room
from jaxmorph.training.stages import StageCompiler
from jaxmorph.training.tables import Tables

TINY = [
    *(*TINY_GPT, "--progress", "lines", "--warmup_steps", "0"),
    *("--eval_interval", "4", "--eval_iters", "1", "--max_steps", "6", "--keep_checkpoints", "1"),
    *("--precompile", "off"),
]
# The first between two saves, the second at an evaluation, which saves.
SCHEDULE = [
    {"name": "widen_mlp", "value": 2, "max_wait_iters": 3, "reevaluate": True},
    {"name": "stack_layers", "value": 2, "trigger_loss": 1e3, "reevaluate": False},
    {"name": "change_lr", "value": 0.5, "max_wait_iters": 1, "reevaluate": False},
]
# The command on a machine whose memory is all but taken.
SHORT_OF_MEMORY = """
import sys
from jaxmorph.train import main
from jaxmorph.training import room
room.available_memory = lambda: 1000
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, a schedule, and a run with all the memory it wants."""
    made = tmp_path_factory.mktemp("room")
    write_text(made / "text.txt")
    (made / "schedule.json").write_text(json.dumps(SCHEDULE))
    assert main(_argv(made, "whole")) == 0
    return made


def _argv(folder: Path, name: str) -> list[str]:
    argv = [*TINY, "--data", str(folder / "text.txt"), "--run_dir", str(folder / name)]
    return [*argv, "--scaling_schedule_file", str(folder / "schedule.json")]


def _result(run_dir: Path) -> tuple:
    """All a run leaves that does not tell the time."""
    times = ("step_seconds", "seconds", "compile_wait_seconds")
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key not in times}
            for line in (run_dir / name).read_text().splitlines()
        ]
        for name in ("metrics.jsonl", "operations.jsonl")
    ]
    manifest = json.loads((run_dir / "checkpoints/6/manifest.json").read_text())
    return manifest["state_sha256"], *logs


def _steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


def test_saving_before_every_morph_changes_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(room, "available_memory", lambda: 1000)
    assert main(_argv(folder, "short")) == 0
    assert _result(folder / "short") == _result(folder / "whole")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in said] == [
        "step 3: operation 1, widen_mlp 2, begins",
        "step 3: operation 2, stack_layers 2, begins",
    ]
    # At one step one checkpoint will do.
    assert ["checkpoint 3 is saved" in line for line in said] == [True, False]
    best = [step for step in _steps(folder / "short") if step not in (0, 6)]
    assert best in ([], [3], [4])


def test_killed_by_an_operation_nothing_is_lost_and_it_is_tried_again(folder):
    """By the second at its step, so that both are done again."""
    argv, run_dir = _argv(folder, "killed"), folder / "killed"
    process = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, *argv],
        env=os.environ | {"JAXMORPH_CRASH_AT": "during_operation:2"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert process.stderr.splitlines()[-1] == "step 3: operation 2, stack_layers 2, begins"
    assert _steps(run_dir) == [
        0,
        3,
    ]  # of the three steps none is lost, and what came before is there
    assert main(argv) == 0
    assert _result(run_dir) == _result(folder / "whole")


@pytest.mark.parametrize(("free", "expected"), [(None, True), (3.9, True), (4.1, False)])
@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2"])
def test_a_state_is_large_beside_a_quarter_of_what_is_free(
    free, expected, mesh, folder, monkeypatch
):
    """Held against the arrays there will be, on all devices of the host together."""
    settings, _ = resolve([*_argv(folder, "unused"), "--mesh", mesh])
    plan, devices = make_plan(settings, None), make_mesh(parse_mesh(mesh))
    programs = StageCompiler(plan, devices, lambda shape: [], Tables()).uncompiled(1)
    state, places = (
        jax.tree.leaves((each.params, each.opt_state))
        for each in (programs.abstract_state, programs.state_shardings)
    )
    size = sum(
        leaf.dtype.itemsize * devices.size * math.prod(place.shard_shape(leaf.shape))
        for leaf, place in zip(state, places, strict=True)
    )
    monkeypatch.setattr(room, "available_memory", lambda: free and int(free * size))
    assert room.may_be_too_large(plan, devices, 1) is expected
