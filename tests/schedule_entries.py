"""What the tests of schedules share: a run's shape, rows of a schedule file, and entries of them."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from small_models import resolved

from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.start import model_config
from jaxmorph.growth.operations import OPERATIONS
from jaxmorph.growth.schedule import Entry

GOOD = {
    "name": "change_lr",
    "value": 0.5,
    "trigger_loss": 3.0,
    "max_wait_iters": 100,
    "reevaluate": False,
}
ONE = MeshShape()


def entry(name: Any = "change_lr", value: Any = 0.5, **changes) -> dict:
    """One row of a schedule, good unless changed."""
    return GOOD | {"name": name, "value": value} | changes


def without(name: str) -> dict:
    """The good row without one of its fields."""
    return _without(GOOD, name)


def entries(*rows: dict) -> tuple[Entry, ...]:
    """The entries of rows as a file has them, not checked."""
    return tuple(
        Entry(OPERATIONS[row["name"]], **_without(row, "name"), number=number)
        for number, row in enumerate(rows, 1)
    )


def _without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


def make_shape(**changes) -> RunShape:
    """4 layers × 64, 4 heads × 16, MLP 96, rotary, context 48, ranks 16 and 8, batch 10."""
    settings = resolved("--n_layers", "4", "--d_model", "64", "--n_heads", "4", "--d_ff", "96")
    model = dataclasses.replace(
        model_config(settings, 50),
        seq_len=48,
        positions="rotary",
        attn_lora_rank=16,
        vocab_lora_rank=8,
    )
    model_fields = {field.name for field in dataclasses.fields(model)}
    sizes = {name: size for name, size in changes.items() if name in model_fields}
    shape = RunShape(
        model=dataclasses.replace(model, **sizes),
        batch_size=10,
        grad_accum_steps=3,
        eval_iters=7,
        eval_interval=100,
        warmup_steps=50,
        learning_rate=1e-3,
        lr_multiplier=2.0,
        lora_alpha=32.0,
    )
    return dataclasses.replace(shape, **{n: c for n, c in changes.items() if n not in sizes})


def step_by_step(rows, curve, total, min_change):
    """The contract read literally: every step of the run, one after the other."""
    losses, queue, fired = dict(curve), list(rows), []
    last, newest, best, evaluations = 0, math.nan, None, 0
    for step in range(total + 1):
        val_loss = math.nan  # which is below nothing
        if step in losses:
            newest = val_loss = losses[step]
            if math.isfinite(val_loss) and (
                best is None or val_loss < best - min_change * abs(best)
            ):
                best, evaluations = val_loss, 0
            else:
                evaluations += 1
        while queue:
            threshold, patience, wait, again = queue[0]
            if threshold and math.isfinite(val_loss) and val_loss < threshold:
                reason = "loss"
            elif patience and evaluations >= patience:
                reason = "plateau"
            elif wait and step - last >= wait:
                reason = "timeout"
            else:
                break
            fired.append((step, reason, newest, step - last))
            last, val_loss, evaluations = step, newest, 0
            best = newest if again and math.isfinite(newest) else None
            queue.pop(0)
    return fired


def random_schedules(
    count: int,
) -> Iterator[tuple[list[tuple], list[tuple[int, float]], int, float]]:
    """Schedules of triggers, loss curves with NaN, ±inf and negative losses, run lengths, changes."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        total = int(rng.integers(5, 40))
        steps = np.flatnonzero(rng.random(total) < rng.choice([0.2, 0.6])).tolist() or [0]
        values = [-2.0, -1.9, 1.0, 1.9, 2.0, 2.1, 3.0, math.nan, math.inf, -math.inf]
        losses = rng.choice(values, len(steps))
        rows = []
        for _ in range(rng.integers(1, 6)):
            have = rng.integers(1, 8)  # bits: which of the triggers
            triggers = (float(rng.integers(1, 4)) + 0.5, *rng.integers(1, (4, 12)).tolist())
            given = [t if have >> bit & 1 else None for bit, t in enumerate(triggers)]
            rows.append((*given, bool(rng.random() < 0.5)))
        curve = list(zip(steps, losses.tolist(), strict=True))
        yield rows, curve, total, float(rng.choice([0.0, 0.05, 0.2]))


def schedule_of(rows: list[tuple]) -> tuple[Entry, ...]:
    """Entries with these triggers: loss, plateau, wait, and whether they re-evaluate."""
    names = ("trigger_loss", "trigger_plateau", "max_wait_iters", "reevaluate")
    return entries(*(entry(**dict(zip(names, row, strict=True))) for row in rows))
