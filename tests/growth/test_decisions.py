"""What is decided only when an operation fires: the heads that stay, and what a plan knows before."""

import json

import numpy as np
import pytest
from small_models import shape_of, small_config

from jaxmorph.cli.errors import InputError
from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.resolve import resolve
from jaxmorph.growth.decisions import kept_heads
from jaxmorph.growth.plan import Plan, make_plan
from jaxmorph.train import main

SIZES = ["--n_layers", "2", "--d_model", "16", "--n_heads", "4", "--seq_len", "16"]
RUN = [*SIZES, "--data", "stdlib", "--tokenizer", "byte", "--max_steps", "20", "--run_dir", "run"]
HEADS = [[0, 1], [0, 2], [1, 0]]  # those that close; layer 1 keeps 3 open


def _row(name, value=None, **options):
    row = {"name": name, "value": value, "max_wait_iters": 2, "reevaluate": False}
    return row | ({"options": options} if options else {})


CLOSE, REMOVE = _row("set_gates", 0, heads=HEADS), _row("remove_heads")


def _argv(folder, rows, *more) -> list[str]:
    schedule = folder / "schedule.json"
    schedule.write_text(json.dumps(rows))
    return [*RUN, "--scaling_schedule_file", str(schedule), *more]


def _plan(folder, rows, mesh=MeshShape(), *more) -> Plan:  # noqa: B008 -- frozen
    plan = make_plan(resolve(_argv(folder, rows, *more))[0], mesh)
    return plan.completed(vocab_size=64, total=20)


# Gates, tensor, and the heads each layer keeps.
KEPT = {
    "fewer in both": ([[1, 0, 0, 0.5], [0, 2, 0, 1]], 1, [[0, 3], [1, 3]]),
    "closed ones fill up": ([[0, 0, 0, 1], [1, 0, 1, 1]], 1, [[0, 1, 3], [0, 2, 3]]),
    "none": ([[1, 1, 1, 1], [0, 0, 0, 0]], 1, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    "all closed": ([[0, 0, 0, 0], [0, 0, 0, 0]], 1, [[0], [0]]),
    "a small gate still adds something": ([[0, 0.05, 0, 0], [0, 0, 0, 1]], 1, [[1], [3]]),
    "up to what the mesh divides": ([[0, 1, 0, 0], [0, 0, 0, 1]], 2, [[0, 1], [0, 3]]),
    "never more than there are": ([[0, 1, 0], [0, 1, 1]], 4, [[0, 1, 2], [0, 1, 2]]),
    "no layers": ([], 1, []),
}


@pytest.mark.parametrize(("gates", "tensor", "kept"), KEPT.values(), ids=KEPT)
def test_heads_that_stay(gates, tensor, kept):
    heads = len(gates[0]) if gates else 4
    shape = shape_of(small_config(n_layers=len(gates), n_heads=heads))
    found = kept_heads({"head_gate": gates}, shape, MeshShape(tensor=tensor))
    assert [list(row) for row in found] == kept


def test_random_gates_lose_what_is_closed_and_nothing_else():
    rng = np.random.default_rng(0)
    for _ in range(200):
        layers, heads = rng.integers(1, 5), rng.integers(1, 9)
        tensor = int(rng.choice([1, 2, 4]))
        gates = np.where(rng.random((layers, heads)) < rng.random(), 0, rng.random((layers, heads)))
        shape = shape_of(small_config(n_layers=int(layers), n_heads=int(heads)))
        kept = kept_heads({"head_gate": gates.tolist()}, shape, MeshShape(tensor=tensor))
        count = len(kept[0])
        most = max(1, (gates != 0).sum(1).max())
        assert count == min(n for n in [*range(tensor, 99, tensor), heads] if n >= most)
        for row, own in zip(gates, kept, strict=True):
            assert len(own) == count
            assert list(own) == sorted(set(own))
            assert not np.delete(row, own).any()


def test_a_plan_assumes_the_largest_case_and_is_made_again_with_what_is_decided(tmp_path):
    rows = [CLOSE, REMOVE, _row("stack_layers", 2), _row("set_n_heads", 6)]
    plan = _plan(tmp_path, rows)
    assert [stage.shape.model.n_heads for stage in plan.stages] == [4, 4, 4, 4, 6]
    assert [stage.smallest.model.n_heads for stage in plan.stages] == [4, 4, 3, 3, 6]
    assert [stage.recompiles for stage in plan.stages] == [False, False, True, True, True]
    assert plan.decisions == {}
    decided = plan.with_decisions({"2": [[0, 3, 1], [1, 2, 3]]})
    assert [stage.shape.model.n_heads for stage in decided.stages] == [4, 4, 3, 3, 6]
    assert [stage.smallest for stage in decided.stages] == [s.shape for s in decided.stages]
    assert decided.decisions == {"2": ((0, 3, 1), (1, 2, 3))}
    assert not any(stage.bounds for stage in decided.stages)
    assert decided.with_decisions({}) == decided
    assert plan.entries != decided.entries


def test_a_later_entry_that_becomes_impossible_is_refused_and_foreseen(tmp_path):
    plan = _plan(tmp_path, [CLOSE, REMOVE, _row("widen_heads", 1.5)])
    (warning,) = plan.stages[3].warnings
    assert "widen_heads 1.5 may fail: with n_heads 3" in warning
    with pytest.raises(InputError, match=r"entry 3 \(widen_heads\): value: got 1.5, .* \(3 × 1.5"):
        plan.with_decisions({"2": [[0, 1, 3], [1, 2, 3]]})
    listed = [CLOSE, REMOVE, _row("set_gates", 1, heads=[[0, 3]])]
    with pytest.raises(InputError, match=r"entry 3 \(set_gates\): options: heads: got \[0, 3\]"):
        _plan(tmp_path, listed).with_decisions({"2": [[0, 1, 3], [1, 2, 3]]})


def test_dry_run_prints_bounds(tmp_path, capsys):
    assert main(_argv(tmp_path, [CLOSE, REMOVE, _row("stack_layers", 2)], "--dry_run")) == 0
    printed = capsys.readouterr().out
    words = "stage 2: remove_heads: n_heads 4, or fewer, down to 3, once heads are closed\n"
    assert words in printed
    rows = [line.split() for line in printed.splitlines()]
    assert [row[-2:] for row in rows if row[1:2] == ["remove_heads"]] == [["maybe", "yes"]]
    models = [row for row in rows if row[3:4] == ["≤"] and "×" in row]
    assert [(*row[:2], *row[3:7]) for row in models] == [
        ("2", "2", "≤", "4", "×", "4"), ("3", "4", "≤", "4", "×", "4"),
    ]  # fmt: skip
    assert all(row.count("≤") == 3 for row in models)  # heads, parameters and FLOPs


def test_a_size_set_after_it_is_known_and_may_change_something(tmp_path):
    """If n_heads is 3 by then, this is growth; if it is 4, nothing."""
    last = _plan(tmp_path, [CLOSE, REMOVE, _row("set_n_heads", 4)]).stages[-1]
    assert (last.may_be_smaller, last.recompiles, last.warnings) == (False, True, ())


CONTROLLED = ["--enable_head_lr", "--enable_controller", "--controller_warmup", "1"]

# Rows, flags, and what is said of it; it is refused if that begins with "entry".
SAID = {
    "none closed": ([REMOVE], [], "stage 1: remove_heads changes nothing: no head is closed by then"),
    "by the controller": (
        [REMOVE], CONTROLLED, "n_heads 4, or fewer, down to 1, once heads are closed"),
    "a mesh that divides some": (
        [CLOSE, REMOVE], ["--mesh", "tensor=2", *CONTROLLED],
        "n_heads 4, or fewer, down to 2, once heads are closed, so many that the mesh's tensor (2) "
        "divides them"),
    "a mesh that divides none": (
        [CLOSE, REMOVE], ["--mesh", "tensor=4"],
        "entry 2 (remove_heads): name: got 'remove_heads', expected an operation that can change "
        "something; here n_heads 4, as the mesh's tensor (4) divides no fewer"),
    "a value": (
        [{**REMOVE, "value": 0.5}], [],
        "entry 1 (remove_heads): value: got 0.5, expected null: remove_heads takes no value"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "more", "words"), SAID.values(), ids=SAID)
def test_what_is_said_of_it_before_the_run(rows, more, words, tmp_path, capsys):
    status = main(_argv(tmp_path, rows, "--dry_run", *more))
    said = capsys.readouterr()
    assert status == 2 * words.startswith("entry"), said.err
    assert words in (said.err or said.out)
