"""The controller's turn: measure the heads, ablate some, decide, and set their gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmorph.step.controller import Control, boosts, rules_of, shortlisted, updated
from jaxmorph.step.heads import CLOSED_GATE
from jaxmorph.system.crash_points import crash_point
from jaxmorph.training.adjustments import with_values
from jaxmorph.training.head_log import has_stopped
from jaxmorph.training.run import Run

_VARIABLES = {"gates": "head_gate", "logits": "head_logit", "course": "head_course"}
_COUNTS = {"updates": "controller_updates", "plateau": "controller_plateau"}


def control_is_due(run: Run) -> bool:
    """Return whether the controller is to act after this step; after the last, nothing is."""
    heads, step = run.setup.settings.heads, run.step
    passed = step - heads.controller_warmup
    if not heads.enable_controller or step == 0 or passed < 0 or run.is_last:
        return False
    if passed % heads.controller_interval or not run.state["head_gate"].size:
        return False
    return not has_stopped(run.state, run.position)


def control(run: Run) -> None:
    """Do one update of the controller, and record it in heads.jsonl."""
    settings, before = run.setup.settings.heads, _control(run)
    gates: np.ndarray = np.asarray(before.gates)
    rules = rules_of(settings, gates.size)
    facts = {"status": np.asarray(run.state["head_status"]), "step": np.int32(run.step)}
    measured = run.head_measures()
    chosen = np.asarray(shortlisted(rules, before, _like(before, measured) | facts))
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(chosen)]
    measured = {**measured, "ablation": run.ablation(heads)}
    _, after = updated(rules, before, _like(before, measured) | facts)
    after = jax.device_get(after)
    crash_point("controller_update")
    changed = {name: getattr(after, field) for field, name in (_VARIABLES | _COUNTS).items()}
    # An operation changes the model: from there the controller begins to count anew.
    changed["controller_stopped"] = (1 + run.position.next_operation) * bool(after.stopped)
    status = "skipped" if after.updates == before.updates else "updated"
    if status == "updated" and settings.head_lr_adaptive in ("importance", "gradient"):
        changed["head_boost"] = boosts(settings, gates, measured)
    run.state = with_values(run.state, changed)
    run.record_heads(status, measured, gates)
    _announce(run, gates, after)


def layer_boosts_are_due(run: Run) -> bool:
    """Return whether each layer has a boost of its own, and the stage is a new one."""
    adaptive = run.setup.settings.heads.head_lr_adaptive
    return adaptive == "layer" and run.boosted is not run.active


def set_layer_boosts(run: Run) -> None:
    """Set the boost of each head by the position of its layer; what is set already stays the same."""
    gates = np.asarray(run.state["head_gate"])
    boost = boosts(run.setup.settings.heads, gates, {})
    run.state = with_values(run.state, {"head_boost": boost})
    run.boosted = run.active


def _control(run: Run) -> Control:
    """What the controller goes on with, on the host."""
    names = _VARIABLES | _COUNTS
    values: dict[str, Any] = jax.device_get(
        {field: run.state[name] for field, name in names.items()}
    )
    if run.state["controller_stopped"]:  # before an operation, or this would not be due
        values["plateau"] = np.zeros_like(values["plateau"])
    values["stopped"] = np.zeros((), bool)
    return Control(**values)


def _like(control: Control, measured: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Measurements in the gates' dtype."""
    return {name: np.asarray(value, control.gates.dtype) for name, value in measured.items()}


def _announce(run: Run, gates: np.ndarray, after: Control) -> None:
    """Say how many heads have closed and opened, if any have, and that the controller stops."""
    was, is_closed = gates <= CLOSED_GATE, np.asarray(after.gates) <= CLOSED_GATE
    closed, opened = (is_closed & ~was).sum(), (was & ~is_closed).sum()
    words = [f"{closed} closed"] * bool(closed) + [f"{opened} opened"] * bool(opened)
    words += ["it stops, as its updates change little"] * bool(after.stopped)
    if words:
        of_all = f"{is_closed.sum()} of {is_closed.size} heads are closed"
        run.progress.note(f"step {run.step}: controller: {', '.join(words)}; {of_all}")
