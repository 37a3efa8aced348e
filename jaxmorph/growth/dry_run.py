"""What a scaling schedule would do to a run: its stages, and when each would start."""

from __future__ import annotations

import bisect
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.text_file import read_text
from jaxmorph.cli.wording import aligned, short_flops
from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.growth.fitting import Forecast, Room, forecasts, in_bytes
from jaxmorph.growth.plan import Stage
from jaxmorph.growth.schedule import Entry
from jaxmorph.growth.triggers import LossTrend, Reason, due
from jaxmorph.growth.values import shown
from jaxmorph.model.architecture import (
    flops_per_token,
    parameter_count,
)

_LARGEST_CURVE = 16_000_000  # bytes: some 600,000 evaluations
Curve = Sequence[tuple[int, float]]
_STEP = re.compile(r"[0-9]{1,10}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf)", re.ASCII)


@dataclass(frozen=True)
class Firing:
    """When an entry fires on a loss curve.

    Args:
      entry: the entry.
      step: optimizer steps taken.
      reason: what triggers it.
      val_loss: the newest validation loss; None before the first.
      waited: steps since the previous operation, or since the start.
    """

    entry: Entry
    step: int
    reason: Reason
    val_loss: float | None
    waited: int


def walk_report(
    stages: Sequence[Stage],
    optimizer: OptimizerSettings,
    mesh: MeshShape | None = None,
    room: Room | None = None,
) -> str:
    """Return the stages of a run as aligned text: the operation, the model and training of each.

    Models, memory and training are listed only where they change.

    Args:
      stages: what `plan.walk` returns.
      optimizer: its state counts towards the memory.
      mesh: what the memory is spread over; None: a single device.
      room: the memory there is; None: not known.
    """
    warnings = [
        f"  stage {stage.number}: {warning}" for stage in stages for warning in stage.warnings
    ]
    parts = [
        "Operations:",
        _table(
            [
                ("stage", "operation", "fires", "compiles", "keeps the function"),
                *_operations(stages),
            ]
        ),
        "Models, from the stage named:",
        _table([_MODEL_COLUMNS, *_where_changed(_models(stages))]),
        memory_report(stages, optimizer, mesh, room),
        "Training, from the stage named:",
        _table([_TRAINING_COLUMNS, *_where_changed([_training(s.shape) for s in stages])]),
        *_decided_later(stages),
        *(["Warnings:", "\n".join(warnings)] if warnings else []),
    ]
    return "\n".join(parts)


def _decided_later(stages: Sequence[Stage]) -> list[str]:
    """Return what operations decide only when they fire; nothing if there are none."""
    lines = [
        f"  stage {stage.number}: {stage.entry.name}: {stage.bounds}"
        for stage in stages
        if stage.bounds and stage.least and stage.entry
    ]
    head = "Decided when it fires (sizes from there on are the largest possible):"
    return [head, *lines] if lines else []


def memory_report(
    stages: Sequence[Stage],
    optimizer: OptimizerSettings,
    mesh: MeshShape | None = None,
    room: Room | None = None,
) -> str:
    """Return the memory of each stage as aligned text, and whether it fits; see `walk_report`."""
    room = room or Room()
    memory = forecasts(stages, optimizer, mesh or MeshShape(), room)
    parts = [
        "Memory of each device, from the stage named (activations are an estimate):",
        _table([_MEMORY_COLUMNS, *_memory_rows(memory)]),
        *_limits(memory, room),
    ]
    return "\n".join(parts)


_MODEL_COLUMNS = (
    "stage", "layers", "width", "heads", "MLP", "ranks", "context", "parameters", "FLOPs/token",
)  # fmt: skip
_MEMORY_COLUMNS = (
    "stage", "memory", "= parameters", "+ gradients", "+ optimizer", "activations",
    "old + new state", "fits",
)  # fmt: skip
_TRAINING_COLUMNS = (
    "stage", "batch", "accum.", "tokens/step", "lr ×", "peak lr", "warmup", "alpha", "eval iters",
    "eval interval",
)  # fmt: skip


def _operations(stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    rows = []
    for stage in stages:
        if (entry := stage.entry) is None:
            rows.append((str(stage.number), "the start", "at step 0", "yes", "-"))
            continue
        chosen = "".join(f" {name}={shown(given)}" for name, given in entry.options.items())
        compiles = "maybe" if stage.bounds and stage.least else "yes" if stage.recompiles else "no"
        function = "yes" if stage.exact else "no"
        again = ", re-evaluates" if entry.reevaluate else ""
        rows.append(
            (
                str(stage.number),
                f"{entry.title}{chosen}",
                _trigger(entry) + again,
                compiles,
                function,
            )
        )
    return rows


def _trigger(entry: Entry) -> str:
    loss = [] if entry.trigger_loss is None else [f"below {entry.trigger_loss:g}"]
    number, wait = entry.trigger_plateau, entry.max_wait_iters
    evaluations = f"after {number} evaluation{'' if number == 1 else 's'} without improvement"
    plateau = [] if number is None else [evaluations]
    waited = [] if wait is None else [f"after {wait} steps"]
    return " or ".join(loss + plateau + waited)


def _where_changed(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the rows that differ from the previous one, each after its number."""
    pairs = zip([None, *rows], rows, strict=False)
    return [(str(number), *row) for number, (last, row) in enumerate(pairs) if row != last]


def _models(stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    """Return the model's columns at every stage; counted only where a stage has another model."""
    rows: list[tuple[str, ...]] = []
    for before, stage in zip([None, *stages], stages, strict=False):
        same = before is not None and _keys(before) == _keys(stage)
        rows.append(rows[-1] if same else _model(stage))
    return rows


def _keys(stage: Stage) -> tuple:
    return stage.shape.program_key, stage.smallest.program_key


def _memory_rows(memory: Sequence[Forecast]) -> list[tuple[str, ...]]:
    """Return the rows of stages that hold something else, or whose operation moves the state."""
    pairs = enumerate(zip([None, *memory], memory, strict=False))
    return [
        (str(number), *_memory(now))
        for number, (last, now) in pairs
        if last is None
        or now.change
        or (now.held, now.activations) != (last.held, last.activations)
    ]


def _memory(forecast: Forecast) -> tuple[str, ...]:
    held = forecast.held
    sizes = (held.total, held.parameters, held.gradients, held.optimizer, forecast.activations)
    change = in_bytes(forecast.change) if forecast.change else "-"
    return (*(in_bytes(size) for size in sizes), change, forecast.verdict)


def _limits(memory: Sequence[Forecast], room: Room) -> list[str]:
    """Return the limit the memory was held against, and what of it is needed at most."""
    if not room.device:
        return ["Fits: known when the run starts, as the devices' memory is not known before"]
    most = max((forecast.expected for forecast in memory), key=lambda need: need.bytes)
    shared = f" shared by {room.sharing} devices" if room.sharing > 1 else ""
    lines = [f"Fits: the most is {most}{shared}; with a GPU or TPU, see when the run starts"]
    if any(forecast.lacking for forecast in memory):
        lines.append(
            "What does not fit is refused when the run starts (--allow_oversized permits it)."
        )
    return lines


def _model(stage: Stage) -> tuple[str, ...]:
    shape, model = stage.shape, stage.shape.model
    most = "≤ " if stage.may_be_smaller else ""
    ranks = f"{model.attn_lora_rank}, {model.vocab_lora_rank}"
    return (
        str(model.n_layers),
        str(model.d_model),
        f"{most}{model.n_heads} × {model.head_dim}",
        str(model.d_ff),
        ranks if model.attn_lora_rank or model.vocab_lora_rank else "-",
        str(model.seq_len),
        f"{most}{parameter_count(model):,}",
        most + short_flops(flops_per_token(model, shape.frozen_layers)),
    )


def _training(shape: RunShape) -> tuple[str, ...]:
    tokens = shape.batch_size * shape.grad_accum_steps * shape.model.seq_len
    has_lora = shape.model.attn_lora_rank or shape.model.vocab_lora_rank
    return (
        str(shape.batch_size),
        str(shape.grad_accum_steps),
        f"{tokens:,}",
        f"{shape.lr_multiplier:g}",
        f"{shape.learning_rate * shape.lr_multiplier:g}",
        str(shape.warmup_steps),
        f"{shape.lora_alpha:g}" if has_lora else "-",
        str(shape.eval_iters),
        str(shape.eval_interval),
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(aligned(rows))


def read_curve(path: Path) -> list[tuple[int, float]]:
    """Return the evaluations of a CSV file with the header `step,loss`.

    Raises:
      InputError: a wrong header, a malformed row, or steps that do not increase; names the line.
    """
    where, rows = str(path), csv.reader(io.StringIO(read_text(path, _LARGEST_CURVE)), strict=True)
    curve: list[tuple[int, float]] = []
    try:
        header = next(rows, [])
        if header != ["step", "loss"]:
            raise InputError(where, "line 1", ",".join(header), "the header step,loss")
        for row in rows:
            curve.append(_point(where, rows.line_num, row))
            if len(curve) > 1 and curve[-1][0] <= curve[-2][0]:
                raise InputError(
                    where, f"line {rows.line_num}: step", row[0], f"a step after {curve[-2][0]}"
                )
    except csv.Error as error:
        raise InputError(where, f"line {rows.line_num}", None, f"valid CSV ({error})") from None
    if not curve:
        raise InputError(where, "", None, "a row for each evaluation")
    return curve


def _point(where: str, line: int, row: Sequence[str]) -> tuple[int, float]:
    if len(row) != 2:
        raise InputError(where, f"line {line}", ",".join(row), "two columns, step and loss")
    step, loss = (cell.strip() for cell in row)
    if not _STEP.fullmatch(step):
        raise InputError(where, f"line {line}: step", step, "a whole number ≥ 0")
    if not _NUMBER.fullmatch(loss.lower()):
        raise InputError(where, f"line {line}: loss", loss, "a number (nan and inf are)")
    return int(step), float(loss)


def simulate(
    entries: Sequence[Entry], curve: Curve, *, min_change: float, total: int | None = None
) -> list[Firing]:
    """Return when each entry would fire if the run's evaluations followed this curve, in order.

    A re-evaluation is assumed to give the newest loss again. Entries that never fire are omitted.

    Args:
      entries: the schedule.
      curve: (step, loss) of each evaluation, steps increasing.
      min_change: see `LossTrend.after`.
      total: the last step of the run; None: that of the curve.
    """
    end = curve[-1][0] if total is None else total
    steps, losses = [step for step, _ in curve], dict(curve)
    firings: list[Firing] = []
    step, last, trend = 0, 0, LossTrend()
    if (val_loss := losses.get(0)) is not None:
        trend = trend.after(val_loss, min_change)
    newest = val_loss
    for entry in entries:
        while (reason := due(entry, step, last, val_loss, trend)) is None:
            wait = [] if entry.max_wait_iters is None else [last + entry.max_wait_iters]
            evaluated = bisect.bisect_right(steps, step)
            step = min(steps[evaluated : evaluated + 1] + wait, default=end + 1)
            if step > end:
                return firings
            if (val_loss := losses.get(step)) is not None:
                newest, trend = val_loss, trend.after(val_loss, min_change)
        firings.append(Firing(entry, step, reason, newest, step - last))
        last, val_loss = step, newest
        trend = LossTrend.since_operation(newest if entry.reevaluate else None)
    return firings


def simulation_report(entries: Sequence[Entry], firings: Sequence[Firing], end: int) -> str:
    """Return when each entry fires, one line each.

    Args:
      entries: the schedule.
      firings: what `simulate` returns.
      end: the last step of the run.
    """
    rows = [("entry", "operation", "step", "reason", "loss", "waited")]
    for number, entry in enumerate(entries, 1):
        if number > len(firings):
            rows.append((str(number), entry.name, "-", f"not by step {end}", "-", "-"))
            continue
        firing = firings[number - 1]
        loss = "-" if firing.val_loss is None else f"{firing.val_loss:g}"
        row = (str(number), entry.name, str(firing.step), firing.reason, loss, str(firing.waited))
        rows.append(row)
    return "On the given loss curve the operations fire:\n" + _table(rows)
