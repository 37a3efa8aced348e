"""Flags parsed and refused as the contract says, whatever the width of the terminal."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from jaxmorph.cli.command_line import parse, parse_command, run_command
from jaxmorph.cli.errors import FailedError, InputError


@dataclasses.dataclass(frozen=True)
class Length:
    """How long."""

    max_steps: int | None = None
    """Steps to train."""
    learning_rate: float = 1e-3
    """Peak."""
    resume: bool = True
    """Go on."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings."""

    mode: Literal["small", "large"] = "small"
    """Size."""
    shapes: tuple[Literal["cosine", "linear"], ...] = ("cosine",)
    """Shapes."""
    level: Literal["low", "high"] | None = None
    """Level."""
    pair: tuple[int, int] = (1, 2)
    """Two numbers."""
    length: Length = dataclasses.field(default_factory=Length)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Generate text.

    More about it.
    """

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_DIR")]
    """The run folder."""
    count: int
    """How many."""
    loud: bool = False
    """Say more."""


def settings(*argv, target: object = Settings):
    return parse(target, argv, "prog", "Do it.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "runs/a/b"), "runs/a/b: No space left on device"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (FailedError("it diverged"), "it diverged"),
    ],
)
def test_what_fails_that_is_not_the_input_is_one_message_and_status_1(error, said, capsys):
    def fails():
        raise error

    assert run_command(fails) == 1
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(("number", "status"), [(28, 1), (5, 1), (13, 2), (21, 2)])
def test_a_place_refused_because_its_disk_fails_is_no_bad_input(number, status, capsys):
    def refuses():
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise InputError("--run_dir", "", "runs/a", f"a folder ({error.strerror})") from None

    assert run_command(refuses) == status
    assert capsys.readouterr().err.endswith(f"expected a folder ({os.strerror(number)})\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("command", ["lambda: print('words')", "lambda: print('words ' * 9999)"])
def test_a_full_disk_behind_stdout_is_one_message(command):
    with open("/dev/full", "w") as full:
        end = subprocess.run(
            [sys.executable, "-c", WRITES.format(command)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert end.returncode == 1
    assert end.stderr.startswith("error: ")
    assert end.stderr.endswith("No space left on device\n")
    assert end.stderr.count("\n") == 1


def test_no_flags_give_the_defaults_of_a_class_or_an_instance():
    assert settings() == Settings()
    given = Settings("large", length=Length(7, 0.5, False))
    assert settings(target=given) == given


@pytest.mark.parametrize("spelling", ["--max_steps 3", "--max-steps 3", "--max_steps=3"])
def test_flags_are_spelled_with_either_dash_and_carry_no_prefix(spelling):
    assert settings(*spelling.split()).length.max_steps == 3


def test_flags_beat_the_instance_and_leave_the_rest_of_it():
    given = Settings("large", length=Length(7, 0.5, False))
    got = settings("--resume", "--shapes", "linear", "cosine", target=given)
    assert got == Settings("large", ("linear", "cosine"), length=Length(7, 0.5, True))


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--maxsteps 3", "--maxsteps: expected a known flag (did you mean '--max_steps'?)"),
        ("--max-stepz=3", "--max-stepz: expected a known flag (did you mean '--max_steps'?)"),
        ("--no_resum", "--no_resum: expected a known flag (did you mean '--no_resume'?)"),
        ("--length.max_steps 3", "--length.max_steps: expected a known flag"),
        ("-x", "-x: expected a known flag"),
        ("--zzzzzz 1", "--zzzzzz: expected a known flag"),
        ("--max_steps abc", "--max_steps: got 'abc', expected a whole number"),
        ("--max_steps 1.5", "--max_steps: got '1.5', expected a whole number"),
        ("--learning_rate fast", "--learning_rate: got 'fast', expected a number"),
        ("--pair 1 x", "--pair: got 'x', expected a whole number"),
        ("--max_steps", "--max_steps: expected a value after it"),
        ("--max_steps --resume", "--max_steps: expected a value after it"),
        ("--mode lage", "--mode: got 'lage', expected one of small, large (did you mean 'large'?)"),
        ("--shapes cosine round", "--shapes: got 'round', expected one of cosine, linear"),
        ("--level mid", "--level: got 'mid', expected one of high, low"),
        ("--resume true", "--resume: got 'true', expected no value: --resume or --no_resume"),
        ("--resume=true", "--resume: got 'true', expected no value: --resume or --no_resume"),
        ("--no-resume 1", "--no_resume: got '1', expected no value: --resume or --no_resume"),
        ("stray", "prog: got 'stray', expected a flag before each value"),
    ],
)
def test_bad_flags_are_refused_in_one_line(monkeypatch, capfd, argv, message, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(InputError) as refused:
        settings(*argv.split())
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


COMMANDS = {"sample": Sample, "settings": Settings}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "prog: expected one of sample, settings"),
        ("sampel x", "prog: got 'sampel', expected one of sample, settings (did you mean 'sample'"),
        ("sample", "prog sample: expected RUN_DIR, --count INT as well"),
        ("sample x", "prog sample: expected --count INT as well"),
        ("sample x --count 1 y", "prog sample: got 'y', expected a flag before each value"),
        ("sample x --count 1 --load", "--load: expected a known flag (did you mean '--loud'?)"),
    ],
)
def test_bad_sub_commands_are_refused_in_one_line(argv, message):
    with pytest.raises(InputError) as refused:
        parse_command(COMMANDS, argv.split(), "prog", "Do it.")
    assert str(refused.value).startswith(message)


def test_sub_command_parses_its_own_flags():
    got = parse_command(COMMANDS, ["sample", "x", "--count", "4", "--loud"], "prog", "Do it.")
    assert got == Sample("x", 4, True)
    assert parse_command(COMMANDS, ["settings"], "prog", "Do it.") == Settings()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["-h"], ["Do it.", "sample ", "Generate text.", "settings", "All settings."]),
        (["sample", "--help"], ["usage: prog sample", "More about it.", "RUN_DIR", "--count"]),
        (["settings", "-h"], ["length options", "--max_steps", "Steps to train.", "--no_resume"]),
    ],
)
def test_help_exits_with_0_and_groups_the_flags(capsys, argv, parts):
    assert run_command(lambda: parse_command(COMMANDS, argv, "prog", "Do it.")) == 0
    shown, complaints = capsys.readouterr()
    assert [part for part in parts if part not in shown] == []
    assert complaints == ""


def test_command_reports_bad_input_with_status_2_and_nothing_else(capsys):
    def refuses():
        raise InputError("a\nb.yaml", "n_heads", 5, "a divisor of d_model (384)")

    assert run_command(refuses) == 2
    wanted = "error: a\\nb.yaml: n_heads: got 5, expected a divisor of d_model (384)\n"
    assert capsys.readouterr() == ("", wanted)


def test_command_passes_on_a_status_and_other_errors():
    assert run_command(lambda: 143) == 143
    assert run_command(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def into_a_pipe_without_a_reader(argv, both=False, unbuffered=""):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, *argv],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=writer if both else subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)


WRITES = "import sys; from jaxmorph.cli.command_line import run_command; sys.exit(run_command({}))"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "jaxmorph.train", "--help"],
        ["-m", "jaxmorph.plot", "--help"],
        ["-c", WRITES.format("lambda: print('little')")],
        ["-c", WRITES.format("lambda: print('more than a buffer ' * 10_000, flush=True)")],
    ],
)
def test_command_ends_in_silence_when_its_reader_has_left(argv, unbuffered):
    done = into_a_pipe_without_a_reader(argv, unbuffered=unbuffered)
    assert (done.returncode, done.stderr) == (141, "")


def test_command_without_a_reader_of_its_error_ends_the_same_way():
    done = into_a_pipe_without_a_reader(["-m", "jaxmorph.plot", "nonsense"], both=True)
    assert done.returncode == 141


def test_other_broken_pipes_are_not_taken_for_it(capfd):
    def writes_to_a_process_that_died():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_command(writes_to_a_process_that_died)
