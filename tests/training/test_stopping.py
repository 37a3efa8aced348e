"""How a run that is stopped goes on, and what is said of a schedule that did not fire to its end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import TINY_GPT, write_text

from jaxmorph.cli.typed_command import typed_command
from jaxmorph.plot import main as plot
from jaxmorph.system.signals import StopSignals
from jaxmorph.train import main

TINY = [
    *(*TINY_GPT, "--eval_interval", "4", "--eval_iters", "2", "--progress", "lines"),
]

FIRES = {"name": "change_lr", "value": 0.5, "max_wait_iters": 3, "reevaluate": False}
NEXT = {"name": "change_lr", "value": 0.125, "trigger_loss": 0.001, "trigger_plateau": 7}
LATER = {"name": "change_lr", "value": 0.25, "max_wait_iters": 5000}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("corpus") / "green bottles.txt")


def argv_of(text: str, run_dir: Path, *more: str, steps: int = 12) -> list[str]:
    return [*TINY, "--data", text, "--run_dir", str(run_dir), "--max_steps", str(steps), *more]


def steps_of(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if len(steps_of(run_dir)) > step:
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("the run did not get going")


def test_a_stopped_run_says_where_it_is_saved_and_the_command_that_goes_on(text, tmp_path, capsys):
    """With Ctrl-C; as it was typed, quoted, and fit to go on although it began with --no_resume."""
    python = [Path(sys.executable).name, "-W", "ignore", "-m", "jaxmorph.train"]
    typed = [*python, *argv_of(text, tmp_path / "a run", "--no_resume", steps=100_000)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        typed, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path / "a run", 5, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    last = steps_of(tmp_path / "a run")[-1]
    checkpoint = tmp_path / "a run" / "checkpoints" / str(last)
    assert (checkpoint / "manifest.json").is_file()
    words = f"Stopped by Ctrl-C at step {last} of 100000; checkpoint {last} is saved. To go on:\n  "
    command = said.partition(words)[2].splitlines()[0]
    assert command == f"{shlex.join(typed)} --resume"
    again = shlex.split(command)[len(python) :]
    assert main([*again, "--max_steps", str(last)]) == 0  # a shorter run, so that it ends
    assert f"Resuming at step {last}.\n" in capsys.readouterr().out


IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # standard input becomes the terminal of this session
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_run_whose_terminal_closes_is_saved(text, tmp_path):
    """The bar's own thread and every print then find that the terminal cannot be written to."""
    run_dir, output = tmp_path / "run", []
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps([FIRES]))
    argv = argv_of(text, run_dir, "--scaling_schedule_file", str(schedule), steps=100_000)
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, "-m", "jaxmorph.train", *argv, "--progress", "bar"],
        **dict.fromkeys(("stdin", "stdout", "stderr"), inside),
        start_new_session=True,
    )
    os.close(inside)
    while b"/100000" not in b"".join(output) or len(steps_of(run_dir)) < 20:
        output.append(os.read(terminal, 65536))
    os.close(terminal)
    assert process.wait(timeout=120) == 129
    steps = steps_of(run_dir)
    assert steps == list(range(len(steps)))
    assert (run_dir / "checkpoints" / str(steps[-1]) / "manifest.json").is_file()
    assert (run_dir / "report.html").is_file()
    shown = b"".join(output).decode()
    for what in ("compiling", "evaluating", "saving", "operation 1, change_lr 0.5"):
        assert f"{what} ..." in shown


def test_under_nohup_a_hangup_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert (signals.received, signals.exit_status) == (signal.SIGTERM, 143)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("sys_argv", "orig_argv", "words", "typed"),
    [
        (  # python -m: as it was typed, with the interpreter's own flags
            ["/lib/jaxmorph/train.py", "--data", "my book.txt"],
            ["python3", "-X", "dev", "-m", "jaxmorph.train", "--data", "my book.txt"],
            ["--data", "my book.txt"],
            "python3 -X dev -m jaxmorph.train --data 'my book.txt'",
        ),
        (
            ["/lib/jaxmorph/__main__.py", "train", "--seed", "1"],
            ["python", "-m", "jaxmorph", "train", "--seed", "1"],
            ["--seed", "1"],
            "python -m jaxmorph train --seed 1",
        ),
        (["t.py", "--seed", "1"], ["python", "t.py", "--seed", "1"], None, "python t.py --seed 1"),
        (  # called with words that are not the process's
            ["tune.py", "--trials", "9"],
            ["python", "tune.py", "--trials", "9"],
            ["--seed", "1"],
            "python -m jaxmorph.train --seed 1",
        ),
        (["tune.py"], ["python", "tune.py"], [], "python tune.py"),
    ],
)
def test_the_command_is_the_one_that_was_typed(sys_argv, orig_argv, words, typed, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys_argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    words = sys_argv[1:] if words is None else words
    assert typed_command(words, "jaxmorph.train") == typed


def test_an_installed_command_is_named_as_it_was_typed(tmp_path, monkeypatch):
    """The kernel starts Python with the whole path of the script, which nobody has typed."""
    script = tmp_path / "jaxmorph"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom jaxmorph.cli.typed_command import typed_command\n"
        "print(typed_command(sys.argv[2:], 'jaxmorph.train'))\n"
    )
    script.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(
        ["jaxmorph", "train", "--seed", "1"], env=environment, capture_output=True, text=True
    )
    assert said.stdout == "jaxmorph train --seed 1\n"


def test_what_has_not_fired_is_said_at_the_end_and_in_the_report(text, tmp_path, capsys):
    schedule, run_dir = tmp_path / "schedule.json", tmp_path / "run"

    def train(entries: list[dict], *more: str) -> str:
        rows = [{"reevaluate": False, **entry} for entry in entries]
        schedule.write_text(json.dumps(rows))
        flags = ["--scaling_schedule_file", str(schedule), "--plateau_min_change", "0.9", *more]
        assert main(argv_of(text, run_dir, *flags)) == 0
        return capsys.readouterr().out

    said = train([FIRES, {**NEXT, "max_wait_iters": 9000}, LATER])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    newest = lines[-1]["val/loss"]
    # Evaluations after the operation at step 3 are at 4, 8 and 12; the first sets the best.
    waits = [
        f"validation loss below 0.001 (now {newest:.4f}) or 7 evaluations without improvement "
        "(now 2) or 9,000 steps since operation 1 (now 9)",
        "operation 2, then 5,000 steps since operation 2",
    ]
    expected = (
        "The run ended before its schedule: 2 of 3 operations have not fired.\n"
        f"  2: change_lr 0.125 waits for {waits[0]}\n"
        f"  3: change_lr 0.25 waits for {waits[1]}\n"
    )
    assert expected in said
    page = (run_dir / "report.html").read_text()
    assert "Operations that had not fired by step 12" in page
    for number, operation, reason in zip(
        (2, 3), ("change_lr 0.125", "change_lr 0.25"), waits, strict=True
    ):
        row = f"<tr><td>{number}</td><td>{operation}</td><td>{reason}</td></tr>"
        assert row in page

    assert expected in train([FIRES, {**NEXT, "max_wait_iters": 9000}, LATER])  # finished
    (run_dir / "waiting.json").write_text('{"step": 12, "operations": [{"number": 2}]}')
    assert plot(["report", str(run_dir)]) == 2
    assert re.search(r"waiting\.json: expected .*operation", capsys.readouterr().err)
    said = train([FIRES], "--allow_schedule_change", "--max_steps", "13")
    assert "not fired" not in said
    assert "had not fired" not in (run_dir / "report.html").read_text()
