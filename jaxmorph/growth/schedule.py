"""The scaling schedule: a file of operations and what sets each off, checked in full before a run.

A schedule is a list of entries, in JSON or YAML, taken from its head: an entry fires when the
validation loss falls below its threshold or when it has waited long enough (`due`). `load_schedule`
checks the file by itself; `walk` follows it over the sizes of a run, so that every stage is known,
and known to be possible, before the first step.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.cli.json_file import read_json
from jaxmorph.cli.wording import repeatable
from jaxmorph.cli.yaml_file import read_yaml
from jaxmorph.config.run_shape import (
    LARGEST_COUNT,
    OperationError,
    RunShape,
    check_number,
    whole_product,
)
from jaxmorph.config.settings import Within
from jaxmorph.growth.operations import OPERATIONS, Operation

_REQUIRED = ("name", "value", "reevaluate")
_FIELDS = (*_REQUIRED, "trigger_loss", "max_wait_iters", "desc", "options", "completed")
_LONGEST_QUOTE = 80  # characters of what the user wrote
_LOSS = Within(above=0, high=1e9)
_WAIT = Within(low=1, high=LARGEST_COUNT)


@dataclass(frozen=True)
class Entry:
    """One operation of a schedule and what sets it off.

    Args:
      name: of the operation.
      value: a number, or None for an operation that takes none.
      trigger_loss: fires below this validation loss; None: never for its loss.
      max_wait_iters: fires this many steps after the last operation; None: never for its wait.
      reevaluate: whether the validation loss is measured again right after it.
      desc: what the file says of it.
      options: as the file gives them; `Operation.with_defaults` adds the others.
      number: its place in the file, from 1.
      warnings: what is odd about it and was let pass.
    """

    name: str
    value: float | int | None
    trigger_loss: float | None
    max_wait_iters: int | None
    reevaluate: bool
    desc: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def operation(self) -> Operation:
        """Return what the table says of it."""
        return OPERATIONS[self.name]


@dataclass(frozen=True)
class Stage:
    """A run between two operations.

    Args:
      entry: the operation that leads here; None at the start.
      shape: sizes and numbers of the run.
      architecture: how many architectures it has left behind.
      recompiles: whether it needs other programs than the stage before.
      exact: whether the operation keeps the function.
      warnings: what is odd about the operation and was let pass.
    """

    entry: Entry | None
    shape: RunShape
    architecture: int = 0
    recompiles: bool = False
    exact: bool = True
    warnings: tuple[str, ...] = ()


def due(
    entry: Entry, step: int, last_operation_step: int, val_loss: float | None
) -> Literal["loss", "timeout"] | None:
    """Return why the entry at the head of the schedule fires now, or None if it does not.

    Args:
      entry: the entry.
      step: optimizer steps taken.
      last_operation_step: the step at which the last operation fired; 0 before the first.
      val_loss: the newest validation loss at an evaluation and right after an operation; None at
        other times. One that is not finite satisfies no threshold.
    """
    trigger, wait = entry.trigger_loss, entry.max_wait_iters
    loss = math.inf if val_loss is None or not math.isfinite(val_loss) else val_loss
    if trigger is not None and loss < trigger:
        return "loss"
    return "timeout" if wait is not None and step - last_operation_step >= wait else None


def load_schedule(path: Path) -> tuple[Entry, ...]:
    """Return the entries of a schedule file, checked by themselves.

    Args:
      path: a file named *.json, or *.yaml or *.yml.

    Raises:
      InputError: naming the file and, where it is one entry's fault, its number, operation and field.
    """
    readers = {".json": read_json, ".yaml": read_yaml, ".yml": read_yaml}
    if path.suffix not in readers:
        raise InputError(str(path), "", None, f"a file named {', '.join(f'*{s}' for s in readers)}")
    content = readers[path.suffix](path)
    if not isinstance(content, list):
        raise InputError(str(path), "", type(content).__name__, "a list of entries")
    return tuple(_entry(str(path), number, item) for number, item in enumerate(content, 1))


def walk(
    entries: Sequence[Entry],
    start: RunShape,
    mesh: Mapping[str, int],
    where: str,
    total_steps: int | None = None,
) -> list[Stage]:
    """Return the stages of a run, the start first and then one after each entry.

    Args:
      entries: the schedule.
      start: the shape the run starts with.
      mesh: size of each mesh axis; a batch is spread over data × fsdp.
      where: the file, for messages.
      total_steps: steps of the run, which a warmup must be shorter than; None: not checked.

    Raises:
      InputError: an operation that cannot be done to the shape it meets.
    """
    stages = [Stage(None, start)]
    for entry in entries:
        try:
            stage = _next_stage(stages[-1], entry)
            _check_batch(stages[-1].shape, stage.shape, entry, mesh["data"] * mesh["fsdp"])
            _check_warmup(stages[-1].shape, stage.shape, entry, total_steps)
        except OperationError as error:
            raise _refusal(where, entry.number, entry.name, error) from None
        stages.append(stage)
    return stages


def entry_sha256(entry: Entry) -> str:
    """Return a digest of what an entry does; its place, its `desc` and notation do not count."""
    return hashlib.sha256(_canonical(entry).encode()).hexdigest()


def schedule_json(entries: Sequence[Entry]) -> str:
    """Return a schedule as a JSON file that `load_schedule` reads."""
    rows = []
    for entry in entries:
        extras = {"desc": entry.desc, "options": dict(entry.options)}
        rows.append(_meaning(entry) | {name: extra for name, extra in extras.items() if extra})
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _meaning(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "value": entry.value,
        "trigger_loss": entry.trigger_loss,
        "max_wait_iters": entry.max_wait_iters,
        "reevaluate": entry.reevaluate,
    }


def _canonical(entry: Entry) -> str:
    meaning = _meaning(entry) | {"options": dict(entry.options)}
    return json.dumps(meaning, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refusal(where: str, number: int, name: str, error: OperationError) -> InputError:
    place = f"entry {number} ({name})" if name else f"entry {number}"
    got = error.got if len(repr(error.got)) <= _LONGEST_QUOTE else type(error.got).__name__
    field = f"{place}: {error.field}" if error.field else place
    return InputError(where, field, got, error.expected)


def _entry(where: str, number: int, item: Any) -> Entry:
    """Return an entry of the file, checked as far as it can be by itself."""
    name = item.get("name") if isinstance(item, dict) else None
    try:
        return _checked_entry(number, item)
    except OperationError as error:
        raise _refusal(where, number, name if isinstance(name, str) else "", error) from None


def _checked_entry(number: int, item: Any) -> Entry:
    if not isinstance(item, dict):
        raise OperationError(item, f"a mapping with {', '.join(_REQUIRED)} and a trigger", "")
    _check_fields(item)
    name, value, options = item["name"], item["value"], item.get("options", {})
    operation = OPERATIONS[name]
    if not isinstance(options, dict):
        raise OperationError(_shown(options), "a mapping of options to values", "options")
    operation.check(value, options)
    trigger, wait = _triggers(item)
    desc, completed = item.get("desc", ""), item.get("completed")
    if not isinstance(desc, str):
        raise OperationError(_shown(desc), "text", "desc")
    for flag in ("reevaluate", "completed"):
        if flag in item and not isinstance(item[flag], bool):
            raise OperationError(_shown(item[flag]), "true or false", flag)
    ignored = "completed is ignored: the run's checkpoint knows what has fired"
    return Entry(
        name=name,
        value=float(value) if operation.value.kind is float else value,
        trigger_loss=trigger,
        max_wait_iters=wait,
        reevaluate=item["reevaluate"],
        desc=desc,
        options=_as_declared(operation, options),
        number=number,
        warnings=() if completed is None else (ignored,),
    )


def _check_fields(item: Mapping[Any, Any]) -> None:
    for required in _REQUIRED:
        if required not in item:
            hint = " (null where the operation takes none)" if required == "value" else ""
            raise OperationError(None, f"the field, which is missing{hint}", required)
    name = item["name"]
    if not isinstance(name, str):
        raise OperationError(_shown(name), "the name of an operation", "name")
    if name not in OPERATIONS:
        near = nearest(name, OPERATIONS)
        raise OperationError(name, f"an operation that --help-operations lists{near}", "name")
    for key in item:
        if key not in _FIELDS:
            known = OPERATIONS[name].options
            hint = " (it belongs under options)" if key in known else nearest(str(key), _FIELDS)
            raise OperationError(key, f"one of {', '.join(_FIELDS)}{hint}", "field")


def _triggers(item: Mapping[str, Any]) -> tuple[float | None, int | None]:
    trigger, wait = item.get("trigger_loss"), item.get("max_wait_iters")
    if trigger is None and wait is None:
        raise OperationError("null", "a number, or a max_wait_iters, or both", "trigger_loss")
    if trigger is not None:
        check_number(trigger, float, _LOSS, "trigger_loss")
    if wait is not None:
        check_number(wait, int, _WAIT, "max_wait_iters")
    return None if trigger is None else float(trigger), wait


def _as_declared(operation: Operation, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with numbers in their declared type, so that 1 and 1.0 are one thing."""
    return {
        name: float(given) if isinstance(operation.options[name].default, float) else given
        for name, given in options.items()
    }


def _shown(value: Any) -> Any:
    return "null" if value is None else value


def _next_stage(before: Stage, entry: Entry) -> Stage:
    operation, shape = entry.operation, before.shape
    after = operation.next_shape(shape, entry.value, entry.options)
    other_model = after.model != shape.model
    options = operation.with_defaults(entry.options)
    return Stage(
        entry,
        after,
        architecture=before.architecture + other_model,
        recompiles=other_model or after.batch_size != shape.batch_size,
        exact=operation.exact(shape, entry.value, options),
        warnings=entry.warnings + _warnings(operation, shape, after, entry.value),
    )


def _warnings(
    operation: Operation, before: RunShape, after: RunShape, value: float | None
) -> tuple[str, ...]:
    if value is not None and before == after:
        return (f"{operation.name} {repeatable(value)} changes nothing",)
    if operation.count and value is not None:
        old, new = getattr(before, operation.count), getattr(after, operation.count)
        if whole_product(old, value) != new:
            product = f"{old} × {repeatable(value)} = {old * value:g}"
            return (f"{operation.count}: {product}, rounded to {new}",)
    return ()


def _check_batch(before: RunShape, after: RunShape, entry: Entry, parts: int) -> None:
    size = after.batch_size
    if size % parts == 0 or size == before.batch_size:
        return
    near = [n for n in (size // parts * parts, -(-size // parts) * parts) if n > 0]
    wanted = f"a batch that divides over the mesh's data × fsdp ({parts})"
    if entry.operation.count:
        old = before.batch_size
        works = [f"{repeatable(n / old)} gives {n}" for n in near]
        wanted += f", not {old} × {repeatable(entry.value or 0)} = {size}"
    else:
        works = [str(n) for n in near]
    raise OperationError(entry.value, f"{wanted}: {', '.join(works)}")


def _check_warmup(before: RunShape, after: RunShape, entry: Entry, total: int | None) -> None:
    warmup = after.warmup_steps
    if total is not None and warmup >= total and warmup != before.warmup_steps:
        raise OperationError(
            entry.value,
            f"a warmup shorter than the {total} steps of the run, not of {warmup} "
            "(--allow_warmup_past_end permits it)",
        )
