"""The transform that owns each part of an optimizer's state, and what gradients reach it.

An optax state alone does not tell: adam, adamax, yogi and adopt have one type of state, and sign,
scale and many others none at all. Their update functions do. They are named after the function
that made them, and hold the transforms they are built from as variables of their closure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from jaxmorph.morphs.transforms import (
    EITHER,
    INNER,
    TRANSFORMS,
    WRAPPERS,
    Power,
    Rule,
    Transform,
    Wrapper,
)

Path = tuple[Any, ...]
Gradients = float | str  # the power of the gradients that flow through a chain, or why it is none


@dataclass(frozen=True)
class Owner:
    """A transform's part of an optimizer's state.

    Args:
      path: of its state.
      name: of the transform.
      fields: how fields of its state move.
      why: why the other fields cannot be moved.
    """

    path: Path
    name: str
    fields: Mapping[str, Rule]
    why: str


def owners(update: Any, state: Any) -> list[Owner]:
    """Return the transforms that an optimizer is made of, outer ones before inner ones.

    Args:
      update: the optimizer's `update`.
      state: its state, with arrays or shapes as leaves.
    """
    found: list[Owner] = []
    _walk(update, state, (), 1, found)
    return found


def _walk(
    update: Any, state: Any, path: Path, gradients: Gradients, found: list[Owner]
) -> Gradients:
    """Add the owners of a state to `found`, and return what becomes of the gradients."""
    name, variables = _identity(update)
    if name in ("chain", "named_chain"):
        for key, inner, part in _links(variables, state):
            gradients = _walk(inner, part, (*path, key), gradients, found)
        return gradients
    if name == "partition":
        return _walk_groups(variables, state, path, gradients, found)
    if name in WRAPPERS:
        return _walk_wrapped(name, variables, state, path, gradients, found)
    transform = TRANSFORMS.get(name)
    if transform is None:
        found.append(Owner(path, name, {}, f"{name} is not a known transform"))
        return f"{name}, before it, is not a known transform"
    found.append(_owner(name, transform, state, path, gradients))
    return _after(name, transform, variables, state, gradients)


def _owner(name: str, transform: Transform, state: Any, path: Path, gradients: Gradients) -> Owner:
    kind = type(state).__name__
    if transform.refused:
        return Owner(path, name, {}, transform.refused)
    if kind not in transform.states:
        return Owner(path, name, {}, f"its state is {kind}, not {' or '.join(transform.states)}")
    return Owner(path, name, *_moved(transform.fields, gradients))


def _moved(fields: Mapping[str, Rule], gradients: Gradients) -> tuple[dict[str, Rule], str]:
    """Return how fields move, given what gradients reach them, and why the others cannot."""
    plain: dict[str, Rule] = {name: rule for name, rule in fields.items() if isinstance(rule, str)}
    if isinstance(gradients, str):
        return plain, gradients
    powers = {
        name: Power(rule.of_gradient * gradients, rule.mean, rule.added)
        for name, rule in fields.items()
        if isinstance(rule, Power)
    }
    return plain | powers, "it is a field that this transform is not known to have"


def _after(
    name: str, transform: Transform, variables: Mapping[str, Any], state: Any, gradients: Gradients
) -> Gradients:
    """Return what becomes of the gradients in a transform."""
    output, decay = transform.output, variables.get("weight_decay")
    if name == "add_decayed_weights" and isinstance(decay, int | float) and not decay:
        output = 1
    elif name == "scale_by_lion" and variables.get("mode", "hard") != "hard":
        output = "returns no sign"
    elif type(state).__name__ == "ScaleByRStdDevWithCountState":
        output = "divides its first gradient by epsilon, as its variance is zero"
    if isinstance(gradients, str):
        return gradients
    return f"{name}, before it, {output}" if isinstance(output, str) else output * gradients


def _identity(update: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the transform an update function belongs to, and its closure's variables."""
    while not isinstance(update, FunctionType | MethodType) and hasattr(update, "__wrapped__"):
        update = update.__wrapped__  # of a compiled function
    function: Any = getattr(update, "__func__", update)
    if not isinstance(function, FunctionType):
        return str(type(update).__name__), {}
    # Of the code itself: functools.wraps gives a function the names of another one.
    module = str(function.__globals__.get("__name__"))
    maker, within, _ = function.__code__.co_qualname.partition(".<locals>")
    ours = module.partition(".")[0] == "optax"
    if ours and maker == "MultiSteps.update":
        stepping: Any = update
        return "MultiSteps", {"inner": stepping.__self__.inner_opt}
    variables = inspect.getclosurevars(function).nonlocals
    return maker if ours and within else f"{module}.{maker}", variables


def _injected(variables: Mapping[str, Any], state: Any) -> Any:
    """Return the transform that `inject_hyperparams` makes of any numbers, as they may change."""
    numbers = {
        name: np.full(number.shape, 0.5 if jnp.issubdtype(number.dtype, jnp.floating) else 1)
        for name, number in state.hyperparams.items()
    }
    return variables["inner_factory"](**variables["other_hps"], **numbers)


def _links(
    variables: Mapping[str, Any], state: Any
) -> Iterator[tuple[Any, Callable[..., Any], Any]]:
    """Yield the key, the update and the state of each transform in a chain."""
    if "update_fns" in variables:
        for number, (update, part) in enumerate(zip(variables["update_fns"], state, strict=True)):
            yield SequenceKey(number), update, part
    else:
        for name, transform in variables["transforms"]:
            yield DictKey(name), transform.update, state[name]


def _walk_groups(
    variables: Mapping[str, Any], state: Any, path: Path, gradients: Gradients, found: list[Owner]
) -> Gradients:
    """Walk the groups of `partition`, each of them masked."""
    after = []
    for label, transform in variables["transforms"].items():
        keys = (GetAttrKey("inner_states"), DictKey(label), GetAttrKey("inner_state"))
        part = state.inner_states[label].inner_state
        after.append(_walk(transform.update, part, (*path, *keys), gradients, found))
    return _common(after)


def _walk_wrapped(
    name: str,
    variables: Mapping[str, Any],
    state: Any,
    path: Path,
    gradients: Gradients,
    found: list[Owner],
) -> Gradients:
    wrapper: Wrapper = WRAPPERS[name]
    if wrapper.fields:
        found.append(Owner(path, name, *_moved(wrapper.fields, gradients)))
    after = []
    for variable, field in wrapper.inner.items():
        injected = name == "inject_hyperparams"
        inner = _injected(variables, state) if injected else variables[variable]
        part = getattr(state, field) if field else state
        at = (*path, GetAttrKey(field)) if field else path
        after.append(_walk(inner.update, part, at, gradients, found))
    if wrapper.output == INNER:
        return _common(after)
    if wrapper.output == EITHER:
        return _common([*after, gradients])
    return f"{name}, before it, {wrapper.output}"


def _common(found: list[Gradients]) -> Gradients:
    """Return what all groups make of the gradients."""
    unknown = [each for each in found if isinstance(each, str)]
    if unknown:
        return unknown[0]
    if len(set(found)) > 1:
        return "what comes before it holds other powers of the gradient in different parameters"
    return found[0] if found else 1
