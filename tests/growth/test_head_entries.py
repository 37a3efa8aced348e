"""Operations on heads in the walk: what is refused, and how many heads it takes to be closed."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from schedule_entries import ONE, entries, entry, make_shape

from jaxmorph.cli.errors import InputError
from jaxmorph.config.closed_heads import ClosedHeads
from jaxmorph.growth.operations import OPERATIONS
from jaxmorph.growth.plan import walk
from jaxmorph.growth.schedule import load_schedule
from jaxmorph.train import main

LISTED = {"by": "listed"}


def _row(name, value, **options):
    return entry(name, value, options=options)


# Rows whose last is refused, of 4 layers × 4 heads: (rows, field, words)
REFUSED = {
    "no such layer": ([_row("set_gates", 0, heads=[[4, 0]])], "options: heads", ["4 layers × 4"]),
    "no such head": ([_row("prune_heads", 1, **LISTED, heads=[[0, 0], [3, 4]])], "options: heads",
                     ["got [3, 4]", "4 layers × 4 heads", "up to [3, 3]"]),
    "none closed": ([_row("regrow_heads", 1)], "name", ["prune_heads", "--enable_controller"]),
    "none closed any more": (
        [_row("prune_heads", 0.5), _row("regrow_heads", 1), _row("regrow_heads", 1)],
        "name", ["set_gates"],
    ),
    "none closed by open gates": (
        [_row("set_gates", 0), _row("set_gates", 0.2), _row("regrow_heads", 1)], "name", ["closed"],
    ),
    "too many": ([_row("prune_heads", 0.82)], "value", ["at most 12 of 16", "(--min_heads"]),
    "too many by and by": (
        [_row("prune_heads", 0.5), _row("prune_heads", 0.5), _row("prune_heads", 0.5)],
        "value", ["at most 0 of 4 open heads", "1 of the 4 in each layer stays open"],
    ),
    "too many of a layer": (
        [_row("prune_heads", 1, **LISTED, heads=[[2, h] for h in range(4)])], "options: heads",
        ["at most 3 heads of layer 2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "field", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_by_then_is_refused_with_its_entry(rows, field, words):
    with pytest.raises(InputError) as caught:
        walk(entries(*rows), make_shape(), ONE, "schedule.json")
    last = f"schedule.json: entry {len(rows)} ({rows[-1]['name']}): {field}: "
    assert str(caught.value).startswith(last)
    assert [word for word in words if word not in str(caught.value)] == []
    if len(rows) > 1:
        walk(entries(*rows[:-1]), make_shape(), ONE, "schedule.json")


ODD = {
    "not a list": (_row("set_gates", 0, heads=3), "options: heads", ["got 3", "[[0, 1], [2, 0]]"]),
    "no heads": (_row("set_gates", 0, heads=[]), "options: heads", ["pairs"]),
    "no pairs": (_row("set_gates", 0, heads=[0, 1]), "options: heads", ["pairs"]),
    "negative": (_row("set_gates", 0, heads=[[0, -1]]), "options: heads", ["pairs"]),
    "true for a number": (_row("set_gates", 0, heads=[[0, True]]), "options: heads", ["pairs"]),
    "three": (_row("set_gates", 0, heads=[[0, 1, 2]]), "options: heads", ["pairs"]),
    "null": (_row("set_gates", 0, heads=None), "options: heads", ["'null'"]),
    "twice": (_row("set_gates", 0, heads=[[0, 1], [1, 1], [0, 1]]), "options: heads",
              ["[0, 1]", "each head once"]),
    "not listed": (_row("prune_heads", 1, heads=[[0, 1]]), "options: heads",
                   ["by listed with it (it is importance)"]),
    "no list": (_row("regrow_heads", 1, **LISTED), "options: heads", ["the option heads"]),
    "other choice": (_row("prune_heads", 1, by="weight"), "options: by", ["importance, random, listed"]),
    "gate above 1": (_row("set_gates", 1.5), "value", ["1.5", "≤ 1"]),
    "fraction of 0": (_row("prune_heads", 0), "value", ["> 0"]),
    "fraction above 1": (_row("regrow_heads", 2), "value", ["≤ 1"]),
    "other weights": (_row("regrow_heads", 1, weights="old"), "options: weights", ["fresh, kept"]),
}  # fmt: skip


@pytest.mark.parametrize(("row", "field", "words"), ODD.values(), ids=ODD)
def test_an_odd_entry_is_refused_in_its_file(row, field, words, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(InputError) as caught:
        load_schedule(path)
    assert f"entry 1 ({row['name']}): {field}: " in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_the_command_refuses_without_jax(tmp_path, capsys):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps([_row("set_gates", 0, heads=[[0, 9]])]))
    code = (
        "import sys; from jaxmorph.train import main; "
        f"code = main(['--dry_run', '--scaling_schedule_file', {str(path)!r}]); "
        "sys.exit(9 if 'jax' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "entry 1 (set_gates): options: heads: got [0, 9]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_controller_may_have_closed_any_head(tmp_path, capsys):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps([_row("regrow_heads", 1, weights="kept"), _row("prune_heads", 0.5)]))
    flags = ["--dry_run", "--scaling_schedule_file", str(path), "--max_steps", "2000"]
    assert main(flags) == 2
    assert main([*flags, "--enable_head_lr", "--enable_controller"]) == 0
    told = capsys.readouterr().out
    rows = [line.split() for line in told.splitlines() if "_heads " in line]
    assert [row[-2:] for row in rows[:2]] == [["no", "no"]] * 2
    assert "changes the function: heads add at once what they added when they closed" in told
    assert "changes nothing" not in told


SET, FAINT = _row("set_gates", 0, heads=[[0, 0]]), _row("set_gates", 0.1, heads=[[0, 0]])


@pytest.mark.parametrize(
    ("before", "exact"),
    [
        ([SET], True),
        ([FAINT], False),
        ([FAINT, _row("set_gates", 0, heads=[[1, 1]])], False),
        ([FAINT, _row("set_gates", 0)], True),
        ([FAINT, _row("set_gates", 1), SET], True),
    ],
)
def test_heads_open_exactly_where_their_gates_were_0(before, exact):
    rows = [*before, _row("regrow_heads", 0.5)]
    assert walk(entries(*rows), make_shape(), ONE, "")[-1].exact == exact


def _closed_after(name, value, options, closed, least, rng):
    """Bool [layer, head], closed after an operation that chooses by `rng`, as it is documented."""
    closed, listed = closed.copy(), options.get("heads")
    heads = [tuple(h) for h in (listed or np.argwhere(np.ones_like(closed)).tolist())]
    if name == "set_gates":
        for head in heads:
            closed[head] = value <= 0.1
        return closed
    if not listed:
        rng.shuffle(heads)
    pruning = name == "prune_heads"
    candidates = [head for head in heads if closed[head] != pruning]
    count = max(1, math.floor(value * len(candidates))) if candidates else 0
    for layer, head in candidates:
        if count and not (pruning and (~closed[layer]).sum() <= least):
            closed[layer, head], count = pruning, count - 1
    return closed


def test_the_walk_bounds_how_many_heads_are_closed():
    rng, refused, exact = np.random.default_rng(0), 0, 0
    for _ in range(400):
        layers, heads, least = (int(n) for n in rng.integers((1, 2, 1), (4, 5, 3)))
        shape = make_shape(n_layers=layers, n_heads=heads, closed=ClosedHeads(least_open=least))
        closed = np.zeros((layers, heads), bool)
        for _ in range(5):
            name = str(rng.choice(["set_gates", "prune_heads", "regrow_heads"]))
            value, options = float(rng.choice([0.1, 0.25, 0.5, 1.0])), {}
            if rng.random() < 0.5:
                every = np.argwhere(np.ones((layers, heads))).tolist()
                listed = rng.permutation(every)[: rng.integers(1, len(every) + 1)].tolist()
                options = {"heads": listed} | ({} if name == "set_gates" else LISTED)
            try:
                shape = OPERATIONS[name].next_shape(shape, value, options)
            except ValueError:
                refused += 1
                assert name != "set_gates"
                if name == "regrow_heads":
                    assert not closed.any()
                elif not options:
                    count = max(1, math.floor(value * (~closed).sum()))
                    assert closed.sum() + count > layers * (heads - least)
                continue
            closed = _closed_after(name, value, options, closed, least, rng)
            bounds = shape.closed
            assert bounds.fewest <= closed.sum() <= bounds.most, (name, value, options, bounds)
            exact += bounds.fewest == bounds.most
    assert refused > 100
    assert exact > 400


@pytest.mark.parametrize(("operation", "value", "bounds"), [
    ("stack_layers", 2, (8, 24)), ("widen_heads", 2, (8, 24)), ("widen_mlp", 2, (8, 8)),
])  # fmt: skip
def test_copies_of_closed_heads_are_closed_too(operation, value, bounds):
    rows = _row("prune_heads", 0.5), entry(operation, value)
    *_, last = walk(entries(*rows), make_shape(), ONE, "")
    assert (last.shape.closed.fewest, last.shape.closed.most) == bounds
