"""The time left counts the growth to come and the evaluations; many passes over a text are said."""

import json
import math

import pytest

from jaxmorph.config.resolve import resolve
from jaxmorph.growth.plan import Plan, make_plan
from jaxmorph.model.architecture import flops_per_token
from jaxmorph.train import main
from jaxmorph.training.time_left import TimeLeft

TOTAL, TRAINING_SPEED, EVALUATION_SPEED = 100, 1e9, 2e9  # steps, FLOP/s
GROWTH = [
    {
        "name": "widen_mlp",
        "value": 4,
        "max_wait_iters": 30,
        "trigger_loss": 2.0,
        "reevaluate": True,
    },
    {"name": "set_batch_size", "value": 64, "trigger_loss": 1.0, "reevaluate": False},
    {"name": "set_eval_interval", "value": 3, "max_wait_iters": 5, "reevaluate": True},
    {"name": "stack_layers", "value": 4, "max_wait_iters": 200, "reevaluate": True},
]


@pytest.fixture
def plan(tmp_path) -> Plan:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(GROWTH))
    settings, _ = resolve(
        [
            *("--n_layers", "2", "--d_model", "32", "--n_heads", "2", "--seq_len", "64"),
            *("--batch_size", "8", "--max_steps", str(TOTAL), "--eval_interval", "10"),
            *("--eval_iters", "4", "--scaling_schedule_file", str(path)),
        ]
    )
    return make_plan(settings, None).completed(vocab_size=256, total=TOTAL)


def seconds(plan: Plan, step: int, stage: int, fires: dict[int, int]) -> float:
    """Walk the run step by step: `fires` is the step of each operation to come, by its stage."""
    spent = 0.0

    def evaluate() -> float:
        shape = plan.stages[stage].shape
        tokens = shape.eval_iters * plan.start.batch_size * shape.model.seq_len
        return tokens * flops_per_token(shape.model) / 3 / EVALUATION_SPEED

    while True:
        while fires.get(stage + 1) == step < TOTAL:
            stage += 1
            entry = plan.stages[stage].entry
            spent += evaluate() if entry and entry.reevaluate else 0.0
        if step == TOTAL:
            return spent
        step += 1
        shape = plan.stages[stage].shape
        tokens = shape.batch_size * shape.grad_accum_steps * shape.model.seq_len
        spent += tokens * flops_per_token(shape.model) / TRAINING_SPEED
        if step % shape.eval_interval == 0 or step == TOTAL:
            spent += evaluate()


@pytest.mark.parametrize(
    ("step", "stage", "last", "fires"),
    [
        # the longest wait; of the 70 steps left a third; the longest wait; not before the end
        (0, 0, 0, {1: 30, 2: 30 + 70 // 4, 3: 30 + 70 // 4 + 5}),
        (29, 0, 0, {1: 30, 2: 30 + 70 // 4, 3: 30 + 70 // 4 + 5}),
        (17, 1, 12, {2: 17 + 83 // 4, 3: 17 + 83 // 4 + 5}),  # the first fired early, on its loss
        (90, 2, 88, {3: 93}),
        (99, 3, 93, {}),
        (100, 3, 93, {}),
    ],
)
def test_time_left_is_that_of_the_run_walked_step_by_step(step, stage, last, fires, plan):
    left = TimeLeft(plan.stages, TOTAL, last)
    assert left.seconds(step, stage) is None
    shape = plan.stages[stage].shape
    flops = shape.batch_size * shape.model.seq_len * flops_per_token(shape.model)
    left.stepped(1000.0, flops)  # with compiling: it does not count
    for _ in range(3):
        left.stepped(flops / TRAINING_SPEED, flops)
    tokens = 4 * plan.start.batch_size * shape.model.seq_len
    left.evaluated(tokens * flops_per_token(shape.model) / 3 / EVALUATION_SPEED, stage)
    expected = seconds(plan, step, stage, fires)
    found = left.seconds(step, stage)
    assert found is not None
    assert math.isclose(found, expected, rel_tol=1e-6)


def test_growth_ahead_is_not_forgotten(plan):
    """The steps alone, at the pace of the small model, would be a third of the truth."""
    left = TimeLeft(plan.stages, TOTAL)
    flops = 8 * 64 * flops_per_token(plan.start.model)
    for _ in range(2):
        left.stepped(flops / TRAINING_SPEED, flops)
    naive = TOTAL * flops / TRAINING_SPEED
    assert (left.seconds(0, 0) or 0) > 3 * naive


def test_more_than_twenty_passes_are_a_warning_at_the_start(tmp_path, capsys):
    """10 × 512 tokens and, after the operation, 10 × 1,024, of the text's 720."""
    text, schedule = tmp_path / "text.txt", tmp_path / "schedule.json"
    text.write_bytes(b"0123456789" * 80)
    entry = {"name": "set_grad_accum", "value": 2, "max_wait_iters": 10, "reevaluate": False}
    schedule.write_text(json.dumps([entry]))
    flags = ["--data", str(text), "--run_dir", str(tmp_path / "run"), "--seq_len", "16"]
    flags += ["--batch_size", "32", "--eval_iters", "1", "--mesh", "data=1", "--n_layers", "1"]
    flags += ["--d_model", "8", "--n_heads", "2", "--progress", "off"]
    flags += ["--max_steps", "20", "--scaling_schedule_file", str(schedule)]
    assert main(flags) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "training text" in line]
    assert [line.split(";")[0] for line in said] == [
        "warning: the run reads its training text 21.3 times"
    ]


@pytest.mark.parametrize(("epochs", "said"), [("20", False), ("21", True)])
def test_the_dry_run_warns_of_many_epochs(epochs, said, capsys):
    assert main(["--num_epochs", epochs, "--dry_run"]) == 0
    warning = f"warning: the run reads its training text {epochs} times; "
    assert (warning in capsys.readouterr().out) == said
