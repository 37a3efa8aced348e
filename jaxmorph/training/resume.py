"""Resume a run: what must be the same, what may have changed, and the state itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.printing import say, sentence
from jaxmorph.config.fields import changeable, values_of
from jaxmorph.config.model_config import ModelConfig
from jaxmorph.growth.schedule import Entry, entry_sha256
from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_axis_sizes
from jaxmorph.model.blocks import Gates, Params
from jaxmorph.model.tree_paths import from_leaves, leaves_by_path
from jaxmorph.step.state import GATES, Start, TrainState, Variable, gates_of
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.storage.declared import mismatch
from jaxmorph.storage.json_lines import LogMark
from jaxmorph.training.position import Position
from jaxmorph.training.preparation import Setup


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint stores about its run besides the arrays."""

    position: Position
    model: ModelConfig
    settings: dict[str, Any]
    corpus_sha256: str
    schedule: list[dict[str, str]]  # name and sha256 of every entry, see `schedule_record`
    logs: dict[str, LogMark]  # see `RunLogs.sync`; without those of an older format
    decisions: dict[str, list[list[int]]]  # see `Plan.decisions`

    @staticmethod
    def of(setup: Setup, position: Position) -> CheckpointRecord:
        """Return the record of a run at a position; its logs are on disk on return."""
        return CheckpointRecord(
            position,
            setup.plan.stages[position.next_operation].shape.model,
            same_json(values_of(setup.settings)),
            setup.corpus.sha256,
            schedule_record(setup.plan.entries),
            setup.logs.sync(),
            same_json(setup.plan.decisions),
        )

    def to_meta(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_meta(meta: Mapping[str, Any]) -> CheckpointRecord:
        """Return the record that `to_meta` wrote."""
        return CheckpointRecord(
            Position.from_json(meta["position"]),
            ModelConfig(**meta["model"]),
            dict(meta["settings"]),
            meta["corpus_sha256"],
            list(meta["schedule"]),
            {name: LogMark(**mark) for name, mark in meta["logs"].items()},
            dict(meta["decisions"]),
        )

    @staticmethod
    def problem_of(meta: Any) -> str | None:
        """Return why a checkpoint's meta is not a record that `to_meta` wrote; None if it is one."""
        if problem := mismatch(meta, CheckpointRecord):
            return problem
        fired, entries = meta["position"]["next_operation"], len(meta["schedule"])
        return f"position.next_operation is {fired}, of {entries}" if fired > entries else None


def open_checkpoints(
    run_dir: Path,
    keep: int = 1,
    keep_best: bool = False,
    check_lock: Callable[[], None] = lambda: None,
) -> Checkpoints:
    """Return the checkpoints of a run; one whose meta is not a `CheckpointRecord` counts as corrupt.

    Args:
      run_dir: the run folder.
      keep: see `Checkpoints`.
      keep_best: likewise.
      check_lock: likewise; a reader needs no lock.
    """
    return Checkpoints(
        run_dir / "checkpoints",
        keep,
        keep_best,
        meta_problem=CheckpointRecord.problem_of,
        check_lock=check_lock,
    )


def schedule_record(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """Return what a checkpoint stores about a schedule: name and digest of every entry."""
    return [{"name": entry.name, "sha256": entry_sha256(entry)} for entry in entries]


def check_schedule(
    record: CheckpointRecord, entries: Sequence[Entry], file: str, allow_change: bool
) -> list[str]:
    """Return a description of the entries that differ from the record's.

    Args:
      record: the checkpoint's record.
      entries: the current schedule.
      file: its file, for messages.
      allow_change: whether entries that have not fired may differ.

    Raises:
      InputError: an entry that has fired was edited or removed, or another one without permission.
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
      InputError: one of them affects steps already taken, or the corpus is a different one.
    """
    changed = {
        name: (record.settings[name], value)
        for name, value in now.items()
        if name in record.settings and record.settings[name] != value
    }
    listed = [f"{name}: {old} -> {new}" for name, (old, new) in changed.items()]
    if fixed := [name for name in changed if not changeable(name)]:
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
    where_it_lies = (
        "resume",
        "run_dir",
        "scaling_schedule_file",
    )  # entries are compared one by one
    return [line for line in listed if line.partition(":")[0] not in where_it_lies]


def resume(setup: Setup, step: int) -> tuple[TrainState, Position]:
    """Return the state and position of a checkpoint; some settings of the run may have changed.

    The run's logs are checked, not yet cut back.

    Raises:
      InputError: a change that affects steps already taken, or a damaged log that is not accepted.
    """
    record = CheckpointRecord.from_meta(setup.checkpoints.read_meta(step))
    settings = setup.settings
    now = same_json(values_of(settings))
    changes = check_unchanged(record, now, setup.corpus.sha256, str(setup.run_dir))
    changes += check_schedule(
        record,
        setup.plan.entries,
        str(settings.growth.scaling_schedule_file or "--scaling_schedule_file"),
        settings.growth.allow_schedule_change,
    )
    accept = settings.run.accept_damaged_log
    damaged = setup.logs.check(record.position, record.logs, accept=accept)
    setup.compiler.replan(setup.plan.with_decisions(record.decisions))
    programs = setup.compiler.uncompiled(record.position.next_operation)
    shape = setup.plan.stages[record.position.next_operation].shape
    state = restore_state(
        setup.checkpoints,
        step,
        programs.abstract_state,
        programs.state_shardings,
        variables_since(
            setup.checkpoints.format_of(step),
            setup.tables.step.variables,
            Start(settings, shape, setup.total_steps),
        ),
    )
    lines = [f"changed {line}" for line in changes] + [f"accepted {note}" for note in damaged]
    say(f"Resuming at step {step}." + "".join(f"\n  {sentence(line)}" for line in lines))
    return _with_total_steps(state, setup.total_steps), record.position


def restore_state(
    checkpoints: Checkpoints,
    step: int,
    abstract: TrainState,
    shardings: TrainState,
    added: Mapping[str, Any] | None = None,
) -> TrainState:
    """Return the state of a checkpoint with the given shardings.

    Args:
      checkpoints: the run's checkpoints.
      step: the step to restore.
      abstract: shapes and dtypes of the state.
      shardings: a sharding for each leaf.
      added: values of variables that the checkpoint does not have, by name.
    """
    stored = {name: v for name, v in abstract.variables.items() if name not in (added or {})}
    old = dataclasses.replace(abstract, variables=stored)
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        old,
        dataclasses.replace(
            shardings, variables={name: shardings.variables[name] for name in stored}
        ),
    )
    state = from_leaves(old, checkpoints.restore(step, leaves_by_path(placed)))
    fresh = {
        name: jax.device_put(value, shardings.variables[name])
        for name, value in (added or {}).items()
    }
    return dataclasses.replace(state, variables=state.variables | fresh)


def variables_since(number: int, variables: Mapping[str, Variable], start: Start) -> dict[str, Any]:
    """Return the first values of the variables that checkpoints of an older format do not have.

    Args:
      number: the format.
      variables: the declared ones.
      start: the settings, and the shape of the run where it goes on.
    """
    sizes = gpt_axis_sizes(start.shape.model)
    return {v: each.begin(start, sizes) for v, each in variables.items() if each.since > number}


def restore_model(checkpoints: Checkpoints, step: int, config: ModelConfig) -> tuple[Params, Gates]:
    """Return only the parameters and gates of a checkpoint, on the first device."""
    abstract = jax.eval_shape(
        lambda: {
            "params": gpt.init(config, jax.random.key(0)),
            "variables": {GATES[name]: gate for name, gate in gpt.open_gates(config).items()},
        }
    )
    restored = checkpoints.restore(step, leaves_by_path(abstract), part=True)
    whole = from_leaves(abstract, restored)
    return whole["params"], gates_of(whole["variables"])


def _with_total_steps(state: TrainState, total: int) -> TrainState:
    """Return the state with the end of the learning-rate schedule moved to a changed run length."""
    like = state["total_steps"]
    moved = jax.device_put(jnp.asarray(total, like.dtype), like.sharding)
    return state.with_variables(total_steps=moved)


def same_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping after a JSON round trip, to compare it with one read from JSON."""
    return json.loads(json.dumps(value))
