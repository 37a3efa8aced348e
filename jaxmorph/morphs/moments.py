"""What the leaves of an optimizer's state hold, and so how each moves when an axis changes.

If a change of shape leaves the function as it is and turns an entry's gradient g into c·g, then what
is linear in gradients becomes c times itself and what is quadratic c² (after Shen et al. 2022,
arXiv 2203.06211, who grow moments along with weights). A field is named by the last attribute of a
leaf's path (mu, nu, trace, ...); the dict keys after it name the parameter that the leaf mirrors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import SequenceKey

from jaxmorph.cli.errors import InputError
from jaxmorph.model.tree_paths import parameter_path

KEEP = "keep"  # stays as it is, whatever changes shape
PARAMETER = "parameter"  # holds weights, and moves as they do
Kind = int | str  # the power of the gradient that a field holds, KEEP or PARAMETER

FIELDS: dict[str, Kind] = {
    # Linear in gradients: Adam, lion and muon; sgd; MultiSteps; AdEMAMix.
    **dict.fromkeys(("mu", "trace", "ema", "acc_grads", "m1", "m2"), 1),
    # Quadratic: Adam and rmsprop, amsgrad, adagrad, adadelta, adafactor.
    **dict.fromkeys(("nu", "nu_max", "sum_of_squares", "e_g", "v", "v_row", "v_col"), 2),
    # Updates, which the scale of a gradient does not reach: adadelta.
    "e_x": 0,
    # Weights: schedule-free.
    "z": PARAMETER,
    # Of no one parameter: inject_hyperparams, muon, added noise, reduce_on_plateau, schedule-free.
    **dict.fromkeys(("hyperparams", "ns_coeffs", "rng_key"), KEEP),
    **dict.fromkeys(("scale", "best_value", "avg_value", "b1", "weight_sum", "max_lr"), KEEP),
}
REFUSED = {
    "ScaleByNovogradState": "novograd keeps one second moment for a whole leaf, which no part of a "
    "leaf can be taken from",
    "ScaleBySM3State": "sm3 keeps bounds on second moments, one for each index of a leaf, which do "
    "not say what an entry's own is",
}
_MOMENTUM = frozenset({"trace", "ema"})
# What marks a transform that divides the gradient's scale out, so that momentum after it holds updates.
_NORMALISING = frozenset({"nu", "sum_of_squares", "v_row", "e_g", "ns_coeffs"})
Path = tuple[Any, ...]


@dataclass(frozen=True)
class Place:
    """Where a leaf of an optimizer's state stands.

    Args:
      path: its keys, as JAX gives them.
      field: the last attribute on the path, "" without one.
      parameter: path of the parameter it mirrors, "" for none.
      kind: how it moves.
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
    """Return the place of every leaf of an optimizer's state, in the tree's order.

    Args:
      state: the state, of arrays or of shapes.
      parameters: paths of the parameters.
      fields: how further fields move, or known ones in another way.

    Raises:
      InputError: an optimizer that is refused, or a leaf that nothing says how to move.
    """
    _refuse(state)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    normalising = [path for path, _ in leaves if _field(path) in _NORMALISING]
    table, found = FIELDS | dict(fields), []
    for path, leaf in leaves:
        field, mirrored = _field(path), parameter_path(path)
        parameter = mirrored if mirrored in parameters else ""
        kind = table.get(field)
        if not parameter:
            kind = KEEP if kind == KEEP or _is_counter(leaf) else None
        elif field in _MOMENTUM and field not in fields and _comes_after(path, normalising):
            kind = 0
        if kind is None:
            raise _unaccounted(path, field, parameter)
        found.append(Place(path, field, parameter, kind))
    return found


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
        f"power of the gradient that it holds, {PARAMETER!r} or {KEEP!r}}}",
    )


def _field(path: Path) -> str:
    """Return the last attribute on a path."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""


def _is_counter(leaf: Any) -> bool:
    """Say whether a leaf is one whole number or truth value, as what counts steps is."""
    whole = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.integer, jnp.bool_))
    return leaf.ndim == 0 and whole


def _comes_after(path: Path, earlier: Iterable[Path]) -> bool:
    """Say whether a leaf's transform follows one of the others in a chain."""
    for other in earlier:
        mine, theirs = next(pair for pair in zip(path, other, strict=False) if pair[0] != pair[1])
        in_chain = isinstance(mine, SequenceKey) and isinstance(theirs, SequenceKey)
        if in_chain and mine.idx > theirs.idx:
            return True
    return False
