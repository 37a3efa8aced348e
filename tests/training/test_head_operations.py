"""Operations on heads: which heads they choose, in a run, and what its records say of them."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from schedule_entries import entries, entry
from tiny_runs import TINY_GPT, train_until_killed, write_text

from jaxmorph.train import main
from jaxmorph.training.choice import chosen_heads

LAYERS, HEADS = 3, 4
RNG = np.random.default_rng(0)
IMPORTANCE, SLOPES = RNG.random((LAYERS, HEADS)), RNG.normal(size=(LAYERS, HEADS))


def _measured():
    return {"importance": IMPORTANCE, "gate_gradient": SLOPES}


def _never():
    raise AssertionError("nothing to measure")


def _state(closed, seed=0) -> Any:
    gates = np.where(closed, 0.1, 0.7).astype("float32")
    return {"head_gate": gates, "rng": np.asarray([0, seed], np.uint32)}


def _entry(name, value, number=1, **options) -> Any:
    (made,) = entries(entry(name, float(value), options=options))
    return SimpleNamespace(
        operation=made.operation, value=made.value, options=options, number=number
    )


def _chosen(name, value, closed, least=1, measure=_measured, number=1, seed=0, **options):
    done = _entry(name, value, number, **options)
    return chosen_heads(done, _state(closed, seed), least, measure)


@pytest.mark.parametrize("value", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("least", [1, 3])
def test_the_least_important_open_heads_are_pruned_but_for_those_a_layer_keeps(value, least):
    closed = np.zeros((LAYERS, HEADS), bool)
    closed[0, 1] = closed[2, 2] = True
    found = _chosen("prune_heads", value, closed, least)
    expected, left = [], (~closed).sum(axis=1)
    count = max(1, int(value * (~closed).sum()))
    for head in sorted(map(tuple, np.argwhere(~closed)), key=lambda head: IMPORTANCE[head]):
        if left[head[0]] > least and len(expected) < count:
            left[head[0]] -= 1
            expected.append(head)
    assert found == expected


@pytest.mark.parametrize(("value", "count"), [(0.1, 1), (0.5, 2), (1.0, 5)])
def test_closed_heads_whose_gate_has_the_largest_gradient_are_regrown(value, count):
    closed = np.zeros((LAYERS, HEADS), bool)
    closed[0, 1:] = closed[2, 2:] = True
    found = _chosen("regrow_heads", value, closed)
    ranked = sorted(map(tuple, np.argwhere(closed)), key=lambda head: -abs(SLOPES[head]))
    assert found == ranked[:count]


def test_a_random_choice_depends_on_the_seed_and_the_entry_alone():
    closed = np.zeros((LAYERS, HEADS), bool)
    draws = {
        (seed, number): _chosen(
            "prune_heads", 0.5, closed, measure=_never, by="random", seed=seed, number=number
        )
        for seed in range(4)
        for number in (1, 2)
    }
    assert {len(set(heads)) for heads in draws.values()} == {6}
    assert len({tuple(heads) for heads in draws.values()}) == len(draws)
    again = _chosen("prune_heads", 0.5, closed, measure=_never, by="random", seed=3, number=2)
    assert again == draws[3, 2]


def test_listed_heads_are_taken_in_their_order_if_they_can_be():
    closed = np.zeros((LAYERS, HEADS), bool)
    closed[1] = [True, True, False, True]
    listed = [[1, 1], [2, 3], [1, 2], [0, 0], [2, 1]]
    how = {"by": "listed", "heads": listed, "measure": _never}
    assert _chosen("prune_heads", 1, closed, **how) == [(2, 3), (0, 0), (2, 1)]
    assert _chosen("prune_heads", 0.5, closed, **how) == [(2, 3), (0, 0)]
    assert _chosen("regrow_heads", 1, closed, **how) == [(1, 1)]
    assert _chosen("set_gates", 0, closed, heads=listed) == [tuple(head) for head in listed]
    assert len(_chosen("set_gates", 0, closed)) == LAYERS * HEADS


@pytest.mark.parametrize("by", ["importance", "random"])
def test_where_there_is_nothing_to_choose_from_nothing_is_measured(by):
    none, every = np.zeros((LAYERS, HEADS), bool), np.ones((LAYERS, HEADS), bool)
    assert _chosen("regrow_heads", 1, none, measure=_never, by=by) == []
    assert _chosen("prune_heads", 1, every, measure=_never, by=by) == []


SCHEDULE = [
    entry("set_gates", 0, options={"heads": [[0, 1], [0, 2]]}),
    entry("prune_heads", 0.2, options={"by": "importance"}, reevaluate=True),
    entry("regrow_heads", 0.5, options={"by": "random"}),
    entry("regrow_heads", 1, options={"weights": "kept"}),
]
POINTS = ["after_operation:1", "after_operation:2", "during_operation:1"]  # one for each operation


def test_killed_around_operations_on_heads_and_resumed_is_the_same_run(tmp_path, capsys):
    rows = [row | {"trigger_loss": None, "max_wait_iters": 1} for row in SCHEDULE]
    (tmp_path / "schedule.json").write_text(json.dumps(rows))
    whole, killed = (
        [
            *(*TINY_GPT, "--n_heads", "4", "--scan_layers", "scan", "--precompile", "off"),
            *("--max_steps", "6", "--checkpoint_interval", "2", "--keep_checkpoints", "20"),
            *("--eval_iters", "1", "--eval_interval", "3", "--progress", "lines"),
            *("--learning_rate", "1e-2", "--warmup_steps", "2"),
            *("--data", write_text(tmp_path / "text.txt"), "--run_dir", str(tmp_path / name)),
            *("--scaling_schedule_file", str(tmp_path / "schedule.json")),
        ]
        for name in ("whole", "killed")
    )
    assert main(whole) == 0
    printed = capsys.readouterr().out
    for point in POINTS:
        train_until_killed(killed, point)
    assert main(killed) == 0
    for step in ("4", "6"):
        manifests = [tmp_path / run / "checkpoints" / step for run in ("whole", "killed")]
        first, second = (json.loads((m / "manifest.json").read_text()) for m in manifests)
        assert first["state_sha256"] == second["state_sha256"]
    records = [
        [
            json.loads(line)
            for line in (tmp_path / run / "operations.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "killed")
    ]
    heads, again = ([record["heads"] for record in lines] for lines in records)
    assert heads == again
    _check_records(records[0], printed)


def _check_records(records, printed):
    heads = [record["heads"] for record in records]
    assert heads[0] == [[0, 1], [0, 2]]
    assert len(heads[1]) == 1  # of 2 open
    assert heads[1][0] not in heads[0]
    assert len(heads[2]) == 1  # half of 3 closed
    assert heads[2][0] in heads[0] + heads[1]
    assert sorted(heads[3]) == sorted(h for h in heads[0] + heads[1] if h not in heads[2])
    deltas = [record["function_delta"] for record in records]
    assert deltas[:2] == [None, None]
    assert deltas[2] < 1e-5 < deltas[3]
    for words in ("gate 0 for 2 of 4", "closed 1 of 4", "opened 1 of 4"):
        assert f"  Heads: {words}\n" in printed
    assert "closed: " not in printed
