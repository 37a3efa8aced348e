"""A run resumed on logs that are not what its checkpoint knows: refused, or accepted and repaired."""

import json
import shutil
from pathlib import Path

import pytest
from make_old_run import LAST, OLD_RUNS, flags
from other_formats import all_bytes
from tiny_runs import SMALLEST_GPT, write_text

from jaxmorph.train import main

METRICS, OPERATIONS = "metrics.jsonl", "operations.jsonl"
TINY = [*SMALLEST_GPT, "--eval_interval", "2", "--keep_checkpoints", "9"]


def argv(run_dir, steps, *more):
    data, schedule = run_dir.parent / "text.txt", run_dir.parent / "schedule.json"
    write_text(data, bottles=40)
    fires = {"trigger_loss": None, "max_wait_iters": 1, "reevaluate": False}
    schedule.write_text(json.dumps([{"name": "change_lr", "value": 0.5, **fires}] * 2))
    files = ["--data", str(data), "--scaling_schedule_file", str(schedule)]
    return [*TINY, *files, "--run_dir", str(run_dir), "--max_steps", str(steps), *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that was left alone."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert main(argv(run_dir, 6, "--scheduler", "constant")) == 0
    assert not (run_dir / "heads.jsonl").exists()  # its heads stay as they are
    return run_dir


@pytest.fixture
def run_dir(whole, tmp_path):
    """The same run, killed after its fourth step."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "6")
    (run_dir / "report.html").unlink()
    return run_dir


def goes_on(run_dir, *more):
    return main(argv(run_dir, 6, "--scheduler", "constant", *more))


def timeless(run_dir, name=METRICS):
    lines = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    times = ("step_seconds", "seconds", "compile_wait_seconds")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def state(run_dir):
    return json.loads((run_dir / "checkpoints/6/manifest.json").read_text())["state_sha256"]


def lines_without(*gone):
    return lambda lines: [line for number, line in enumerate(lines) if number not in gone]


def line(number, text):
    return lambda lines: [*lines[:number], text, *lines[number + 1 :]]


DAMAGE = {
    "first line": (METRICS, lines_without(0), "4 of the 5 lines up to step 4"),
    "middle line": (METRICS, lines_without(2), "4 of the 5 lines up to step 4"),
    "last line": (METRICS, lines_without(4, 5, 6), "4 of the 5 lines up to step 4"),
    "everything": (METRICS, lambda lines: [], "0 of the 5 lines up to step 4"),
    "the file": (METRICS, None, "0 of the 5 lines up to step 4"),
    "a number": (METRICS, line(3, '{"step": 3, "train/loss": 1}\n'), "5 lines up to step 4, some"),
    "twice": (METRICS, lambda lines: [*lines[:2], *lines[1:]], "5 lines up to step 4, others betw"),
    "no JSON": (METRICS, line(2, "oops\n"), "4 of the 5 lines up to step 4"),
    "no object": (METRICS, line(2, "[1]\n"), "4 of the 5 lines up to step 4"),
    "step in words": (METRICS, line(2, '{"step": "two"}\n'), "4 of the 5"),
    "no step": (METRICS, line(2, "{}\n"), "4 of the 5"),
    "deep": (METRICS, line(2, "[" * 100_000 + "\n"), "4 of the 5"),
    "an operation": (OPERATIONS, lines_without(0), "1 of the 2 lines up to step 4"),
    "no index": (OPERATIONS, line(1, '{"index": null}\n'), "1 of the 2 lines up to step 4"),
}


def damage(run_dir, name):
    file, change, said = DAMAGE[name]
    path = Path(run_dir) / file
    if change is None:
        path.unlink()
    else:
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    return path, said


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_log_is_named_and_nothing_is_changed(run_dir, name, capsys):
    path, said = damage(run_dir, name)
    before = all_bytes(run_dir)
    assert goes_on(run_dir) == 2
    message = capsys.readouterr().err
    assert (message.count("\n"), message.startswith(f"error: {path}: ")) == (1, True)
    assert said in message
    assert "that checkpoint 4 knows" in message
    assert "--accept_damaged_log" in message
    after = all_bytes(run_dir)
    after["lock"] = before["lock"]
    assert after == before


@pytest.mark.parametrize(
    ("name", "kept"),
    [("middle line", [0, 1, 3, 4]), ("the file", [])],
)
def test_an_accepted_log_is_gone_on_with_and_the_damaged_one_kept(
    whole, run_dir, name, kept, capsys
):
    path, said = damage(run_dir, name)
    damaged = path.read_bytes() if path.exists() else None
    assert goes_on(run_dir, "--accept_damaged_log") == 0
    output = capsys.readouterr().out
    assert f"accepted {path}: {said}" in output
    aside = run_dir / "metrics.jsonl.damaged"
    assert (aside.read_bytes() if aside.exists() else None) == damaged
    expected = timeless(whole)
    assert timeless(run_dir) == [expected[step] for step in (*kept, 5, 6)]
    assert timeless(run_dir, OPERATIONS) == timeless(whole, OPERATIONS)
    assert state(run_dir) == state(whole)
    assert (run_dir / "report.html").exists()
    assert goes_on(run_dir) == 0  # the new checkpoint knows the log as it is now
    assert "The run is finished" in capsys.readouterr().out


def test_an_accepted_damage_that_the_checkpoint_still_knows_is_repaired_once(run_dir, capsys):
    damage(run_dir, "middle line")
    (run_dir / "schedule.json").unlink()
    for _ in range(2):
        command = [*argv(run_dir, 4, "--scheduler", "constant"), "--accept_damaged_log"]
        assert main(command) == 0
        assert "The run is finished: step 4 of 4" in capsys.readouterr().out
    assert [path.name for path in run_dir.glob("*.damaged*")] == ["metrics.jsonl.damaged"]
    assert [line["step"] for line in timeless(run_dir)] == [0, 1, 3, 4]


def test_what_follows_the_checkpoint_is_cut_whatever_it_is(whole, run_dir):
    for name in (METRICS, OPERATIONS):
        with open(run_dir / name, "a") as file:
            file.write('oops\n[1]\n{"step": "x"}\n{"st')
    assert goes_on(run_dir) == 0
    for name in (METRICS, OPERATIONS):
        assert timeless(run_dir, name) == timeless(whole, name)


def test_a_checkpoint_of_format_2_knows_no_digest_and_its_odd_lines_are_refused(tmp_path, capsys):
    odd = tmp_path / "odd"
    shutil.copytree(OLD_RUNS / "format_2", odd)
    damage(odd / "run", "step in words")
    assert main(flags(odd, LAST)) == 2
    path = odd / "run" / METRICS
    said = f"error: {path}: step: got 'two', expected a whole number in every line\n"
    assert capsys.readouterr().err == said
