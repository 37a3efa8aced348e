"""The scaling schedule: a file of operations and their triggers.

A schedule is a list of entries, in JSON or YAML, processed in order: an entry fires when one of its
triggers does (`triggers.due`). `load_schedule` checks the file by itself; `plan.walk` applies it to
the sizes of a run, so that every stage is known, and known to be possible, before the first step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.cli.json_file import read_json
from jaxmorph.cli.yaml_file import read_yaml
from jaxmorph.config.run_shape import OperationError, check_number
from jaxmorph.config.settings import LARGEST_COUNT, Within
from jaxmorph.growth.decisions import Decided
from jaxmorph.growth.foreign import FOREIGN_FIELDS, FOREIGN_OPERATIONS
from jaxmorph.growth.operations import OPERATIONS, Operation
from jaxmorph.growth.values import Given, written

_REQUIRED = ("name", "value", "reevaluate")
_TRIGGERS = ("trigger_loss", "trigger_plateau", "max_wait_iters")
_FIELDS = (*_REQUIRED, *_TRIGGERS, "desc", "options", "completed")
_MOST_ENTRIES = 1000
_LOSS = Within(above=0, high=1e9)
_COUNT = Within(low=1, high=LARGEST_COUNT)


@dataclass(frozen=True)
class Entry:
    """One operation of a schedule and its triggers, any of which fires it.

    Args:
      operation: its row in the table.
      value: a number, a tuple of layers, or None for an operation that takes none.
      trigger_loss: fires below this validation loss; None: no such trigger.
      max_wait_iters: fires this many steps after the last operation; None: no such trigger.
      reevaluate: whether the validation loss is measured again right after it.
      trigger_plateau: fires after this many evaluations in a row without an improvement since the
        last operation; None: no such trigger.
      desc: its description in the file.
      options: as given in the file; `Operation.with_defaults` adds the others.
      number: its position in the file, from 1.
      warnings: oddities of the entry that were accepted.
      decided: what its operation has decided when it fired, see `decisions`; no part of the file.
    """

    operation: Operation
    value: Given
    trigger_loss: float | None
    max_wait_iters: int | None
    reevaluate: bool
    trigger_plateau: int | None = None
    desc: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0
    warnings: tuple[str, ...] = ()
    decided: Decided | None = None

    @property
    def is_undecided(self) -> bool:
        """Return whether its operation still has something to decide."""
        return self.operation.decision is not None and self.decided is None

    @property
    def name(self) -> str:
        """Return the operation's name."""
        return self.operation.name

    @property
    def title(self) -> str:
        """Return the operation as "name value"."""
        return f"{self.name} {written(self.value)}".rstrip()


def load_schedule(
    path: Path, operations: Mapping[str, Operation] = OPERATIONS
) -> tuple[Entry, ...]:
    """Return the entries of a schedule file, each checked by itself.

    Args:
      path: a file named *.json, or *.yaml or *.yml.
      operations: the known operations, by name.

    Raises:
      InputError: names the file and, if one entry is wrong, its number, operation and field.
    """
    readers = {".json": read_json, ".yaml": read_yaml, ".yml": read_yaml}
    if path.suffix not in readers:
        raise InputError(str(path), "", None, f"a file named {', '.join(f'*{s}' for s in readers)}")
    content = readers[path.suffix](path)
    if not isinstance(content, list):
        kind = "dict" if isinstance(content, dict) else type(content).__name__
        raise InputError(str(path), "", kind, "a list of entries")
    if len(content) > _MOST_ENTRIES:
        raise InputError(str(path), "", len(content), f"at most {_MOST_ENTRIES:,} entries")
    rows = enumerate(content, 1)
    return tuple(_entry(str(path), number, item, operations) for number, item in rows)


def entry_sha256(entry: Entry) -> str:
    """Return a digest of what an entry does, ignoring its position, `desc` and notation."""
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
        **({"trigger_plateau": entry.trigger_plateau} if entry.trigger_plateau else {}),
    }


def _canonical(entry: Entry) -> str:
    meaning = _meaning(entry) | {"options": dict(entry.options)}
    return json.dumps(meaning, sort_keys=True, separators=(",", ":"), allow_nan=False)


def refusal(where: str, number: int, name: str, error: OperationError) -> InputError:
    """Return the error that says what is wrong with an entry.

    Args:
      where: the file.
      number: of the entry.
      name: of its operation; "" if the entry does not say.
      error: what is wrong.
    """
    place = f"entry {number} ({name})" if name else f"entry {number}"
    field = f"{place}: {error.field}" if error.field else place
    return InputError(where, field, error.got, error.expected)


def _entry(where: str, number: int, item: Any, operations: Mapping[str, Operation]) -> Entry:
    """Return an entry of the file, checked as far as possible by itself."""
    name = item.get("name") if isinstance(item, dict) else None
    try:
        return _checked_entry(number, item, operations)
    except OperationError as error:
        raise refusal(where, number, name if isinstance(name, str) else "", error) from None


def _checked_entry(number: int, item: Any, operations: Mapping[str, Operation]) -> Entry:
    if not isinstance(item, dict):
        raise OperationError(item, f"a mapping with {', '.join(_REQUIRED)} and a trigger", "")
    _check_fields(item, operations)
    value, options = item["value"], item.get("options", {})
    operation = operations[item["name"]]
    if not isinstance(options, dict):
        raise OperationError(_shown(options), "a mapping of options to values", "options")
    operation.check(value, options)
    threshold, warnings = _checked_triggers(item)
    desc, completed = item.get("desc", ""), item.get("completed")
    if not (isinstance(desc, str) and _is_unicode(desc)):
        raise OperationError(_shown(desc), "text, in valid Unicode", "desc")
    for flag in ("reevaluate", "completed"):
        if flag in item and not isinstance(item[flag], bool):
            raise OperationError(_shown(item[flag]), "true or false", flag)
    if completed is not None:
        warnings += ("completed is ignored: the run's checkpoint records what has fired",)
    return Entry(
        operation=operation,
        value=operation.value.read(value),
        trigger_loss=threshold,
        max_wait_iters=item.get("max_wait_iters"),
        reevaluate=item["reevaluate"],
        trigger_plateau=item.get("trigger_plateau"),
        desc=desc,
        options=_as_declared(operation, options),
        number=number,
        warnings=warnings,
    )


def _check_fields(item: Mapping[Any, Any], operations: Mapping[str, Operation]) -> None:
    for required in _REQUIRED:
        if required not in item:
            hint = " (null where the operation takes none)" if required == "value" else ""
            other = next((key for key in item if FOREIGN_FIELDS.get(key) == required), None)
            hint = f" (what {other!r} is elsewhere)" if other else hint
            raise OperationError(None, f"the field, which is missing{hint}", required)
    name = item["name"]
    if not isinstance(name, str):
        raise OperationError(_shown(name), "the name of an operation", "name")
    if name not in operations:
        hint = FOREIGN_OPERATIONS.get(name)
        near = f": {hint}" if hint else nearest(name, operations)
        raise OperationError(name, f"an operation that --help_operations lists{near}", "name")
    for key in item:
        if key not in _FIELDS:
            known = operations[name].options
            hint = " (it belongs under options)" if key in known else nearest(str(key), _FIELDS)
            same = FOREIGN_FIELDS.get(key)
            hint = f" ({key!r} elsewhere is {same!r} here)" if same else hint
            raise OperationError(key, f"one of {', '.join(_FIELDS)}{hint}", "field")


def _checked_triggers(item: Mapping[str, Any]) -> tuple[float | None, tuple[str, ...]]:
    """Return the loss threshold, if there is one, and warnings; the other triggers are only checked."""
    given = {name: item[name] for name in _TRIGGERS if item.get(name) is not None}
    if not given:
        raise OperationError("null", f"a trigger: one of {', '.join(_TRIGGERS)}", _TRIGGERS[0])
    never = not isinstance(loss := given.get("trigger_loss"), bool) and loss == 0
    if never and len(given) == 1:
        others = " or ".join(_TRIGGERS[1:])
        raise OperationError(
            loss, f"a threshold > 0, or {others}: no loss is below 0", "trigger_loss"
        )
    if type(given.get("max_wait_iters")) is int and given["max_wait_iters"] == 0:
        expected = "1 to fire at the next step, or null to fire never by waiting"
        raise OperationError(0, expected, "max_wait_iters")
    for name, trigger in given.items():
        kind, within = (float, _LOSS) if name == "trigger_loss" else (int, _COUNT)
        if not (never and name == "trigger_loss"):
            check_number(trigger, kind, within, name)
    if never:
        return None, (f"trigger_loss {loss:g} means never by loss, as null does",)
    return None if loss is None else float(loss), ()


def _as_declared(operation: Operation, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with numbers in their declared type, so that 1 and 1.0 are the same."""
    return {
        name: float(given) if isinstance(operation.options[name].default, float) else given
        for name, given in options.items()
    }


def _is_unicode(text: str) -> bool:
    """Return whether text can be written to a file: it has no halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(value: Any) -> Any:
    return "null" if value is None else value
