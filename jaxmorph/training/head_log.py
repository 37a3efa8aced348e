"""The lines of heads.jsonl: what the controller did, and each head's gate, rate and measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from jaxmorph.config.settings import HeadSettings
from jaxmorph.growth.operations import Operation
from jaxmorph.growth.schedule import Entry
from jaxmorph.step.controller import rules_of, step_size
from jaxmorph.step.heads import CLOSED, CLOSED_GATE, OPEN_GATE, STABLE, head_profile
from jaxmorph.step.state import TrainState
from jaxmorph.training.position import Position

_MEASURED = ("entropy", "grad_norm", "importance", "ablation")
Measured = Mapping[str, np.ndarray]
Status = Literal["updated", "skipped", "evaluated"]


def has_head_log(settings: HeadSettings, entries: Iterable[Entry]) -> bool:
    """Return whether a run records its heads: their rates, gates or number may change."""
    operated = any(_is_on_heads(entry.operation) for entry in entries)
    return settings.enable_head_lr or settings.enable_controller or operated


def _is_on_heads(operation: Operation) -> bool:
    decision = operation.decision
    return bool(operation.heads) or (decision is not None and "head_gate" in decision.reads)


def has_stopped(state: TrainState, position: Position) -> bool:
    """Return whether the controller has stopped; after an operation it begins again."""
    return int(state["controller_stopped"]) == 1 + position.next_operation


def head_line(
    settings: HeadSettings,
    state: TrainState,
    position: Position,
    status: Status,
    measured: Measured,
    gates_before: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return a line of heads.jsonl for the state as it is.

    Args:
      settings: of the heads.
      state: the run's.
      position: the run's.
      status: "updated" by the controller, "skipped" by it as measurements were not finite, or
        "evaluated".
      measured: by name, [layer, head]; NaN, written as null, where a head was not measured.
      gates_before: [layer, head], before an update; None: they have not changed.
    """
    gates, heads = np.asarray(state["head_gate"]), np.asarray(state["head_status"])
    profile = head_profile(settings)
    multipliers = np.asarray(profile.multipliers(state["head_status"], state["head_boost"]))
    moved = np.zeros(gates.shape) if gates_before is None else np.abs(gates - gates_before)
    closed, unmeasured = gates <= CLOSED_GATE, np.full(gates.shape, np.nan)
    return {
        "status": status,
        "step": position.step,
        "active_gates": int((~closed).sum()),
        "pruned_percent": 100 * float(closed.sum()) / max(1, closed.size),
        "controller_lr": float(step_size(rules_of(settings, gates.size), position.step)),
        "early_stopping_triggered": has_stopped(state, position),
        "plateau_counter": int(state["controller_plateau"]),
        "gate_changes": float(moved.sum() / max(1, gates.size)),
        "head_lr_info": {
            "head_status": {
                "newly_activated": int(((heads == CLOSED) & (gates >= OPEN_GATE)).sum()),
                "newly_deactivated": int(((heads != CLOSED) & closed).sum()),
                "cooling_down": int((heads > STABLE).sum()),
            },
            "lr_updates": _rates(multipliers),
        },
        "heads": {
            "gates": _plain(gates),
            "status": heads.tolist(),
            "multiplier": _plain(multipliers),
            **{name: _plain(measured.get(name, unmeasured)) for name in _MEASURED},
        },
    }


def _rates(multipliers: np.ndarray) -> dict[str, float]:
    """How many heads have another rate than the run's, and the range of their multipliers."""
    if not multipliers.size:
        return dict.fromkeys(
            ("changes_made", "max_multiplier", "min_multiplier", "avg_multiplier"), 0
        )
    return {
        "changes_made": int((multipliers != 1).sum()),
        "max_multiplier": float(multipliers.max()),
        "min_multiplier": float(multipliers.min()),
        "avg_multiplier": float(multipliers.mean()),
    }


def _plain(values: np.ndarray) -> list[list[float | None]]:
    """Numbers as JSON has them, with null for what is not one."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]
