"""What each leaf of an optimizer's state holds, and so how it changes when an axis does.

If a change of shape preserves the function and scales an entry's gradient g to c·g, statistics linear
in gradients are scaled by c and quadratic ones by c² (after Shen et al. 2022, arXiv 2203.06211, who
grow moments along with weights). A field is the last attribute on a leaf's path (mu, nu, trace, ...);
the dict keys after it name the parameter that the leaf mirrors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import SequenceKey

from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.model.tree_paths import field_name, parameter_path

KEEP = "keep"  # unchanged by any change of shape
PARAMETER = "parameter"  # holds weights, and changes as they do
# The power of the gradient a field holds, KEEP or PARAMETER; or axes, if it mirrors no parameter.
Kind = int | str | NamedAxes

FIELDS: dict[str, Kind] = {
    # Linear in gradients: Adam, lion and muon; sgd; MultiSteps; AdEMAMix.
    **dict.fromkeys(("mu", "trace", "ema", "acc_grads", "m1", "m2"), 1),
    # Quadratic: Adam and rmsprop, amsgrad, adagrad, adadelta, adafactor.
    **dict.fromkeys(("nu", "nu_max", "sum_of_squares", "e_g", "v", "v_row", "v_col"), 2),
    # Updates, which do not depend on the gradient's scale: adadelta.
    "e_x": 0,
    # Weights: schedule-free.
    "z": PARAMETER,
    # Not per parameter: inject_hyperparams, muon, added noise, reduce_on_plateau, schedule-free.
    **dict.fromkeys(("hyperparams", "ns_coeffs", "rng_key"), KEEP),
    **dict.fromkeys(("scale", "best_value", "avg_value", "b1", "weight_sum", "max_lr"), KEEP),
}
REFUSED = {
    "ScaleByNovogradState": "novograd keeps one second moment per leaf, which cannot be split by "
    "entry",
    "ScaleBySM3State": "sm3 keeps bounds on second moments, one per index of a leaf, which do not "
    "determine each entry's own",
}
_MOMENTUM = frozenset({"trace", "ema"})
# Fields of transforms that divide out the gradient's scale, so momentum after them holds updates.
_NORMALISING = frozenset({"nu", "sum_of_squares", "v_row", "e_g", "ns_coeffs"})
Path = tuple[Any, ...]


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
    kind: Kind

    def __str__(self) -> str:
        return jax.tree_util.keystr(self.path)

    def beside(self, field: str) -> Path:
        """Return the path of another field of the same state, for the same parameter."""
        at = len(self.path) - len(self.parameter.split("/")) - 1
        return (*self.path[:at], jax.tree_util.GetAttrKey(field), *self.path[at + 1 :])


def places(state: Any, parameters: Collection[str], fields: Mapping[str, Kind]) -> list[Place]:
    """Return the place of every leaf of an optimizer's state, in tree order.

    Args:
      state: the state, with arrays or shapes as leaves.
      parameters: paths of the parameters.
      fields: how other fields change; also overrides known ones.

    Raises:
      InputError: an unsupported optimizer, a leaf that no rule covers, or a name in `fields` that no
        leaf has.
    """
    _refuse(state)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    _check_fields(fields, {field_name(path) for path, _ in leaves})
    normalising = [path for path, _ in leaves if field_name(path) in _NORMALISING]
    table, found = FIELDS | dict(fields), []
    for path, leaf in leaves:
        field, mirrored = field_name(path), parameter_path(path)
        parameter = mirrored if mirrored in parameters else ""
        kind = table.get(field)
        if isinstance(kind, NamedAxes):
            parameter = ""
        elif not parameter:
            kind = KEEP if kind == KEEP or _is_counter(leaf) else None
        elif field in _MOMENTUM and field not in fields and _comes_after(path, normalising):
            kind = 0
        if kind is None:
            raise _unaccounted(path, field, parameter)
        found.append(Place(path, field, parameter, kind))
    return found


def _check_fields(fields: Collection[str], known: Collection[str]) -> None:
    for name in sorted(set(fields) - set(known)):
        has = ", ".join(sorted(filter(None, known))) or "none"
        expected = f"a field of the optimizer's state: {has}{nearest(name, known)}"
        raise InputError("fields", "", name, expected)


def _refuse(state: Any) -> None:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: type(node).__name__ in REFUSED)
    for name in (type(node).__name__ for node in nodes):
        if name in REFUSED:
            raise InputError("optimizer", "", name, f"another optimizer: {REFUSED[name]}")


def _unaccounted(path: Path, field: str, parameter: str) -> InputError:
    mirrors = f", which mirrors {parameter}," if parameter else ""
    return InputError(
        f"optimizer state {jax.tree_util.keystr(path)}",
        "",
        None,
        f"a rule for its field {field!r}{mirrors} when axes change: pass fields={{{field!r}: the "
        f"power of the gradient that it holds, {PARAMETER!r} or {KEEP!r}}}, or NamedAxes if it "
        "mirrors no parameter",
    )


def _is_counter(leaf: Any) -> bool:
    """Return whether a leaf is an integer or boolean scalar, such as a step count."""
    whole = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.integer, jnp.bool_))
    return leaf.ndim == 0 and whole


def _comes_after(path: Path, earlier: Iterable[Path]) -> bool:
    """Return whether a leaf's transform comes after one of the others in a chain."""
    for other in earlier:
        mine, theirs = next(pair for pair in zip(path, other, strict=False) if pair[0] != pair[1])
        in_chain = isinstance(mine, SequenceKey) and isinstance(theirs, SequenceKey)
        if in_chain and mine.idx > theirs.idx:
            return True
    return False
