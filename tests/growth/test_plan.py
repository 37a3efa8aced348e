"""The plan of a run: made once from the settings, completed by what the corpus and devices tell."""

import dataclasses
import json
from pathlib import Path

import pytest
from schedule_entries import ONE, entry

from jaxmorph.cli.errors import InputError
from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.resolve import resolve
from jaxmorph.config.settings import Settings
from jaxmorph.growth.changes import replaced
from jaxmorph.growth.operations import OPERATIONS, Operation, Value, describe_operations
from jaxmorph.growth.plan import Plan, make_plan
from jaxmorph.growth.schedule import schedule_json

GROWING = [entry("stack_layers", 2), entry("change_warmup_iters", 2), entry("set_batch_size", 12)]


def _settings(folder: Path, rows: list[dict], *flags: str) -> Settings:
    path = folder / "schedule.json"
    path.write_text(json.dumps(rows))
    return resolve(["--scaling_schedule_file", str(path), *flags])[0]


def _opened(plan: Plan) -> list[tuple[int, int]]:
    """What only a corpus tells, of every stage."""
    return [(stage.shape.model.vocab_size, stage.shape.warmup_steps) for stage in plan.stages]


def test_plan_of_which_all_is_known_is_complete(tmp_path):
    plan = make_plan(_settings(tmp_path, GROWING, "--max_steps", "1000"), None)
    assert (plan.mesh, plan.total_steps) == (None, 1000)
    assert _opened(plan) == [(256, 50), (256, 50), (256, 100), (256, 100)]
    whole = plan.completed(vocab_size=256, total=1000, mesh=ONE)
    assert dataclasses.replace(whole, mesh=None) == plan


def test_completed_plan_has_what_the_corpus_tells_and_reads_no_file_again(tmp_path):
    flags = ("--num_epochs", "2", "--tokenizer", "char", "--vocab_multiple", "64")
    plan = make_plan(_settings(tmp_path, GROWING, *flags), MeshShape(data=4))
    assert plan.total_steps is None
    assert _opened(plan)[:2] == [(0, 0)] * 2
    (tmp_path / "schedule.json").unlink()
    whole = plan.completed(vocab_size=70, total=2000)
    assert (whole.mesh, whole.total_steps) == (MeshShape(data=4), 2000)
    assert _opened(whole) == [(128, 100), (128, 100), (128, 200), (128, 200)]
    assert [stage.shape.model.n_layers for stage in whole.stages] == [6, 12, 12, 12]
    assert [stage.number for stage in whole.stages] == [0, 1, 2, 3]
    assert whole.entries == plan.entries


# the entry, steps of the run, mesh, words of the refusal
KNOWN_LATE = {
    "steps": (entry("set_warmup_iters", 500), 500, ONE, ["warmup shorter than the 500 steps"]),
    "devices": (entry("set_batch_size", 12), 900, MeshShape(fsdp=8), ["(8): 8, 16"]),
}


@pytest.mark.parametrize("name", KNOWN_LATE)
def test_what_is_known_late_is_checked_when_it_is_known(name, tmp_path):
    row, total, mesh, words = KNOWN_LATE[name]
    plan = make_plan(_settings(tmp_path, [row], "--num_epochs", "1"), None)
    plan.completed(vocab_size=256, total=501, mesh=MeshShape(data=4))
    with pytest.raises(InputError) as caught:
        plan.completed(vocab_size=256, total=total, mesh=mesh)
    assert [word for word in words if word not in str(caught.value)] == []
    assert f"entry 1 ({row['name']}): value" in str(caught.value)


def test_batch_at_the_start_is_held_against_the_devices_there_are():
    plan = make_plan(resolve(["--batch_size", "12"])[0], None)
    assert plan.completed(vocab_size=256, total=9, mesh=MeshShape(2, 3, 5)).start.batch_size == 12
    with pytest.raises(InputError, match=r"--batch_size: got 12, expected a multiple of .* \(8\)"):
        plan.completed(vocab_size=256, total=9, mesh=MeshShape(data=4, fsdp=2))


def test_warmup_past_the_end_is_planned_where_it_is_permitted(tmp_path):
    row, flags = entry("set_warmup_iters", 500), ("--num_epochs", "1", "--allow_warmup_past_end")
    plan = make_plan(_settings(tmp_path, [row], *flags), None)
    assert _opened(plan.completed(vocab_size=256, total=500))[-1] == (256, 500)


def test_a_table_with_more_operations_serves_schedules_with_them(tmp_path):
    dropout = Operation(
        "set_dropout", "hyperparameter", Value("rate", float), "Set it.", replaced("eval_iters")
    )
    more = {**OPERATIONS, "set_dropout": dropout}
    settings = _settings(tmp_path, [entry("set_dropout", 3), entry("change_eval_iters", 2)])
    with pytest.raises(InputError, match=r"entry 1 \(set_dropout\): name"):
        make_plan(settings, None)
    plan = make_plan(settings, None, more)
    assert plan.entries[0].operation is dropout
    assert [stage.shape.eval_iters for stage in plan.stages] == [20, 3, 6]
    assert '"set_dropout"' in schedule_json(plan.entries)
    assert "set_dropout" in describe_operations(more)
    assert "set_dropout" not in describe_operations()
