"""Schedules in the later style of nano_gpt's orchestrator: twelve that walk, and names it has alone."""

import json
from pathlib import Path

import pytest
from schedule_entries import ONE, entries, entry, make_shape

from jaxmorph.cli.errors import InputError
from jaxmorph.config.resolve import resolve
from jaxmorph.growth.dry_run import simulate, walk_report
from jaxmorph.growth.foreign import FOREIGN_FIELDS, FOREIGN_OPERATIONS
from jaxmorph.growth.operations import OPERATIONS
from jaxmorph.growth.plan import make_plan, walk
from jaxmorph.growth.schedule import entry_sha256, load_schedule, schedule_json

HERE = Path(__file__).parent
SCHEDULES = HERE / "schedules"
# schedule: layers, width, heads, MLP, ranks, context, batch, accumulation at the end; warnings of what
TWELVE = {
    "sizes.json": ((2, 16, 3, 48, 4, 4, 16, 6, 1), ["never by loss"]),
    "layer_lists.json": ((4, 16, 2, 32, 4, 4, 16, 4, 1), ["never by loss", "changes nothing"]),
    "identity_lists.yaml": ((3, 16, 2, 32, 4, 4, 16, 4, 2), ["never by loss"]),
    "never_by_loss.json": ((1, 16, 2, 48, 4, 4, 16, 4, 1), ["never by loss"]),
    "batch_and_accumulation.yaml": ((1, 16, 2, 32, 4, 4, 16, 4, 4), ["never by loss"]),
    "lora_ranks.json": ((1, 16, 2, 32, 2, 8, 16, 4, 1), ["never by loss"]),
    "lora_merges.yaml": ((1, 16, 2, 32, 8, 2, 16, 4, 1), ["never by loss"]),
    "width.json": ((1, 32, 2, 64, 4, 4, 16, 4, 1), ["never by loss"]),
    "partly_completed.json": ((2, 16, 2, 32, 4, 4, 16, 8, 1), ["completed is ignored"]),
    "already_there.json": (
        (1, 16, 2, 32, 4, 4, 16, 4, 1), ["changes nothing", "never by loss"],
    ),
    "all_at_once.yaml": ((2, 16, 2, 48, 8, 4, 24, 2, 1), []),
    "warm_restarts.yaml": ((1, 16, 2, 32, 4, 4, 16, 4, 1), ["never by loss"]),
}  # fmt: skip


def _plan(name: str, *flags: str):
    schedule = ("--scaling_schedule_file", str(SCHEDULES / name))
    settings, _ = resolve(["--config", str(HERE / "tiny_lora.yaml"), *schedule, *flags])
    return make_plan(settings, ONE)


def test_there_are_twelve_and_they_have_what_the_style_has():
    assert {path.name for path in SCHEDULES.iterdir()} == set(TWELVE)
    assert len(TWELVE) == 12
    names = {row.name for name in TWELVE for row in load_schedule(SCHEDULES / name)}
    sizes = {"set_n_layers", "set_d_ff", "set_n_heads", "set_d_model"}
    assert names >= sizes | {"set_attn_lora_rank", "set_vocab_lora_rank", "merge_lora_weights"}
    assert names >= {"set_batch_size", "set_grad_accum", "change_batch_size", "stack_layers"}


@pytest.mark.parametrize("name", TWELVE)
def test_schedule_walks_to_its_end_and_reads_the_same_once_written(name, tmp_path):
    sizes, warned = TWELVE[name]
    plan = _plan(name)
    shape, model = plan.stages[-1].shape, plan.stages[-1].shape.model
    ranks = (model.attn_lora_rank, model.vocab_lora_rank)
    widths = (model.n_layers, model.d_model, model.n_heads, model.d_ff)
    found = (*widths, *ranks, model.seq_len, shape.batch_size, shape.grad_accum_steps)
    assert found == sizes
    said = {warning for stage in plan.stages for warning in stage.warnings}
    assert all(any(words in warning for warning in said) for words in warned), said
    assert all(any(words in warning for words in warned) for warning in said), said
    report = walk_report(plan.stages, plan.settings.optimizer)
    for stage in plan.stages[1:]:
        assert stage.entry is not None
        assert stage.entry.title in report
    (tmp_path / "copy.json").write_text(schedule_json(plan.entries))
    copy = load_schedule(tmp_path / "copy.json")
    assert list(map(entry_sha256, copy)) == list(map(entry_sha256, plan.entries))
    fired = simulate(plan.entries, [(step, 5.0) for step in range(0, 17, 4)], min_change=1e-3)
    assert len(fired) == len(plan.entries)


def test_trigger_loss_of_zero_never_fires_by_loss_and_alone_is_refused(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps([entry(trigger_loss=0, max_wait_iters=7)]))
    (row,) = load_schedule(path)
    assert (row.trigger_loss, row.max_wait_iters) == (None, 7)
    assert "trigger_loss 0 means never by loss" in row.warnings[0]
    path.write_text(json.dumps([entry(trigger_loss=None, max_wait_iters=7)]))
    assert entry_sha256(load_schedule(path)[0]) == entry_sha256(row)
    path.write_text(json.dumps([entry(trigger_loss=-0.0, max_wait_iters=None)]))
    with pytest.raises(
        InputError, match=r"got -0\.0, expected a threshold > 0, or trigger_plateau"
    ):
        load_schedule(path)
    fired = simulate([row], [(0, 1.0), (5, -1.0), (10, 1.0)], min_change=0.0)
    assert [(f.step, f.reason) for f in fired] == [(7, "timeout")]


@pytest.mark.parametrize("name", FOREIGN_OPERATIONS)
def test_operation_of_another_program_is_refused_with_what_to_write_here(name, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps([entry(name, ["attn.3", 16])]))
    with pytest.raises(InputError) as caught:
        load_schedule(path)
    assert str(caught.value).startswith(f"{path}: entry 1 ({name}): name: got {name!r}, expected ")
    assert str(caught.value).endswith(f": {FOREIGN_OPERATIONS[name]}")


def test_hints_name_operations_and_fields_there_are():
    words = " ".join(FOREIGN_OPERATIONS.values()).replace(",", " ").replace("(", " ").split()
    named = {word.strip(").") for word in words if "_" in word and not word.startswith("--")}
    assert named <= set(OPERATIONS)
    assert len(named) > 10
    assert not set(FOREIGN_OPERATIONS) & set(OPERATIONS)
    known = {
        "name",
        "value",
        "trigger_loss",
        "reevaluate",
        "max_wait_iters",
        "trigger_plateau",
        "desc",
    }
    assert set(FOREIGN_FIELDS.values()) <= known


@pytest.mark.parametrize("field", FOREIGN_FIELDS)
def test_field_of_another_program_is_refused_with_its_name_here(field, tmp_path):
    own, path = FOREIGN_FIELDS[field], tmp_path / "schedule.json"
    row = entry()
    value = row.pop(own, 3)
    path.write_text(json.dumps([row | {field: value}]))
    with pytest.raises(InputError) as caught:
        load_schedule(path)
    assert repr(field) in str(caught.value)
    assert f"{own}" in str(caught.value)


def test_inexact_rank_is_said_beforehand_and_merging_first_is_exact():
    rows = [entry("set_attn_lora_rank", 8), entry("decrease_vocab_lora_scaling", 0.5)]
    merged = [row | {"options": {"merge_first": True}} for row in rows]
    stages = walk(entries(*rows), make_shape(), ONE, "file")
    assert [stage.exact for stage in stages] == [True, False, False]
    for stage, rank in zip(stages[1:], ("attn_lora_rank", "vocab_lora_rank"), strict=True):
        (warning,) = stage.warnings
        assert f"changes the function: a smaller {rank}" in warning
        assert "merge_first: true" in warning
    report = walk_report(stages, resolve([])[0].optimizer)
    assert "set_attn_lora_rank 8 changes the function" in report
    exact = walk(entries(*merged), make_shape(), ONE, "file")
    assert [(stage.exact, stage.warnings) for stage in exact] == [(True, ())] * 3


def test_a_long_list_of_layers_is_shown_shortened_and_kept_whole():
    layers = [layer for layer in range(12) for _ in range(2)]
    (row,) = entries(entry("stack_layers", tuple(layers)))
    assert row.title == "stack_layers [0, 0, 1, 1, …, 10, 10, 11, 11] (24)"
    (_, stage) = walk((row,), make_shape(n_layers=12), ONE, "file")
    assert stage.shape.model.n_layers == 24
    assert json.loads(schedule_json((row,)))[0]["value"] == layers
