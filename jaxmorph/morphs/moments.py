"""What each leaf of an optimizer's state holds, and so how it changes when an axis does.

A leaf belongs to a transform (`owners`), whose rule says how its field moves (`transforms`); the dict
keys at the end of its path name the parameter that it mirrors. `fields` states what no rule says.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.model.tree_paths import declared_for, field_name, field_place, parameter_path
from jaxmorph.morphs.owners import Owner, Path, owners
from jaxmorph.morphs.transforms import KEEP, PARAMETER, Power

# What `fields` may say: the power of the gradient that a field holds, KEEP or PARAMETER; or its axes,
# if it mirrors no parameter.
Kind = float | str | NamedAxes


@dataclass(frozen=True)
class Place:
    """The location of a leaf in an optimizer's state.

    Args:
      path: its keys, as JAX gives them.
      field: the last attribute on the path, "" without one.
      parameter: path of the parameter it mirrors, "" for none.
      kind: how it changes.
    """

    path: Path
    field: str
    parameter: str
    kind: Power | str | NamedAxes

    def __str__(self) -> str:
        return keystr(self.path)

    def beside(self, field: str) -> Path:
        """Return the path of another field of the same state, for the same parameter."""
        at = len(self.path) - len(self.parameter.split("/")) - 1
        return (*self.path[:at], GetAttrKey(field), *self.path[at + 1 :])


def places(
    update: Any, state: Any, parameters: Collection[str], fields: Mapping[str, Kind]
) -> list[Place]:
    """Return the place of every leaf of an optimizer's state, in tree order.

    Args:
      update: the optimizer's `update`.
      state: the state, with arrays or shapes as leaves.
      parameters: paths of the parameters.
      fields: how fields change, by name or by place, such as "[1].trace"; overrides the rules.

    Raises:
      InputError: a leaf whose change no rule knows, or an entry of `fields` that no leaf has or that
        cannot be.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    _check_fields(fields, [path for path, _ in leaves], parameters)
    found, unknown = [], []
    known = owners(update, state)
    for path, leaf in leaves:
        mirrored = parameter_path(path)
        parameter = mirrored if mirrored in parameters else ""
        owner = _owner_of(path, known)
        kind = _kind(path, leaf, owner, fields)
        if kind is None or ((isinstance(kind, Power) or kind == PARAMETER) and not parameter):
            unknown.append((path, owner, parameter))
            continue
        parameter = "" if isinstance(kind, NamedAxes) else parameter
        found.append(Place(path, field_name(path), parameter, kind))
    if unknown:
        raise _unaccounted(unknown, [path for path, _ in leaves])
    return found


def _kind(
    path: Path, leaf: Any, owner: Owner | None, fields: Mapping[str, Kind]
) -> Power | str | NamedAxes | None:
    """Return how a leaf changes, or None if nothing says so."""
    declared = declared_for(path, fields)
    if declared is not None:
        number = isinstance(declared, int | float)
        return Power(declared, mean=declared == 2) if number else declared
    field = _field_of(path, owner)
    if owner is not None and field in owner.fields:
        return owner.fields[field]
    return KEEP if _is_counter(leaf) and not parameter_path(path) else None


def _owner_of(path: Path, known: Sequence[Owner]) -> Owner | None:
    """Return the innermost transform that a leaf belongs to."""
    return max(
        (owner for owner in known if path[: len(owner.path)] == owner.path),
        key=lambda owner: len(owner.path),
        default=None,
    )


def _field_of(path: Path, owner: Owner | None) -> str:
    """Return the field of its transform's state that a leaf belongs to, "" without one."""
    own = path[len(owner.path) :] if owner else ()
    return own[0].name if own and isinstance(own[0], GetAttrKey) else ""


def _check_fields(
    fields: Mapping[str, Kind], paths: Sequence[Path], parameters: Collection[str]
) -> None:
    """Check that every entry of `fields` names a field, and says something that can be of it."""
    mirrored: dict[str, bool] = {}
    for path in paths:
        for name in filter(None, (field_name(path), field_place(path))):
            mirrored[name] = mirrored.get(name, True) and parameter_path(path) in parameters
    for name, kind in fields.items():
        if name not in mirrored:
            has = ", ".join(sorted(name for name in mirrored if name.isidentifier())) or "none"
            expected = f"a field of the optimizer's state: {has}{nearest(str(name), mirrored)}"
            raise InputError("fields", "", name, expected)
        _check_kind(name, kind, mirrored[name])


def _check_kind(name: str, kind: Any, mirrored: bool) -> None:
    number = isinstance(kind, numbers.Real) and not isinstance(kind, bool)
    if isinstance(kind, NamedAxes) or kind == KEEP:
        return
    if not (number and math.isfinite(kind)) and kind != PARAMETER:
        words = (KEEP, PARAMETER)
        hint = nearest(kind, words) if isinstance(kind, str) else ""
        expected = "the power of the gradient that it holds, a finite number; "
        raise InputError("fields", name, kind, f"{expected}{KEEP!r}, {PARAMETER!r} or axes{hint}")
    if not mirrored:
        expected = f"{KEEP!r} or NamedAxes, as the field is not shaped like the parameters"
        raise InputError("fields", name, kind, expected)


def _unaccounted(
    unknown: Sequence[tuple[Path, Owner | None, str]], paths: Sequence[Path]
) -> InputError:
    path, owner, parameter = unknown[0]
    name = owner.name if owner else "the optimizer"
    why = owner.why if owner else "no transform that is known"
    mirrors = f", which mirrors {parameter}," if parameter else ""
    mine = {field_place(path): field_name(path) for path, other, _ in unknown if other is owner}
    others = {field_name(other) for other in paths if field_place(other) not in mine}
    fields = dict.fromkeys(at if name in others else name for at, name in mine.items())
    declared = ", ".join(f"{field!r}: ..." for field in fields)
    return InputError(
        f"optimizer state {keystr(path)}",
        "",
        None,
        f"a rule for field {field_name(path)!r} of {name}{mirrors} when axes change ({why}): use "
        f"another optimizer, or pass fields={{{declared}}} with the power of the gradient that a "
        f"field holds, {PARAMETER!r}, {KEEP!r}, or NamedAxes if it mirrors no parameter",
    )


def _is_counter(leaf: Any) -> bool:
    """Return whether a leaf is an integer or boolean scalar, such as a step count."""
    whole = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.integer, jnp.bool_))
    return leaf.ndim == 0 and whole
