"""The controller: closes heads that matter little, and opens closed ones that would help.

Importance ranks layers better than the heads within one, so it only chooses a *shortlist*; how much
the loss rises without each of these heads, their *ablation*, decides. The limits act as the target:
as long as more heads than that are in use, the cheapest of the shortlist begin to close. A gate is
the sigmoid of a logit, which moves by one step per update until the head is closed or fully open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmorph.config.heads import profile_values
from jaxmorph.config.settings import HeadSettings
from jaxmorph.step.heads import CLOSED, CLOSED_GATE, OPEN_GATE, OPENED
from jaxmorph.step.state import OPEN_LOGIT

DOWN, RESTING, UP = -1, 0, 1
CLOSED_LOGIT = -OPEN_LOGIT
# Quantiles among the open heads. Only a quarter of them may begin to close, and what opens again must be
# worth more than half of them: so heads do not close and open in turns.
_BUSY, _IDLE, _MISSED = 0.75, 0.25, 0.5
_SHORTLIST = 4  # one of so many open heads
_SETTLING = 2  # intervals in which a head that opened is left alone, if it has no warmup of its own
Metrics = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Control:
    """What the controller reads and sets.

    Args:
      gates: [layer, head].
      logits: [layer, head], of the gates.
      course: int32 [layer, head]: -1 closing, 1 opening, 0 neither.
      updates: int32, so far.
      plateau: int32, updates in a row that changed little.
      stopped: bool; nothing is to change any more.
    """

    gates: jax.Array
    logits: jax.Array
    course: jax.Array
    updates: jax.Array
    plateau: jax.Array
    stopped: jax.Array


class Rules(NamedTuple):
    """What the settings ask of the controller: numbers, so that others compile nothing.

    Args:
      lr: step of a logit.
      lr_decay: of the step, ...
      lr_decay_steps: ... over so many training steps.
      min_lr: smallest step.
      least_open: heads of the model that stay open.
      least_per_layer: heads of each layer that stay open.
      patience: updates in a row that change little, after which it stops.
      min_change: of the gates, on average; less is little.
      audit: updates from one ablation of all heads to the next.
      settling: steps in which a head that opened is left alone.
      gate_l1: see `updated`.
    """

    lr: float
    lr_decay: float
    lr_decay_steps: int
    min_lr: float
    least_open: int
    least_per_layer: int
    patience: int
    min_change: float
    audit: int
    settling: int
    gate_l1: float


def rules_of(settings: HeadSettings, heads: int) -> Rules:
    """Return the rules for a model of so many heads in all."""
    own = profile_values(settings)["warmup"] if settings.enable_head_lr else 0
    return Rules(
        lr=settings.controller_lr,
        lr_decay=settings.controller_lr_decay,
        lr_decay_steps=settings.controller_lr_decay_steps,
        min_lr=settings.min_controller_lr,
        least_open=heads - int(settings.max_pruned_heads * heads + 1e-9),
        least_per_layer=settings.min_heads_per_layer,
        patience=settings.controller_patience,
        min_change=settings.controller_min_change,
        audit=settings.controller_audit,
        settling=max(own, _SETTLING * settings.controller_interval),
        gate_l1=settings.gate_l1,
    )


def gate_of(logits: jax.Array) -> jax.Array:
    """Return the gates of logits: exactly 1 from 3 on, and exactly 0 where they would be at most 0.1."""
    gates = jnp.where(logits >= OPEN_LOGIT, 1, jax.nn.sigmoid(logits)).astype(logits.dtype)
    return jnp.where(gates <= CLOSED_GATE, 0, gates)


def step_size(rules: Rules, step: jax.Array | int) -> jax.Array:
    """Return the step of a logit after so many training steps."""
    return jnp.maximum(rules.lr * rules.lr_decay ** (step / rules.lr_decay_steps), rules.min_lr)


@jax.jit
def shortlisted(rules: Rules, control: Control, metrics: Metrics) -> jax.Array:
    """Return which heads are to be ablated before an update, bool [layer, head].

    At every `controller_audit`-th update, the first one included, these are all open heads. Else they
    are a quarter of as many: first heads with a high entropy and a low gradient, then those of low
    importance.

    Args:
      rules: the controller's.
      control: before the update.
      metrics: as for `updated`, without `ablation`.
    """
    control = _after_operations(control)
    is_open = control.gates > CLOSED_GATE
    eligible = _eligible(rules, control, metrics)
    entropy, gradient = metrics["entropy"], metrics["grad_norm"]
    idle = (entropy > _quantile(entropy, eligible, _BUSY)) & (
        gradient < _quantile(gradient, eligible, _IDLE)
    )
    order = jnp.lexsort((metrics["importance"].ravel(), ~idle.ravel(), ~eligible.ravel()))
    first = _first(eligible, order, _shortlist_size(is_open))
    return jnp.where(_is_audit(rules, control), is_open, first)


@jax.jit
def updated(rules: Rules, control: Control, metrics: Metrics) -> tuple[jax.Array, Control]:
    """Return the gates after an update, and what the controller goes on with.

    Measurements that are not finite change nothing.

    Args:
      rules: the controller's; `gate_l1` above 0 is the weight of the gates' sum in the loss, and heads
        that rest then learn their logits too, but never close by that alone.
      control: before the update.
      metrics: [layer, head] each: `entropy`, `grad_norm`, `importance`, `gate_gradient` (dL/dgate) and
        the heads' `status`; `ablation`, the rise of the loss without the head, not a number where it
        has not been measured; and the training `step`.
    """
    control = _after_operations(control)
    course = _courses(rules, control, metrics)
    logits = _stepped(rules, control, metrics, course)
    gates = jnp.where(logits == control.logits, control.gates, gate_of(logits))
    gates = jnp.where(gates <= CLOSED_GATE, 0, gates)
    logits = jnp.where(gates == 0, CLOSED_LOGIT, logits)
    course = jnp.where((logits >= OPEN_LOGIT) | (logits <= CLOSED_LOGIT), RESTING, course)
    still = jnp.abs(gates - control.gates).mean() < rules.min_change
    ending = control.plateau >= rules.patience
    plateau = jnp.where(still | ending, control.plateau + 1, 0)
    stopped = (plateau >= rules.patience) & jnp.all(course == RESTING)
    new = Control(
        gates, logits, course.astype(control.course.dtype), control.updates + 1, plateau, stopped
    )
    sound = ~control.stopped
    for name in ("entropy", "grad_norm", "importance", "gate_gradient"):
        sound &= jnp.all(jnp.isfinite(metrics[name]))
    kept = jax.tree.map(lambda now, old: jnp.where(sound, now, old), new, control)
    return kept.gates, kept


def boosts(
    settings: HeadSettings, gates: np.ndarray, measured: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Return the scale of each head's boost, within 0.5 and 2, [layer, head].

    By layer it grows from 0.5 in the first to 2 in the last, by the same factor from layer to layer. By
    importance it is the head's over the median of the open heads; by gradient, its norm over the
    layer's median. Of a closed head, which has neither, it is 1, so that it opens with the full boost.

    Args:
      settings: with `head_lr_adaptive`.
      gates: [layer, head].
      measured: `importance` and `grad_norm`, [layer, head]; not needed by layer.
    """
    if settings.head_lr_adaptive == "layer":
        layers = len(gates)
        scale = 4.0 ** (np.arange(layers) / (layers - 1)) / 2 if layers > 1 else np.ones(layers)
        return np.broadcast_to(scale[:, None], gates.shape).astype(gates.dtype)
    is_open = gates > CLOSED_GATE
    if settings.head_lr_adaptive == "gradient":
        share = measured["grad_norm"]
    else:
        value = measured["importance"]
        median = np.median(value[is_open]) if is_open.any() else 0
        share = value / median if median > 0 else np.ones_like(gates)
    return np.clip(np.where(is_open & np.isfinite(share), share, 1), 0.5, 2).astype(gates.dtype)


def _after_operations(control: Control) -> Control:
    """The controller without the course of heads that an operation has closed or fully opened.

    No head that the controller moves is either.
    """
    arrived = (control.gates <= CLOSED_GATE) | (control.gates >= 1)
    return replace(control, course=jnp.where(arrived, RESTING, control.course))


def _eligible(rules: Rules, control: Control, metrics: Metrics) -> jax.Array:
    """Which heads may begin to close: settled ones, in layers and a model where more are in use."""
    in_use = _resting(control)
    room = in_use.sum(axis=1, keepdims=True) > rules.least_per_layer
    return _settled(rules, control, metrics) & room & (in_use.sum() > rules.least_open)


def _settled(rules: Rules, control: Control, metrics: Metrics) -> jax.Array:
    """Which open heads rest and have not just opened."""
    status = metrics["status"]
    new = (status == CLOSED) | ((status >= OPENED) & (status <= rules.settling))
    return _resting(control) & ~new


def _resting(control: Control) -> jax.Array:
    return (control.gates > CLOSED_GATE) & (control.course == RESTING)


def _courses(rules: Rules, control: Control, metrics: Metrics) -> jax.Array:
    """Where each head goes at this update, within the limits."""
    is_open, course = control.gates > CLOSED_GATE, control.course
    ending = control.plateau >= rules.patience  # what has begun is finished
    missed = _missed(rules, control, metrics) & ~ending
    up = (course == UP) | missed
    closing = (course == DOWN) & is_open & ~up
    eligible = _eligible(rules, control, metrics) & ~ending
    ablation = metrics["ablation"]
    candidates = eligible & jnp.isfinite(ablation)
    low = eligible & (control.gates <= OPEN_GATE * 1.001) & (rules.gate_l1 > 0)
    cheapest = jnp.lexsort((ablation.ravel(), ~candidates.ravel()))
    begin = _first(candidates, cheapest, -(-_shortlist_size(is_open) // 2)) | low
    key = jnp.where(closing, control.logits, jnp.where(low, 0, ablation))
    kind = jnp.where(closing, 0, jnp.where(low, 1, jnp.where(begin, 2, 3)))
    order = jnp.lexsort((key.ravel(), kind.ravel()))
    in_use = is_open & ~up
    down = _within_limits(rules, in_use, closing | begin, order)
    return jnp.where(down, DOWN, jnp.where(up | closing, UP, RESTING))


def _missed(rules: Rules, control: Control, metrics: Metrics) -> jax.Array:
    """Which closed and closing heads would be worth more than half of the open ones are.

    The loss falls with a gate at first by -dL/dgate, and less and less: half of that on the way to 1.
    What the open heads are worth is known at an audit.
    """
    is_open = control.gates > CLOSED_GATE
    gain = -metrics["gate_gradient"] * (1 - control.gates) / 2
    worth = _quantile(metrics["ablation"], is_open & (control.course != DOWN), _MISSED)
    out = ~is_open | (control.course == DOWN)
    return out & (gain > jnp.maximum(worth, 0)) & _is_audit(rules, control)


def _is_audit(rules: Rules, control: Control) -> jax.Array:
    return control.updates % rules.audit == 0


def _within_limits(
    rules: Rules, in_use: jax.Array, wanted: jax.Array, order: jax.Array
) -> jax.Array:
    """Which of the heads in use that are wanted may close, in this order, so that the limits hold."""
    layer_of = jnp.arange(in_use.size) // in_use.shape[1]

    def take(counts: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = layer_of[head]
        taken = wanted.ravel()[head] & (counts.sum() > rules.least_open)
        taken &= counts[layer] > rules.least_per_layer
        return counts.at[layer].add(jnp.where(taken, -1, 0)), taken

    _, taken = jax.lax.scan(take, in_use.sum(axis=1, dtype=jnp.int32), order)
    return jnp.zeros(in_use.size, bool).at[order].set(taken).reshape(in_use.shape)


def _stepped(rules: Rules, control: Control, metrics: Metrics, course: jax.Array) -> jax.Array:
    """The logits after a step along the course, or of gradient descent where a head rests."""
    logits = control.logits
    rate = step_size(rules, metrics["step"]).astype(logits.dtype)
    # A closed head begins where its gate would count as open, however small the step.
    edge = float(np.log(CLOSED_GATE / (1 - CLOSED_GATE)))
    begin = jnp.where((course == UP) & (control.gates <= CLOSED_GATE), edge, logits)
    moved = jnp.clip(begin + course * rate, CLOSED_LOGIT, OPEN_LOGIT).astype(logits.dtype)
    slope = jnp.clip(metrics["gate_gradient"] + rules.gate_l1, -1, 1).astype(logits.dtype)
    lowest = float(np.log(OPEN_GATE / (1 - OPEN_GATE)))  # the limits decide what closes
    learned = jnp.clip(logits - rate * slope, jnp.minimum(lowest, logits), OPEN_LOGIT)
    learns = _settled(rules, control, metrics) & (rules.gate_l1 > 0)
    return jnp.where(course == RESTING, jnp.where(learns, learned, logits), moved)


def _shortlist_size(is_open: jax.Array) -> jax.Array:
    return -(-is_open.sum() // _SHORTLIST)


def _first(among: jax.Array, order: jax.Array, count: jax.Array) -> jax.Array:
    """The first so many heads in an order in which those of `among` come first."""
    rank = jnp.zeros(among.size, jnp.int32).at[order].set(jnp.arange(among.size, dtype=jnp.int32))
    return among & (rank.reshape(among.shape) < count)


def _quantile(values: jax.Array, among: jax.Array, part: float) -> jax.Array:
    """A quantile among some heads; not a number if there are none, so that nothing exceeds it."""
    return jnp.nanquantile(jnp.where(among, values, jnp.nan), part)
