"""Schedule files: what is refused and how, the walk over shapes, the triggers, and the digests."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from schedule_entries import GOOD, ONE, entries, entry, make_shape, without

from jaxmorph.cli.errors import InputError
from jaxmorph.config.mesh import parse_mesh
from jaxmorph.config.resolve import resolve
from jaxmorph.growth.operations import OPERATIONS
from jaxmorph.growth.plan import make_plan, walk
from jaxmorph.growth.schedule import Entry, entry_sha256, load_schedule, schedule_json
from jaxmorph.train import main

CONFIGS = Path(__file__).parents[2] / "configs"
# The second of two entries is wrong: (the entry, operation named, field named, further words).
MALFORMED_ENTRIES = {
    "unknown operation": (entry("widen_mpl"), "widen_mpl", "name", ["did you mean 'widen_mlp'"]),
    "document's old name": (entry("change_learning_rate"), "change_learning_rate", "name", []),
    "operation is a number": (entry(7), "", "name", ["got 7"]),
    "operation is null": (entry(None), "", "name", ["'null'"]),
    "operation is a list": (entry(["change_lr"]), "", "name", ["change_lr"]),
    "no name": (without("name"), "", "name", ["missing"]),
    "no value": (without("value"), "change_lr", "value", ["missing", "null"]),
    "no reevaluate": (without("reevaluate"), "change_lr", "reevaluate", ["missing"]),
    "unknown field": (entry(trigger=2.0), "change_lr", "field", ["did you mean 'trigger_loss'"]),
    "misspelt field": (entry(max_wait_iter=2), "change_lr", "field", ["'max_wait_iters'"]),
    "option outside options": (
        entry("stack_layers", 2, order="stack"), "stack_layers", "field", ["under options"],
    ),
    "text for a factor": (entry(value="2"), "change_lr", "value", ["'2'", "a number > 0"]),
    "bool for a factor": (entry(value=True), "change_lr", "value", ["True", "a number"]),
    "list for a factor": (entry(value=[2]), "change_lr", "value", ["[2]", "a number"]),
    "mapping for a factor": (entry(value={"by": 2}), "change_lr", "value", ["a number"]),
    "null for a factor": (entry(value=None), "change_lr", "value", ["'null'", "a number"]),
    "negative factor": (entry(value=-2.0), "change_lr", "value", ["-2.0", "> 0"]),
    "zero factor": (entry(value=0), "change_lr", "value", ["got 0", "> 0"]),
    "minus zero": (entry(value=-0.0), "change_lr", "value", ["-0.0", "> 0"]),
    "huge factor": (entry(value=10**300), "change_lr", "value", ["≤ 1e+06"]),
    "NaN": (entry(value=math.nan), "change_lr", "value", ["nan", "a finite number"]),
    "infinity": (entry(value=math.inf), "change_lr", "value", ["inf", "a finite number"]),
    "minus infinity": (entry(value=-math.inf), "change_lr", "value", ["-inf", "finite"]),
    "fraction for a count": (
        entry("set_batch_size", 8.5), "set_batch_size", "value", ["8.5", "a whole number ≥ 1"],
    ),
    "float for a count": (entry("set_batch_size", 8.0), "set_batch_size", "value", ["8.0"]),
    "bool for a count": (entry("set_grad_accum", True), "set_grad_accum", "value", ["True"]),
    "zero count": (entry("set_eval_iters", 0), "set_eval_iters", "value", ["got 0", "≥ 1"]),
    "negative count": (entry("set_warmup_iters", -1), "set_warmup_iters", "value", ["-1", "≥ 0"]),
    "count past 32 bits": (entry("set_eval_interval", 2**31), "set_eval_interval", "value", ["≤"]),
    "zero rate": (entry("set_lr", 0.0), "set_lr", "value", ["0.0", "> 0"]),
    "value where null must be": (
        entry("reset_lr_schedule", 1.0), "reset_lr_schedule", "value", ["1.0", "null"],
    ),
    "false where null must be": (
        entry("merge_lora_weights", False), "merge_lora_weights", "value", ["False", "null"],
    ),
    "growth by less than one": (entry("widen_mlp", 0.5), "widen_mlp", "value", ["0.5", "> 1"]),
    "growth by one": (entry("widen_heads", 1.0), "widen_heads", "value", ["1.0", "> 1"]),
    "fewer layers": (entry("stack_layers", 0.5), "stack_layers", "value", ["0.5", "≥ 1"]),
    "no trigger": (
        entry(trigger_loss=None, max_wait_iters=None), "change_lr", "trigger_loss",
        ["trigger_loss, trigger_plateau, max_wait_iters"],
    ),
    "no trigger at all": (
        {"name": "change_lr", "value": 2.0, "reevaluate": True}, "change_lr", "trigger_loss",
        ["trigger_loss, trigger_plateau, max_wait_iters"],
    ),
    "text for a trigger": (entry(trigger_loss="3"), "change_lr", "trigger_loss", ["'3'"]),
    "bool for a trigger": (entry(trigger_loss=True), "change_lr", "trigger_loss", ["True"]),
    "NaN for a trigger": (entry(trigger_loss=math.nan), "change_lr", "trigger_loss", ["finite"]),
    "infinite trigger": (entry(trigger_loss=math.inf), "change_lr", "trigger_loss", ["finite"]),
    "negative trigger": (entry(trigger_loss=-1.0), "change_lr", "trigger_loss", ["> 0"]),
    "zero trigger alone": (
        entry(trigger_loss=0, max_wait_iters=None), "change_lr", "trigger_loss",
        ["got 0", "> 0", "no loss is below 0"],
    ),
    "fraction for a wait": (entry(max_wait_iters=1.5), "change_lr", "max_wait_iters", ["whole"]),
    "bool for a wait": (entry(max_wait_iters=True), "change_lr", "max_wait_iters", ["True"]),
    "text for a wait": (entry(max_wait_iters="100"), "change_lr", "max_wait_iters", ["'100'"]),
    "negative wait": (entry(max_wait_iters=-5), "change_lr", "max_wait_iters", ["-5", "≥ 1"]),
    "zero wait": (entry(max_wait_iters=0), "change_lr", "max_wait_iters", ["got 0", "1 to fire at"]),
    "infinite wait": (entry(max_wait_iters=math.inf), "change_lr", "max_wait_iters", ["whole"]),
    "fraction for a plateau": (
        entry(trigger_plateau=2.5), "change_lr", "trigger_plateau", ["2.5", "a whole number ≥ 1"],
    ),
    "float for a plateau": (entry(trigger_plateau=3.0), "change_lr", "trigger_plateau", ["3.0"]),
    "bool for a plateau": (entry(trigger_plateau=True), "change_lr", "trigger_plateau", ["True"]),
    "text for a plateau": (entry(trigger_plateau="3"), "change_lr", "trigger_plateau", ["'3'"]),
    "list for a plateau": (entry(trigger_plateau=[3]), "change_lr", "trigger_plateau", ["[3]"]),
    "zero plateau": (entry(trigger_plateau=0), "change_lr", "trigger_plateau", ["got 0", "≥ 1"]),
    "negative plateau": (entry(trigger_plateau=-1), "change_lr", "trigger_plateau", ["-1", "≥ 1"]),
    "plateau past 32 bits": (
        entry(trigger_plateau=2**31), "change_lr", "trigger_plateau", ["≤ 2.14748e+09"],
    ),
    "NaN for a plateau": (
        entry(trigger_plateau=math.nan), "change_lr", "trigger_plateau", ["nan", "whole"],
    ),
    "infinite plateau": (
        entry(trigger_plateau=math.inf), "change_lr", "trigger_plateau", ["inf", "whole"],
    ),
    "misspelt plateau": (
        entry(triger_plateau=3), "change_lr", "field", ["did you mean 'trigger_plateau'"],
    ),
    "three triggers of null": (
        entry(trigger_loss=None, max_wait_iters=None, trigger_plateau=None), "change_lr",
        "trigger_loss", ["a trigger: one of trigger_loss, trigger_plateau, max_wait_iters"],
    ),
    "number for reevaluate": (entry(reevaluate=1), "change_lr", "reevaluate", ["true or false"]),
    "text for reevaluate": (entry(reevaluate="no"), "change_lr", "reevaluate", ["'no'"]),
    "null for reevaluate": (entry(reevaluate=None), "change_lr", "reevaluate", ["'null'"]),
    "number for desc": (entry(desc=4), "change_lr", "desc", ["got 4", "text"]),
    "text for completed": (entry(completed="yes"), "change_lr", "completed", ["true or false"]),
    "list for options": (entry("widen_mlp", 2, options=[]), "widen_mlp", "options", ["mapping"]),
    "null for options": (entry("widen_mlp", 2, options=None), "widen_mlp", "options", ["null"]),
    "options of nothing": (
        entry(options={"order": "stack"}), "change_lr", "options", ["'order'", "no options"],
    ),
    "unknown option": (
        entry("stack_layers", 2, options={"ordr": "stack"}), "stack_layers", "options",
        ["'ordr'", "did you mean 'order'"],
    ),
    "another operation's option": (
        entry("widen_mlp", 2, options={"order": "stack"}), "widen_mlp", "options", ["'order'"],
    ),
    "unknown choice": (
        entry("stack_layers", 2, options={"order": "interleaved"}), "stack_layers",
        "options: order", ["'interleaved'", "did you mean 'interleave'"],
    ),
    "number for a choice": (
        entry("widen_mlp", 2, options={"recipe": 1}), "widen_mlp", "options: recipe", ["split"],
    ),
    "fresh embed": (
        entry("widen_embed", 2, options={"recipe": "fresh"}), "widen_embed", "options: recipe",
        ["one of split, even"],
    ),
    "list for a size": (entry("set_d_ff", [96]), "set_d_ff", "value", ["a whole number ≥ 1"]),
    "layer that is text": (
        entry("stack_layers", [0, "0"]), "stack_layers", "value", ["a list of layers"],
    ),
    "nested layers": (
        entry("stack_layers", [[0], [0]]), "stack_layers", "value", ["a list of layers"],
    ),
    "order of a list": (
        entry("stack_layers", [0, 0], options={"order": "stack"}), "stack_layers",
        "options: order", ["with a list of layers"],
    ),
    "number for true or false": (
        entry("set_attn_lora_rank", 2, options={"merge_first": 1}), "set_attn_lora_rank",
        "options: merge_first", ["true or false"],
    ),
    "rank of one layer": (
        entry("set_layer_lora_rank", ["attn.3", 16]), "set_layer_lora_rank", "name",
        ["one rank for all layers (set_attn_lora_rank)"],
    ),
    "curriculum": (
        entry("set_curriculum_alpha", 0.5), "set_curriculum_alpha", "name", ["set_seq_len"],
    ),
    "bool for an option": (
        entry("widen_mlp", 2, options={"spread": True}), "widen_mlp", "options: spread", ["True"],
    ),
    "NaN for an option": (
        entry("widen_mlp", 2, options={"fresh_nu": math.nan}), "widen_mlp", "options: fresh_nu",
        ["finite"],
    ),
    "option out of range": (
        entry("widen_mlp", 2, options={"recipe": "noise", "noise": 2}), "widen_mlp",
        "options: noise", ["≤ 1"],
    ),
    "option without its recipe": (
        entry("stack_layers", 2, options={"anneal_steps": 9}), "stack_layers",
        "options: anneal_steps", ["recipe masked"],
    ),
    "fraction of steps": (
        entry("stack_layers", 2, options={"recipe": "masked", "anneal_steps": 9.5}),
        "stack_layers", "options: anneal_steps", ["9.5", "a whole number"],
    ),
    "not a mapping": ("change_lr", "", "", ["'change_lr'", "a mapping"]),
    "a list": ([1, 2], "", "", ["[1, 2]", "a mapping"]),
    "null": (None, "", "", ["a mapping"]),
}  # fmt: skip


def check_message(error: InputError, path: Path, operation: str, field: str, words: list[str]):
    """One clear message: file, entry number, operation, field, what came, what was expected."""
    text = str(error)
    assert "\n" not in text
    place = f"{path}: entry 2" + (f" ({operation})" if operation else "")
    assert text.startswith(f"{place}: {field}: " if field else f"{place}: "), text
    assert "expected" in text
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize("kind", ["json", "yaml"])
@pytest.mark.parametrize("name", MALFORMED_ENTRIES)
def test_malformed_entry_is_refused(name, kind, tmp_path):
    wrong, operation, field, words = MALFORMED_ENTRIES[name]
    if operation == "" and isinstance(wrong, dict) and isinstance(wrong.get("name"), str):
        operation = wrong["name"]
    path = tmp_path / f"schedule.{kind}"
    rows = [GOOD, wrong]
    path.write_text(json.dumps(rows) if kind == "json" else yaml.safe_dump(rows, sort_keys=False))
    with pytest.raises(InputError) as caught:
        load_schedule(path)
    check_message(caught.value, path, operation, field, words)


# the entry, the start's changes, mesh, the field, further words
IMPOSSIBLE = {
    "product not whole": (
        entry("widen_mlp", 1.013), {"d_ff": 64}, "", "value", ["64 × 1.013", "1.015625 gives 65"],
    ),
    "layer that is not there": (
        entry("stack_layers", [0, 1, 2, 3, 4]), {}, "", "value", ["got 4", "0 to 3"],
    ),
    "layer that would be lost": (
        entry("stack_layers", [0, 0, 1, 1, 3]), {}, "", "value", ["missing: [2]"],
    ),
    "fewer layers than there are": (
        entry("set_n_layers", 2), {}, "", "value", ["at least the 4", "n_layer_divisor"],
    ),
    "width that is no multiple": (
        entry("set_d_model", 100), {}, "", "value", ["a multiple of the 64", "64 or 128"],
    ),
    "half a layer": (entry("stack_layers", 1.1), {}, "", "value", ["4 × 1.1 = 4.4", "1.25"]),
    "uneven width": (entry("widen_embed", 2.5), {}, "", "value", ["2 or 3"]),
    "fraction of a head": (entry("widen_heads", 1.3), {}, "", "value", ["1.25", "1.5"]),
    "fraction of a rank": (
        entry("decrease_attn_lora_scaling", 0.3), {}, "", "value", ["16 × 0.3", "0.25 gives 4"],
    ),
    "rank above the width": (
        entry("decrease_vocab_lora_scaling", 16), {}, "", "value", ["from 1 to 64"],
    ),
    "fraction of a context": (entry("change_seq_len", 1.01), {}, "", "value", ["48 × 1.01"]),
    "context past the positions": (
        entry("set_seq_len", 96), {"positions": "learned"}, "", "value", ["48 learned positions"],
    ),
    "factor past the positions": (
        entry("change_seq_len", 2), {"positions": "learned"}, "", "value", ["48 learned"],
    ),
    "alpha without LoRA": (
        entry("change_lora_alpha", 2), {"attn_lora_rank": 0, "vocab_lora_rank": 0}, "", "name",
        ["LoRA adapters", "attn_lora_rank_divisor or vocab_lora_rank_divisor"],
    ),
    "set alpha without LoRA": (
        entry("set_lora_alpha", 2), {"attn_lora_rank": 0, "vocab_lora_rank": 0}, "", "name",
        ["LoRA adapters"],
    ),
    "merge without LoRA": (
        entry("merge_lora_weights", None), {"attn_lora_rank": 0, "vocab_lora_rank": 0}, "", "name",
        ["LoRA adapters"],
    ),
    "attention rank without its LoRA": (
        entry("decrease_attn_lora_scaling", 2), {"attn_lora_rank": 0}, "", "name",
        ["attn_lora_rank_divisor > 0"],
    ),
    "vocabulary rank without its LoRA": (
        entry("decrease_vocab_lora_scaling", 2), {"vocab_lora_rank": 0}, "", "name",
        ["vocab_lora_rank_divisor > 0"],
    ),
    "batch over the mesh": (
        entry("change_batch_size", 1.5), {"batch_size": 12}, "data=2,fsdp=2", "value",
        ["(4)", "12 × 1.5 = 18", "1.3333333333333333 gives 16", "1.6666666666666667 gives 20"],
    ),
    "set batch over the mesh": (
        entry("set_batch_size", 9), {"batch_size": 12}, "data=4", "value", ["(4): 8, 12"],
    ),
    "batch below the mesh": (
        entry("set_batch_size", 3), {"batch_size": 12}, "data=4", "value", ["(4): 4"],
    ),
    "warmup past the end": (
        entry("set_warmup_iters", 1000), {}, "", "value", ["1000", "allow_warmup_past_end"],
    ),
    "long warmup past the end": (
        entry("change_warmup_iters", 21), {}, "", "value", ["1050", "1000 steps"],
    ),
    "rate that overflows": (
        entry("change_lr", 1e6), {"lr_multiplier": 1e28}, "", "value", ["1e+30"],
    ),
    "batch that overflows": (
        entry("change_batch_size", 1e6), {"batch_size": 4000}, "", "value", ["2147483647"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_operation_the_shape_cannot_take_is_refused(name, tmp_path):
    wrong, changes, mesh, field, words = IMPOSSIBLE[name]
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps([GOOD, wrong]))
    with pytest.raises(InputError) as caught:
        walk(
            load_schedule(path),
            make_shape(**({"lr_multiplier": 2.0} | changes)),
            parse_mesh(mesh) or ONE,
            str(path),
            1000,
        )
    check_message(caught.value, path, wrong["name"], field, words)


MALFORMED_FILES = {
    "not JSON": ("a.json", "[{]", ["line 1, column 3", "valid JSON"]),
    "comma at the end": ("a.json", '[{"name": 1},]', ["line 1", "valid JSON"]),
    "comment": ("a.json", "// all\n[]", ["line 1", "valid JSON"]),
    "empty JSON": ("a.json", "", ["valid JSON"]),
    "a mapping": ("a.json", '{"name": "change_lr"}', ["a list of entries"]),
    "JSON text": ("a.json", '"change_lr"', ["a list of entries"]),
    "two values": ("a.json", "[] []", ["valid JSON"]),
    "key twice": (
        "a.json",
        '[{"name": "change_lr", "value": 1, "value": 2}]',
        ["entry 1: value", "each field once"],
    ),
    "option twice": (
        "a.json",
        '[{}, {"options": {"order": "stack", "order": "middle"}}]',
        ["entry 2: options: order", "each field once"],
    ),
    "too deep": ("a.json", "[" * 100_000, ["nested too deep"]),
    "number too large for a float": (
        "a.json",
        json.dumps([GOOD]).replace("0.5", "1e999"),
        ["entry 1 (change_lr): value", "inf", "finite"],
    ),
    "number too long": (
        "a.json",
        json.dumps([GOOD]).replace("0.5", "9" * 5000),
        ["entry 1 (change_lr): value", "finite"],
    ),
    "NaN in JSON": ("a.json", json.dumps([GOOD]).replace("0.5", "NaN"), ["entry 1", "nan"]),
    "not UTF-8": ("a.json", b"[\xff]", ["UTF-8"]),
    "empty YAML": ("a.yaml", "", ["a list of entries"]),
    "not YAML": ("a.yaml", "- [", ["valid YAML"]),
    "YAML alias": ("a.yml", "- &a {name: x}\n- *a", ["line 2", "alias"]),
    "YAML key twice": ("a.yaml", "- name: x\n  name: y", ["line 2", "'name'"]),
    "YAML number as key": ("a.yaml", "- {name: change_lr, value: 1, reevaluate: no, 4: 5}", ["4"]),
    "YAML yes": (
        "a.yaml",
        "- {name: change_lr, value: 1, trigger_loss: 3, reevaluate: yes}",
        ["entry 1 (change_lr): reevaluate", "'yes'"],
    ),
    "another suffix": ("a.txt", "[]", ["*.json"]),
    "no suffix": ("schedule", "[]", ["*.json"]),
}


@pytest.mark.parametrize("name", MALFORMED_FILES)
def test_malformed_file_is_refused(name, tmp_path):
    filename, content, words = MALFORMED_FILES[name]
    path = tmp_path / filename
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        load_schedule(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert [word for word in words if word not in text] == [], text
    assert len(text) < 400


def test_a_thousand_entries_are_walked_and_told_in_a_moment(tmp_path, capsys):
    """Every entry changes the program, so that every stage has its own line in every table."""
    rows = [entry("set_seq_len", 100 + number % 2) for number in range(1000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    argv = ["--scaling_schedule_file", str(tmp_path / "a.json"), "--positions", "rotary"]
    start = time.process_time()
    assert main(["--dry_run", *argv]) == 0
    assert time.process_time() - start < 1.2  # it took four times as long
    assert capsys.readouterr().out.count("set_seq_len") == 1000
    (tmp_path / "a.json").write_text(json.dumps([*rows, rows[0]]))
    with pytest.raises(InputError, match="got 1001, expected at most 1,000 entries"):
        load_schedule(tmp_path / "a.json")


def test_missing_file_is_refused(tmp_path):
    for name in ("none.json", "none.yaml"):
        with pytest.raises(InputError, match=r"none\.\w+: expected a readable file"):
            load_schedule(tmp_path / name)


def test_there_are_more_than_sixty_malformed_schedules():
    assert len(MALFORMED_ENTRIES) + len(IMPOSSIBLE) + len(MALFORMED_FILES) > 100


def test_the_train_command_refuses_every_malformed_schedule_without_jax(tmp_path):
    schedules = {f"entry {name}": [GOOD, row] for name, (row, *_) in MALFORMED_ENTRIES.items()}
    for number, rows in enumerate(schedules.values()):
        (tmp_path / f"{number}.json").write_text(json.dumps(rows))
    code = (
        "import sys\n"
        "from jaxmorph.train import main\n"
        "for path in sys.argv[1:]:\n"
        "    assert main(['--scaling_schedule_file', path, '--run_dir', 'run']) == 2, path\n"
        "assert 'jax' not in sys.modules\n"
    )
    paths = [str(tmp_path / f"{number}.json") for number in range(len(schedules))]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    messages = done.stderr.splitlines()
    assert len(messages) == len(paths) >= 60
    for path, message in zip(paths, messages, strict=True):
        assert message.startswith(f"error: {path}: entry 2")
        assert ", expected " in message or ": expected " in message
    assert not (tmp_path / "run").exists()


def test_json_and_yaml_say_the_same(tmp_path):
    yaml_text = """
- name: stack_layers
  value: 2
  trigger_loss: 5e-1
  max_wait_iters: null
  reevaluate: true
  desc: deeper
  options: {recipe: masked, anneal_steps: 7}
"""
    row = entry("stack_layers", 2.0, trigger_loss=0.5, max_wait_iters=None, reevaluate=True)
    row |= {"desc": "deeper", "options": {"recipe": "masked", "anneal_steps": 7}}
    (tmp_path / "a.yaml").write_text(yaml_text)
    (tmp_path / "a.json").write_text(json.dumps([row]))
    loaded = load_schedule(tmp_path / "a.yaml")
    assert loaded == load_schedule(tmp_path / "a.json")
    assert loaded == (
        Entry(
            OPERATIONS["stack_layers"], 2.0, 0.5, None, True, None, "deeper",
            {"recipe": "masked", "anneal_steps": 7}, 1,
        ),
    )  # fmt: skip


def test_one_trigger_may_be_left_out(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([without("trigger_loss"), without("max_wait_iters")]))
    first, second = load_schedule(path)
    assert (first.trigger_loss, first.max_wait_iters) == (None, 100)
    assert (second.trigger_loss, second.max_wait_iters) == (3.0, None)
    assert first.trigger_plateau is second.trigger_plateau is None


@pytest.mark.parametrize("name", ["trigger_loss", "max_wait_iters", "trigger_plateau"])
def test_any_one_trigger_will_do(name, tmp_path):
    triggers = ("trigger_loss", "max_wait_iters", "trigger_plateau")
    row = {key: value for key, value in entry().items() if key not in triggers} | {name: 4}
    rows = [row, row | {other: None for other in triggers if other != name}]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(rows))
    for one in load_schedule(tmp_path / "a.yaml"):
        assert {key: getattr(one, key) for key in triggers} == dict.fromkeys(triggers) | {name: 4}


def test_completed_is_let_pass_with_a_warning(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([entry(completed=True), entry()]))
    stages = walk(load_schedule(path), make_shape(), ONE, str(path))
    assert [len(stage.warnings) for stage in stages] == [0, 1, 0]
    assert "completed is ignored" in stages[1].warnings[0]


def test_walk_follows_the_shapes():
    stages = walk(
        entries(
            entry("stack_layers", 2.0),
            entry("change_lr", 0.5),
            entry("set_batch_size", 16),
            entry("merge_lora_weights", None),
            entry("widen_mlp", 1.5, options={"recipe": "noise"}),
        ),
        make_shape(),
        ONE,
        "file",
    )
    assert [stage.shape.model.n_layers for stage in stages] == [4, 8, 8, 8, 8, 8]
    assert [stage.shape.model.d_ff for stage in stages] == [96] * 5 + [144]
    assert [stage.shape.batch_size for stage in stages] == [10, 10, 10, 16, 16, 16]
    assert [stage.shape.lr_multiplier for stage in stages] == [2, 2, 1, 1, 1, 1]
    assert [stage.number for stage in stages] == [0, 1, 2, 3, 4, 5]
    assert [stage.recompiles for stage in stages] == [False, True, False, True, False, True]
    assert [stage.exact for stage in stages] == [True, False, True, True, True, False]
    assert [stage.warnings for stage in stages] == [()] * 6


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        (entry("change_batch_size", 1.25), {}, ["10 × 1.25 = 12.5", "rounded to 12"]),
        (entry("change_grad_accum", 0.1), {}, ["3 × 0.1 = 0.3", "rounded to 1"]),
        (entry("change_warmup_iters", 2), {"warmup_steps": 0}, ["0 × 2 = 0", "rounded to 1"]),
        (entry("change_eval_iters", 1.5), {}, ["7 × 1.5 = 10.5", "rounded to 10"]),
        (entry("change_lr", 1.0), {}, ["change_lr 1 changes nothing"]),
        (entry("set_batch_size", 10), {}, ["set_batch_size 10 changes nothing"]),
        (entry("decrease_attn_lora_scaling", 1), {}, ["changes nothing"]),
    ],
)
def test_walk_warns_of_what_it_lets_pass(row, changes, words):
    (warning,) = walk(entries(row), make_shape(**changes), ONE, "file")[1].warnings
    assert [word for word in words if word not in warning] == []


def test_warmup_past_the_end_is_checked_only_with_an_end():
    row = entries(entry("set_warmup_iters", 1000))
    assert walk(row, make_shape(), ONE, "file")[1].shape.warmup_steps == 1000
    assert walk(row, make_shape(), ONE, "file", 1001)[1].shape.warmup_steps == 1000


def test_digest_is_of_what_an_entry_does(tmp_path):
    variants = [
        entry(),
        entry("change_grad_accum"),
        entry(value=0.25),
        entry(trigger_loss=2.0),
        entry(trigger_loss=None),
        entry(max_wait_iters=99),
        entry(reevaluate=True),
        entry(trigger_plateau=3),
        entry(trigger_plateau=4),
        entry("stack_layers", 2),
        entry("stack_layers", 2, options={"order": "middle"}),
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(variants))
    loaded = load_schedule(path)
    digests = [entry_sha256(one) for one in loaded]
    assert len(set(digests)) == len(variants)
    path.write_text(json.dumps([row | {"desc": "other", "completed": False} for row in variants]))
    assert [entry_sha256(one) for one in load_schedule(path)] == digests
    path.write_text(json.dumps(variants).replace('"value": 2,', '"value": 2.0,'))
    assert [entry_sha256(one) for one in load_schedule(path)] == digests
    path.write_text(json.dumps([{"trigger_plateau": None} | row for row in variants]))
    assert [entry_sha256(one) for one in load_schedule(path)] == digests


def test_written_schedule_reads_the_same(tmp_path):
    standing = entry(trigger_plateau=5, trigger_loss=None, max_wait_iters=None)
    (tmp_path / "plateau.json").write_text(json.dumps([standing, entry(trigger_plateau=1)]))
    for path in (tmp_path / "plateau.json", *sorted((CONFIGS / "schedules").iterdir())):
        loaded = load_schedule(path)
        (tmp_path / "copy.json").write_text(schedule_json(loaded))
        assert load_schedule(tmp_path / "copy.json") == loaded


# schedule -> (config file, flags, ranks, layers, d_model, heads, MLP and ranks at the end)
# schedule: (its config, flags; layers, width, heads, MLP and LoRA ranks at the end)
PROVIDED = {
    "document_example.json": (
        "openwebtext_gpt2_124m.yaml",
        ["--attn_lora_rank_divisor", "16", "--vocab_lora_rank_divisor", "24"],
        (24, 768, 12, 4608, 48, 32),
    ),
    "document_scaled.json": ("lora.yaml", [], (4, 128, 4, 384, 16, 32)),
    "production.json": ("openwebtext_growth.yaml", [], (12, 768, 12, 3072, 96, 64)),
    "demo_all_operations.json": ("all_operations.yaml", [], (5, 128, 6, 256, 8, 8)),
    "growth.yaml": ("demo.yaml", [], (4, 192, 6, 768, 0, 0)),
}


@pytest.mark.parametrize("name", PROVIDED)
def test_provided_schedule_walks_from_its_config(name):
    config, flags, end = PROVIDED[name]
    schedule = ["--scaling_schedule_file", str(CONFIGS / "schedules" / name)]
    # The corpora the configs name need not be there.
    settings, _ = resolve(
        ["--config", str(CONFIGS / config), "--data", "stdlib", *schedule, *flags]
    )
    plan = make_plan(settings, ONE).completed(vocab_size=256, total=10_000)
    last = plan.stages[-1].shape.model
    sizes = (last.n_layers, last.d_model, last.n_heads, last.d_ff)
    assert (*sizes, last.attn_lora_rank, last.vocab_lora_rank) == end
    assert [stage.warnings for stage in plan.stages] == [()] * len(plan.stages)


def test_provided_schedules_are_all_tested_and_the_demo_has_every_operation():
    assert {path.name for path in (CONFIGS / "schedules").iterdir()} == set(PROVIDED)
    demo = load_schedule(CONFIGS / "schedules" / "demo_all_operations.json")
    assert {one.name for one in demo} == set(OPERATIONS)


def test_documents_example_is_the_documents():
    rows = json.loads((CONFIGS / "schedules" / "document_example.json").read_text())
    assert [tuple(row.values()) for row in rows] == [
        ("change_lr", 2.0, 6.0, 1000, False),
        ("stack_layers", 2, 5.5, 2000, True),
        ("widen_mlp", 1.5, 5.2, 2000, True),
        ("reset_lr_schedule", None, 5.19, 500, False),
        ("change_lora_alpha", 0.5, 4.8, 3000, False),
        ("merge_lora_weights", None, 4.5, 5000, True),
    ]
