"""Runs that diverge: the checkpoint they are left with, and how they go on from it."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from tiny_runs import TINY_GPT, write_text

from jaxmorph.train import main

TINY = [
    *(*TINY_GPT, "--progress", "lines", "--warmup_steps", "0"),
    *("--eval_interval", "8", "--eval_iters", "2", "--optimizer", "sgd", "--grad_clip", "0"),
    *("--learning_rate", "0.01", "--scheduler", "constant", "--max_nonfinite_steps", "7"),
]
EXPLODES_AFTER = 5
# Times 1e30, at one step.
SCHEDULE = [
    {"name": "change_lr", "value": 1e6, "max_wait_iters": EXPLODES_AFTER, "reevaluate": False},
    *[{"name": "change_lr", "value": 1e6, "trigger_loss": 1e9, "reevaluate": False}] * 4,
]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("corpus") / "text.txt")


def _argv(text: str, run_dir: Path, steps: int, interval: int) -> list[str]:
    schedule = run_dir.with_suffix(".json")
    if not schedule.exists():
        schedule.write_text(json.dumps(SCHEDULE))
    argv = [*TINY, "--data", text, "--run_dir", str(run_dir), "--max_steps", str(steps)]
    return [
        *argv,
        *("--checkpoint_interval", str(interval), "--scaling_schedule_file", str(schedule)),
    ]


def _skipped(run_dir: Path) -> list[int]:
    """Skipped updates so far, by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line.get("train/skipped", 0) for line in lines]


def _good(said: str) -> int:
    """The step of the checkpoint that a message names."""
    folder = re.search(r"last good checkpoint is (\S+):", said)
    assert folder, said
    assert (Path(folder[1]) / "manifest.json").is_file()
    return int(Path(folder[1]).name)


def _folders(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def diverged(text, tmp_path_factory) -> tuple[Path, str]:
    """A run that saved at every step and diverged after its sixth, and what it said."""
    run_dir = tmp_path_factory.mktemp("diverged") / "run"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(_argv(text, run_dir, 60, 1)) == 1
    return run_dir, said.getvalue()


def test_the_checkpoint_named_is_the_last_one_before_the_explosion(diverged):
    """Of those after it the first has skipped nothing: its parameters are past saving all the same."""
    run_dir, said = diverged
    assert "not finite in 7 steps in a row" in said
    first_skipped = _skipped(run_dir).index(1)
    exploded = first_skipped - 1  # the last update there was, after which nothing is finite
    assert _good(said) == exploded - 1 == EXPLODES_AFTER
    assert _folders(run_dir) == {"0", "5", "11.diverged", "12.diverged"}
    assert (run_dir / "report.html").is_file()


def test_the_same_command_goes_on_from_there_and_what_is_offered_gets_past(
    diverged, text, tmp_path, capsys
):
    run_dir, said = diverged
    argv = _argv(text, run_dir, 60, 1)
    assert main(argv) == 1
    again = capsys.readouterr()
    assert "Resuming at step 5." in again.out
    assert again.err == said

    offer = re.search(r"with (--scaling_schedule_file (\S+) --allow_schedule_change)", said)
    assert offer, said
    path, argv = Path(offer[2]), [*argv, *shlex.split(offer[1])]
    rows = json.loads(path.read_text())
    assert [row["value"] for row in rows] == [*[1e6] * 5, 0.5]
    path.write_text(path.read_text().replace("0.5", "1e-30"))  # what it takes here
    argv[argv.index("60")] = "9"
    assert main(argv) == 0, capsys.readouterr().err
    operations = [
        json.loads(line) for line in (run_dir / "operations.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in operations] == [EXPLODES_AFTER] * 6
    assert _skipped(run_dir) == [0] * 10
    assert _folders(run_dir) == {"0", "8", "9", "11.diverged", "12.diverged"}


@pytest.mark.parametrize("more", [1, 3], ids=["exploded", "skipping"])
def test_a_run_that_ends_with_a_loss_that_is_not_finite_has_failed(more, text, tmp_path, capsys):
    """Either only the validation loss tells, or updates were skipped too."""
    run_dir, steps = tmp_path / "run", EXPLODES_AFTER + more
    for _ in range(2 if more == 1 else 1):  # a run that has failed is not finished
        assert main(_argv(text, run_dir, steps, 1)) == 1
        said = capsys.readouterr()
        assert f"error: the run ended at step {steps} with a loss that is not finite" in said.err
        assert _good(said.err) == EXPLODES_AFTER
        assert f"{steps}.diverged" in said.err
        assert (run_dir / "checkpoints" / f"{steps}.diverged" / "manifest.json").is_file()
        assert (run_dir / "report.html").is_file()
    assert (_skipped(run_dir)[-1] > 0) == (more > 1)


def test_a_run_killed_before_it_said_that_it_failed_says_so_at_the_next_start(
    text, tmp_path, capsys
):
    run_dir, steps = tmp_path / "run", EXPLODES_AFTER + 1
    assert main(_argv(text, run_dir, steps, 1)) == 1
    said = capsys.readouterr().err
    aside = run_dir / "checkpoints" / f"{steps}.diverged"
    aside.rename(aside.with_suffix(""))  # as a kill right after the last checkpoint leaves it
    assert main(_argv(text, run_dir, steps, 1)) == 1
    again = capsys.readouterr()
    assert again.err == said
    assert "The run is finished" not in again.out
    assert aside.is_dir()
