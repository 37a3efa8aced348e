"""Settings from flags and YAML: what is accepted, what is refused, and that a run can be repeated."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxmorph.cli.errors import InputError
from jaxmorph.config.checks import check_warmup, checked_total
from jaxmorph.config.fields import fields_of, values_of
from jaxmorph.config.mesh import MeshShape, parse_mesh
from jaxmorph.config.resolve import resolve
from jaxmorph.config.settings import Settings
from jaxmorph.config.settings_file import to_yaml
from jaxmorph.config.start import total_steps, warmup_steps
from jaxmorph.train import main

# what is wrong: (YAML text or flags, the words the message must hold)
MALFORMED_FILES = {
    "unknown key": ("n_layer: 4", ["n_layer", "did you mean 'n_layers'"]),
    "key of another case": ("N_Layers: 4", ["N_Layers"]),
    "text for a whole number": ("n_layers: four", ["n_layers", "'four'", "a whole number"]),
    "fraction for a whole number": ("n_layers: 4.5", ["n_layers", "4.5", "a whole number"]),
    "float-looking whole number": ("max_steps: 1e3", ["max_steps", "1000.0", "a whole number"]),
    "octal": ("max_steps: 017", ["max_steps", "'017'"]),
    "base sixty": ("max_steps: 1:30", ["max_steps", "'1:30'"]),
    "bool for a number": ("learning_rate: true", ["learning_rate", "True", "a number"]),
    "number for a bool": ("biases: 1", ["biases", "true or false"]),
    "yes for a bool": ("biases: yes", ["biases", "'yes'", "true or false"]),
    "null where a value must be": ("n_heads: null", ["n_heads", "null"]),
    "a list": ("n_layers: [1, 2]", ["n_layers", "[1, 2]"]),
    "a mapping": ("model: {n_layers: 4}", ["model", "a known flag name"]),
    "not a number": ("learning_rate: .nan", ["learning_rate", "nan", "a finite number"]),
    "infinity": ("learning_rate: .inf", ["learning_rate", "inf", "a finite number"]),
    "overflow": ("learning_rate: 1e999", ["learning_rate", "inf", "a finite number"]),
    "negative": ("learning_rate: -1e-3", ["learning_rate", "-0.001", "> 0"]),
    "layers below zero": ("n_layers: -1", ["n_layers", "-1", "≥ 0"]),
    "too large": ("max_steps: 99999999999", ["max_steps", "99999999999", "≤"]),
    "dropout of one": ("dropout: 1.0", ["dropout", "1.0", "< 1"]),
    "beta above one": ("beta2: 1.5", ["beta2", "1.5", "< 1"]),
    "ratio above one": ("min_lr_ratio: 2", ["min_lr_ratio", "2.0", "≤ 1"]),
    "no validation": ("val_fraction: 0.0", ["val_fraction", "0.0", "> 0"]),
    "unknown choice": ("optimizer: adam", ["optimizer", "'adam'", "adamw"]),
    "unknown scheduler": ("scheduler: cosin", ["scheduler", "'cosin'", "cosine"]),
    "heads do not divide": (
        "d_model: 100\nn_heads: 3",
        ["n_heads", "3", "divisor of d_model (100)"],
    ),
    "odd rotary heads": ("d_model: 9\nn_heads: 3\npositions: rotary", ["n_heads", "even"]),
    "steps and epochs": ("max_steps: 10\nnum_epochs: 2", ["num_epochs", "not both"]),
    "warmup past the end": (
        "max_steps: 1760\nwarmup_steps: 2000",
        ["warmup_steps", "2000", "1760"],
    ),
    "warmup at the end": ("max_steps: 100\nwarmup_steps: 100", ["warmup_steps", "100"]),
    "no minimum to fall to": ("scheduler: exponential\nmin_lr_ratio: 0", ["min_lr_ratio"]),
    "missing data": ("data: nowhere.txt", ["data", "nowhere.txt", "existing file"]),
    "missing tokenizer": ("tokenizer: bytes", ["tokenizer", "did you mean 'byte'"]),
    "unknown mesh axis": ("mesh: dat=2", ["mesh", "dat=2", "did you mean 'data'"]),
    "mesh without sizes": ("mesh: data", ["mesh", "whole number"]),
    "mesh axis twice": ("mesh: data=2,data=2", ["mesh", "each axis once"]),
    "batch not divisible": ("mesh: data=3\nbatch_size: 16", ["batch_size", "16", "(3)"]),
    "cudnn in float32": ("attention: cudnn", ["attention", "bfloat16"]),
    "equal keys": ("n_layers: 4\nn_layers: 5", ["line 2", "n_layers", "line 1"]),
    "alias": ("data: &a stdlib\ntokenizer: *a", ["line 2", "alias"]),
    "not YAML": ("n_layers: [4", ["valid YAML"]),
    "tab": ("\tn_layers: 4", ["valid YAML"]),
    "not a mapping": ("- n_layers", ["list", "mapping"]),
    "only text": ("hello", ["str", "mapping"]),
    "two documents": ("n_layers: 4\n---\nn_layers: 5", ["valid YAML"]),
    "python object": ("data: !!python/object:os.system x", ["valid YAML"]),
    "config in a config": ("config: other.yaml", ["config"]),
    "number as key": ("4: 5", ["4", "a known flag name"]),
    "endless nesting": ("[" * 5000, ["nested too deep"]),
    "endless number": (f"max_steps: {'9' * 5000}", ["too long"]),
}
MALFORMED_FLAGS = {
    "unknown": (["--n_layer", "4"], ["--n_layer", "did you mean '--n_layers'"]),
    "wrong type": (["--n_layers", "four"], ["--n_layers", "four"]),
    "range": (["--n-heads", "0"], ["--n_heads", "0", "≥ 1"]),
    "no value": (["--n_layers"], ["--n_layers", "value"]),
    "stray word": (["4"], ["'4'"]),
    "not a number": (["--learning_rate", "nan"], ["--learning_rate", "nan", "finite"]),
    "missing file": (["--config", "nowhere.yaml"], ["nowhere.yaml", "readable file"]),
    "folder as file": (["--config", "."], ["readable file"]),
    "reserved": (["--gradual_finetuning"], ["--gradual_finetuning", "known flag"]),
    "schedule": (
        ["--scaling_schedule_file", "x.json"],
        ["--scaling_schedule_file", "existing file"],
    ),
    "start divisor": (
        ["--n_layers", "6", "--n_layer_divisor", "4"],
        ["--n_layer_divisor", "4.0", "6 / 4 = 1.5", "2 gives 3", "6 gives 1"],
    ),
    "rank divisor": (
        ["--d_model", "96", "--n_heads", "4", "--attn_lora_rank_divisor", "5"],
        ["--attn_lora_rank_divisor", "5.0", "96 / 5 = 19.2"],
    ),
    "rank above the width": (
        ["--vocab_lora_rank_divisor", "0.5"],
        ["--vocab_lora_rank_divisor", "0.5", "at most d_model (384)"],
    ),
    "start multiplier": (
        ["--batch_size_multiplier", "1e9"],
        ["--batch_size_multiplier", "at most 2147483647"],
    ),
    "curve without a dry run": (["--simulate_loss", __file__], ["--simulate_loss", "dry_run"]),
    "file as folder": (["--run_dir", __file__], ["--run_dir", "folder"]),
}


def _refusal(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("case", MALFORMED_FILES)
def test_malformed_file_is_one_message_naming_file_and_field(case, tmp_path, capsys):
    text, words = MALFORMED_FILES[case]
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    message = _refusal(["--config", str(path)], capsys)
    assert str(path) in message
    for word in words:
        assert word in message
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("case", MALFORMED_FLAGS)
def test_malformed_flag_is_one_message_naming_it(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, words = MALFORMED_FLAGS[case]
    message = _refusal(argv, capsys)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_undecodable_file_is_refused(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"n_layers: \xff\xfe")
    assert "UTF-8" in _refusal(["--config", str(path)], capsys)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 3e-4", "learning_rate", 3e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("learning_rate: 1.5E-3", "learning_rate", 1.5e-3),
        ("num_epochs: 2", "num_epochs", 2.0),
        ("biases: false", "biases", False),
        ("d_ff: null", "d_ff", None),
        ("data: 'stdlib'", "data", "stdlib"),
        ("", "n_layers", 6),
    ],
)
def test_yaml_values_are_what_they_plainly_are(text, name, value, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    found = values_of(resolve(["--config", str(path)])[0])[name]
    assert found == value
    assert type(found) is type(value)


def test_flag_beats_file_beats_default(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("n_layers: 3\nseq_len: 32\n")
    values = values_of(resolve(["--config", str(path), "--n-layers", "2"])[0])
    assert (values["n_layers"], values["seq_len"], values["n_heads"]) == (2, 32, 6)


def test_paths_in_a_file_resolve_against_it_and_on_flags_against_here(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "text.txt").write_text("words")
    path = tmp_path / "configs" / "settings.yaml"
    path.write_text("data: ../text.txt\nrun_dir: out\n")
    monkeypatch.chdir(tmp_path)
    values = values_of(resolve(["--config", "configs/settings.yaml"])[0])
    assert values["data"] == str(tmp_path / "text.txt")
    assert values["run_dir"] == str(tmp_path / "configs" / "out")
    values = values_of(resolve(["--config", "configs/settings.yaml", "--run_dir", "out"])[0])
    assert values["run_dir"] == str(tmp_path / "out")


def test_written_settings_read_back_as_the_same(tmp_path):
    argv = ["--learning_rate", "3e-4", "--no_biases", "--positions", "rotary", "--mesh", "data=2"]
    settings, _ = resolve([*argv, "--run_dir", str(tmp_path / "run"), "--d_ff", "100"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    again, _ = resolve(["--config", str(path)])
    assert values_of(again) == values_of(settings)


@pytest.mark.parametrize(
    "text",
    ["1e3", "017", "1:30", "yes", "~", "", "0x1", "1_0", ".inf", "a: b", "\x1b", "\u2028", "é"],
)
def test_text_that_looks_like_something_else_is_written_as_text(text, tmp_path):
    settings, _ = resolve(["--wandb_project", text])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    assert resolve(["--config", str(path)])[0].run.wandb_project == text
    assert yaml.safe_load(path.read_text())["wandb_project"] == text


def test_every_flag_is_in_the_help(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert [name for name in fields_of(Settings) if f"--{name}" not in printed] == []


def test_help_and_refusals_import_no_jax():
    code = """
import resource, sys
from jaxmorph.train import main
assert main(["--help"]) == 0
assert main(["--n_layers", "-1"]) == 2
assert main(["--dry_run"]) == 0
heavy = {"jax", "flax", "optax", "orbax", "grain", "matplotlib", "torch"} & set(sys.modules)
assert not heavy, heavy
usage = resource.getrusage(resource.RUSAGE_SELF)
assert usage.ru_utime + usage.ru_stime < 1.0, usage
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_dry_run_shows_the_schedule_and_writes_nothing(tmp_path, capsys):
    run_dir = tmp_path / "run"
    argv = [
        "--dry_run",
        "--run_dir",
        str(run_dir),
        "--max_steps",
        "1000",
        "--learning_rate",
        "3e-3",
    ]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    for line in (
        "Max learning rate: 0.003",
        "Warmup steps: 50",
        "Total training steps: 1000",
        "Min LR (at end): 3.00e-04",
        "Schedule: Linear warmup + Cosine decay",
    ):
        assert line in printed
    assert not run_dir.exists()


def test_epochs_become_steps_by_the_starting_batch():
    settings, sources = resolve(
        ["--num_epochs", "2.5", "--batch_size", "8", "--grad_accum_steps", "2"]
    )
    assert total_steps(settings, None) is None
    assert total_steps(settings, 1000) == int(2.5 * 1000 / 16)
    assert warmup_steps(settings, 1999) == 99  # 5 %, floored
    settings, sources = resolve(["--num_epochs", "1", "--warmup_steps", "100"])
    with pytest.raises(InputError, match="--warmup_steps: got 100"):
        check_warmup(settings, sources, 100)
    check_warmup(settings, sources, 101)


def test_epochs_of_more_steps_than_can_be_counted_are_refused():
    settings, sources = resolve(["--num_epochs", "2e9", "--batch_size", "1"])
    assert checked_total(settings, sources, None) is None
    assert checked_total(settings, sources, 1) == 2 * 10**9
    with pytest.raises(InputError, match=r"--num_epochs: got 2000000000.0, .* not 4e\+09"):
        checked_total(settings, sources, 2)


def test_warmup_past_the_end_can_be_permitted():
    argv = ["--max_steps", "1760", "--warmup_steps", "2000", "--allow_warmup_past_end"]
    assert resolve(argv)[0].optimizer.warmup_steps == 2000


def test_mesh_is_read_in_any_order():
    assert parse_mesh(" tensor=2, data=4") == MeshShape(data=4, fsdp=1, tensor=2)
    assert parse_mesh("") is None


def test_a_batch_is_split_over_data_and_fsdp():
    assert MeshShape(data=2, fsdp=3, tensor=5).batch_parts == 6
    assert MeshShape().batch_parts == 1


def test_shipped_configs_resolve():
    configs = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    for path in configs:
        data = ["--data", "stdlib"] if "demo" not in path.name else []
        resolve(["--config", str(path), *data])
    assert len(configs) >= 5
