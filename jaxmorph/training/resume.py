"""Going on with a run: what must be the same, what may have changed, and the state itself."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmorph.cli.errors import InputError
from jaxmorph.config.settings import ModelConfig
from jaxmorph.growth.schedule import Entry, entry_sha256
from jaxmorph.model import gpt
from jaxmorph.model.blocks import Gates, Params
from jaxmorph.model.tree_paths import from_leaves, leaves_by_path
from jaxmorph.step.state import TrainState
from jaxmorph.storage.checkpoints import Checkpoints

# What cannot change what has happened. Corpus and tokenizer are held to by the corpus's digest.
CHANGEABLE = frozenset(
    [
        "max_steps",
        "num_epochs",
        "eval_interval",
        "eval_iters",
        "checkpoint_interval",
        "keep_checkpoints",
        "keep_best",
        "log_interval",
        "max_nonfinite_steps",
        "run_dir",
        "resume",
        "dry_run",
        "progress",
        "tensorboard",
        "wandb",
        "wandb_project",
        "data",
        "cache_dir",
        "mesh",
        "allow_warmup_past_end",
        "scaling_schedule_file",  # its entries are compared by themselves, see `check_schedule`
        "allow_schedule_change",
        "precompile",
        "simulate_loss",
    ]
)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands, as the host counts it; part of every checkpoint.

    Args:
      step: optimizer steps taken.
      examples: sequences read from the training stream of the present context length.
      tokens: tokens trained on.
      flops: floating-point operations spent on training.
      val_loss: newest validation loss; None before the first, or where it was not finite.
      next_operation: how many entries of the schedule have fired.
      last_operation_step: the step at which the last one did; 0 before the first.
      pending: what set off an operation that then could not be done; a resumed run tries it first.
    """

    step: int = 0
    examples: int = 0
    tokens: int = 0
    flops: int = 0
    val_loss: float | None = None
    next_operation: int = 0
    last_operation_step: int = 0
    pending: Literal["loss", "timeout"] | None = None


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint says of its run, beside the arrays."""

    position: Position
    model: ModelConfig
    settings: dict[str, Any]
    corpus_sha256: str
    schedule: list[dict[str, str]]  # name and sha256 of every entry, see `schedule_record`

    def to_meta(self) -> dict[str, Any]:
        """Return the record as JSON can hold it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_meta(meta: Mapping[str, Any]) -> CheckpointRecord:
        """Return the record that `to_meta` wrote."""
        return CheckpointRecord(
            Position(**meta["position"]),
            ModelConfig(**meta["model"]),
            dict(meta["settings"]),
            meta["corpus_sha256"],
            list(meta["schedule"]),
        )


def schedule_record(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """Return what a checkpoint says of a schedule: the name and a digest of every entry."""
    return [{"name": entry.name, "sha256": entry_sha256(entry)} for entry in entries]


def check_schedule(
    record: CheckpointRecord, entries: Sequence[Entry], file: str, allow_change: bool
) -> list[str]:
    """Return which entries differ from those the run knew, in words.

    Args:
      record: the checkpoint's.
      entries: the schedule now.
      file: where it stands, for messages.
      allow_change: whether entries that have not fired may differ.

    Raises:
      InputError: an entry that has fired was edited or is gone, or another one without permission.
    """
    now, fired, changes = schedule_record(entries), record.position.next_operation, []
    for number in range(1, max(len(now), len(record.schedule)) + 1):
        was, now_is = (rows[number - 1 : number] for rows in (record.schedule, now))
        if was == now_is:
            continue
        before, after = (rows[0]["name"] if rows else "none" for rows in (was, now_is))
        place = f"entry {number} ({before if was else after})"
        what = "edited" if before == after else f"{before} -> {after}"
        if number <= fired:
            expected = "the entry as it was, since it has fired; or another --run_dir"
            raise InputError(file, place, what, expected)
        if not allow_change:
            expected = (
                "the schedule the run began with; --allow_schedule_change permits other entries"
            )
            raise InputError(file, place, what, f"{expected} from {fired + 1} on")
        changes.append(f"scaling_schedule_file: {place}: {what}")
    return changes


def check_unchanged(
    record: CheckpointRecord, now: Mapping[str, Any], corpus_sha256: str, run_dir: str
) -> list[str]:
    """Return the settings that differ from the record's, as "name: old -> new".

    Raises:
      InputError: one of them would change what has happened, or the corpus is another one.
    """
    changed = {
        name: (record.settings[name], value)
        for name, value in now.items()
        if name in record.settings and record.settings[name] != value
    }
    listed = [f"{name}: {old} -> {new}" for name, (old, new) in changed.items()]
    if fixed := [name for name in changed if name not in CHANGEABLE]:
        raise InputError(
            run_dir,
            ", ".join(fixed),
            None,
            f"the settings the run began with, or another --run_dir (changed: {'; '.join(listed)})",
        )
    if record.corpus_sha256 != corpus_sha256:
        raise InputError(
            run_dir, "data", corpus_sha256[:12],
            f"the corpus the run began with ({record.corpus_sha256[:12]}), or another --run_dir",
        )  # fmt: skip
    return [line for line in listed if line.partition(":")[0] not in ("resume", "run_dir")]


def restore_state(
    checkpoints: Checkpoints, step: int, abstract: TrainState, shardings: TrainState
) -> TrainState:
    """Return the state of a checkpoint, laid out as `shardings` says.

    Args:
      checkpoints: the run's.
      step: which one.
      abstract: shapes and dtypes of the state.
      shardings: a sharding for each leaf.
    """
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    return from_leaves(abstract, checkpoints.restore(step, leaves_by_path(placed)))


def restore_model(checkpoints: Checkpoints, step: int, config: ModelConfig) -> tuple[Params, Gates]:
    """Return the parameters and gates of a checkpoint, on the first device, and nothing else of it."""
    abstract = jax.eval_shape(
        lambda: {
            "params": gpt.init(config, jax.random.key(0)),
            "gates": gpt.open_gates(config),
        }
    )
    restored = checkpoints.restore(step, leaves_by_path(abstract), part=True)
    whole = from_leaves(abstract, restored)
    return whole["params"], whole["gates"]


def with_total_steps(state: TrainState, total: int) -> TrainState:
    """Return the state of a run whose length was changed: the schedule's end moves with it."""
    like = state.knobs.total_steps
    moved = jax.device_put(jnp.asarray(total, like.dtype), like.sharding)
    return dataclasses.replace(state, knobs=dataclasses.replace(state.knobs, total_steps=moved))


def finite_or_none(value: float) -> float | None:
    """Return a loss as a checkpoint records it."""
    return value if math.isfinite(value) else None


def same_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as it comes back from JSON, so that it can be compared with one that did."""
    return json.loads(json.dumps(value))
