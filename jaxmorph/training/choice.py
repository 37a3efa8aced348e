"""Which attention heads an operation acts on, as far as only the run's state can tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jaxmorph.config.run_shape import scaled_count
from jaxmorph.growth.schedule import Entry
from jaxmorph.step.heads import CLOSED_GATE
from jaxmorph.step.state import TrainState
from jaxmorph.system import processes
from jaxmorph.training.head_meter import Head

Measures = Mapping[str, np.ndarray]  # [layer, head] by name; see `head_measures.measure_heads`


def by_importance(entry: Entry) -> bool:
    """Return whether an operation measures the heads to choose among them."""
    return entry.operation.with_defaults(entry.options).get("by") == "importance"


def mask_of(heads: Iterable[Sequence[int]], shape: tuple[int, ...]) -> np.ndarray:
    """Return which heads are listed, bool [layer, head]."""
    mask = np.zeros(shape, bool)
    for layer, head in heads:
        mask[layer, head] = True
    return mask


def with_heads(entry: Entry, heads: Sequence[Head]) -> Entry:
    """Return an entry whose options list the heads that were chosen for it."""
    listed = [list(head) for head in heads]
    return dataclasses.replace(entry, options={**entry.options, "heads": listed})


def chosen_heads(
    entry: Entry, state: TrainState, least_open: int, measure: Callable[[], Measures]
) -> list[Head]:
    """Return the heads that an operation acts on, in the order of their choice.

    A random choice depends only on the run's seed and the entry's position.

    Args:
      entry: the operation, which acts on heads.
      state: the run's state.
      least_open: heads of each layer that an operation leaves open if it acts on open ones.
      measure: measures the heads, if the choice is by importance.
    """
    gates, listed = np.asarray(processes.whole(state["head_gate"])), entry.options.get("heads")
    is_closed = gates <= CLOSED_GATE
    acts_on = {"any": np.ones_like(is_closed), "open": ~is_closed, "closed": is_closed}
    eligible = acts_on[entry.operation.heads]
    if not eligible.any():
        return []
    if listed is None:
        ordered = _ordered(entry, state, gates.shape, measure)
    else:
        ordered = [(layer, head) for layer, head in listed]
    candidates = [head for head in ordered if eligible[head]]
    if entry.operation.heads == "any" or not candidates:
        return candidates
    assert isinstance(entry.value, float)
    count = scaled_count(len(candidates), entry.value)
    if entry.operation.heads == "closed":
        return candidates[:count]
    return _sparing(candidates, count, ~is_closed, least_open)


def _ordered(
    entry: Entry, state: TrainState, shape: tuple[int, ...], measure: Callable[[], Measures]
) -> list[Head]:
    """Return all heads, the ones to choose first in front; ties in the model's order."""
    by = entry.operation.with_defaults(entry.options).get("by")
    if by is None:
        rank = np.zeros(shape)
    elif by == "random":
        seed = [*map(int, np.asarray(state["rng"])), entry.number]
        rank = np.random.default_rng(seed).random(shape)
    elif entry.operation.heads == "open":
        rank = measure()["importance"]
    else:  # the gate of a closed head is 0, and with it its importance
        rank = -np.abs(measure()["gate_gradient"])
    order = np.argsort(rank, axis=None, kind="stable")
    return [(int(n) // shape[1], int(n) % shape[1]) for n in order]


def _sparing(candidates: Sequence[Head], count: int, is_open: np.ndarray, least: int) -> list[Head]:
    """Return the first `count` candidates, or fewer, that leave `least` heads open in each layer."""
    left, chosen = is_open.sum(axis=1), []
    for layer, head in candidates:
        if len(chosen) < count and left[layer] > least:
            left[layer] -= 1
            chosen.append((layer, head))
    return chosen
