"""Settings of heads: which of them go together, and what is refused with which fix."""

import json
import subprocess
import sys

import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.config.checks import checked_total
from jaxmorph.config.fields import values_of
from jaxmorph.config.heads import profile_values
from jaxmorph.config.resolve import resolve
from jaxmorph.config.settings_file import to_yaml
from jaxmorph.train import main

RATES, CONTROLLER = ["--enable_head_lr"], ["--enable_controller"]
LONG = ["--max_steps", "1000"]
# flags: the words that the message must hold
REFUSED = {
    "rates alone": (["--head_lr_boost", "3"], ["--head_lr_boost: got 3.0", "--enable_head_lr"]),
    "a rate's default alone": (["--head_lr_adaptive", "off"], ["--enable_head_lr with it"]),
    "profile alone": (["--head_lr_profile", "prune"], ["--head_lr_profile", "--enable_head_lr"]),
    "controller's alone": (["--controller_lr", "2"], ["--controller_lr", "--enable_controller"]),
    "l1 alone": (["--gate_l1", "0.1"], ["--gate_l1: got 0.1", "--enable_controller"]),
    "its limit alone": (
        ["--max_pruned_heads", "0.5"],
        ["--max_pruned_heads: got 0.5", "no effect"],
    ),
    "its minimum alone": (["--min_controller_lr", "0.2"], ["--enable_controller"]),
    "cooldown before warmup": (
        [*RATES, "--head_lr_cooldown", "100"],
        ["--head_lr_cooldown: got 100", "more than the 200 steps of head_lr_warmup"],
    ),
    "cooldown at warmup": (
        [*RATES, "--head_lr_warmup", "9", "--head_lr_cooldown", "9"],
        ["--head_lr_cooldown: got 9", "more than the 9"],
    ),
    "warmup past the profile's cooldown": (
        [*RATES, "--head_lr_profile", "finetune", "--head_lr_warmup", "400"],
        ["--head_lr_warmup: got 400", "fewer than the 400 steps of head_lr_cooldown"],
    ),
    "no boost": ([*RATES, "--head_lr_boost", "0"], ["--head_lr_boost", "> 0"]),
    "a boost below nothing": ([*RATES, "--head_lr_boost", "-1"], ["--head_lr_boost", "> 0"]),
    "decay of one": ([*RATES, "--head_lr_decay", "1"], ["--head_lr_decay", "> 0 and < 1"]),
    "decay of nothing": ([*RATES, "--head_lr_decay", "0"], ["--head_lr_decay", "> 0 and < 1"]),
    "importance without measurements": (
        [*RATES, "--head_lr_adaptive", "importance"],
        ["--head_lr_adaptive: got 'importance'", "--enable_controller with it", "layer"],
    ),
    "more heads than there are": (
        [*CONTROLLER, *LONG, "--min_heads_per_layer", "7"],
        ["--min_heads_per_layer: got 7", "at most n_heads (6)"],
    ),
    "limits against each other": (
        [*CONTROLLER, *LONG, "--min_heads_per_layer", "5"],
        ["--max_pruned_heads: got 0.3", "at most 0.167", "keeps 5 of the 6"],
    ),
    "smallest step above the largest": (
        [*CONTROLLER, *LONG, "--controller_lr", "0.05"],
        ["--min_controller_lr: got 0.1", "at most controller_lr (0.05)"],
    ),
    "controller after the end": (
        [*CONTROLLER, "--max_steps", "500"],
        ["--controller_warmup: got 500", "fewer than the 500 steps"],
    ),
    "all heads": ([*CONTROLLER, "--max_pruned_heads", "1"], ["--max_pruned_heads", "< 1"]),
}
ACCEPTED = {
    "the profile's cooldown with its warmup": [*RATES, "--head_lr_profile", "prune"],
    "a warmup below the profile's cooldown": [*RATES, "--head_lr_warmup", "999"],
    "boosts by layer": [*RATES, "--head_lr_adaptive", "layer"],
    "boosts as measured": [*RATES, *CONTROLLER, *LONG, "--head_lr_adaptive", "gradient"],
    "what operations read": ["--controller_batches", "2", "--min_heads_per_layer", "2"],
    "limits that just agree": [
        *(*CONTROLLER, *LONG, "--n_heads", "6", "--min_heads_per_layer", "3"),
        *("--max_pruned_heads", "0.5"),
    ],
    "controller before the end": [*CONTROLLER, "--max_steps", "501"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_the_fix(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, words = REFUSED[case]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    for word in words:
        assert word in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_works_is_accepted_and_can_be_repeated(case, tmp_path):
    """A run's config.yaml holds every setting, those at their defaults too."""
    settings, _ = resolve(ACCEPTED[case])
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    again, _ = resolve(["--config", str(tmp_path / "config.yaml")])
    assert values_of(again) | {"config": None} == values_of(settings) | {"config": None}


def test_a_file_with_rates_that_nothing_enables_is_refused(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("head_lr_boost: 3\n")
    with pytest.raises(InputError, match=r"settings\.yaml: head_lr_boost: got 3\.0"):
        resolve(["--config", str(file)])


def test_epochs_are_checked_once_their_length_is_known():
    settings, sources = resolve([*CONTROLLER, "--num_epochs", "1", "--batch_size", "10"])
    assert checked_total(settings, sources, 10 * 501) == 501
    with pytest.raises(InputError, match="fewer than the 500 steps of the run"):
        checked_total(settings, sources, 10 * 500)


@pytest.mark.parametrize(("operation", "works"), [("widen_heads", True), ("widen_mlp", False)])
def test_limits_are_those_of_the_most_heads_that_a_schedule_gives(
    operation, works, tmp_path, capsys
):
    """One head per layer can never close; of two one can."""
    entry = {"name": operation, "value": 2, "trigger_loss": None, "max_wait_iters": 9}
    (tmp_path / "schedule.json").write_text(json.dumps([entry | {"reevaluate": False}]))
    files = ["--scaling_schedule_file", str(tmp_path / "schedule.json"), "--dry_run"]
    assert main([*CONTROLLER, *LONG, *files, "--n_heads", "1"]) == (0 if works else 2)
    assert ("--max_pruned_heads: got 0.3, expected at most 0" in capsys.readouterr().err) != works


def test_profiles_are_defaults_that_flags_beat():
    for profile, values in {
        "pretrain": (5.0, 0.9, 200, 1000),
        "finetune": (2.0, 0.9, 50, 400),
        "prune": (3.0, 0.9, 100, 600),
    }.items():
        named, _ = resolve([*RATES, "--head_lr_profile", profile])
        assert tuple(profile_values(named.heads).values()) == values
    settings, _ = resolve([*RATES, "--head_lr_profile", "prune", "--head_lr_boost", "7"])
    assert tuple(profile_values(settings.heads).values()) == (7.0, 0.9, 100, 600)


def test_refusing_loads_no_jax():
    program = (
        "import sys; from jaxmorph.train import main; status = main(sys.argv[1:]);"
        "sys.exit(status if 'jax' not in sys.modules else 99)"
    )
    argv = [sys.executable, "-c", program, *REFUSED["limits against each other"][0]]
    assert subprocess.run(argv, capture_output=True).returncode == 2
