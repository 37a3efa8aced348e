"""Learning-rate schedules: their shapes, and one traced function that computes them.

A schedule here is a factor of the peak learning rate. Its lengths (where it starts, how long it
warms up, where the run ends) are traced values, so that an operation can change them during a run
without recompiling; its shape is fixed when the step is compiled.

To restart a schedule at step s, set `start` to s and `warmup` to at most the remaining steps
(`restarted_warmup`): it starts again at t = 0 and still reaches its minimum at `total`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxmorph.cli.errors import InputError
from jaxmorph.config.settings import OptimizerSettings, Scheduler

SCHEDULERS: tuple[str, ...] = typing.get_args(Scheduler)

Factor = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class ScheduleShape:
    """The shape of a schedule, independent of its lengths.

    Args:
      scheduler: one of `SCHEDULERS`.
      min_lr_ratio: factor at the end of the run (unused by `constant`; the lower bound of
        `reduce_on_plateau`).
      anneal: interpolation of the two halves of `onecycle`.
      start_ratio: factor at the start of `onecycle`.
      decay_fraction: fraction of the run, counted from its start, that `wsd` spends decaying.
      stairs: number of equal stairs of `step`; their heights fall geometrically.
      power: of `polynomial`.

    Raises:
      InputError: a minimum of 0 for a shape that decays geometrically and so never reaches it.
    """

    scheduler: str
    min_lr_ratio: float
    anneal: Literal["cosine", "linear"]
    start_ratio: float
    decay_fraction: float
    stairs: int
    power: float

    def __post_init__(self):
        assert self.scheduler in SCHEDULERS
        if self.scheduler in ("step", "exponential") and self.min_lr_ratio <= 0:
            raise InputError(
                "--min_lr_ratio",
                "",
                self.min_lr_ratio,
                f"a number above 0 with --scheduler {self.scheduler}",
            )


def schedule_shape(settings: OptimizerSettings) -> ScheduleShape:
    """Return the shape that the settings describe.

    Raises:
      InputError: see `ScheduleShape`.
    """
    return ScheduleShape(
        scheduler=settings.scheduler,
        min_lr_ratio=settings.min_lr_ratio,
        anneal=settings.onecycle_anneal,
        start_ratio=settings.onecycle_start_ratio,
        decay_fraction=settings.wsd_decay_fraction,
        stairs=settings.lr_stairs,
        power=settings.lr_power,
    )


def restarted_warmup(warmup: int, step: int, total: int) -> int:
    """Return the warmup of a schedule restarted at `step`: at most the remaining steps."""
    return max(0, min(warmup, total - step - 1))


def lr_multiplier_at(shape: ScheduleShape) -> Factor:
    """Return the function from (step, start, warmup, total) to the factor of the peak rate.

    The arguments are integers or 0-d integer arrays, and may all be traced: the current step, the step
    the schedule started at, the number of warmup steps, and the step the run ends at. With
    t = step - start the factor rises from 0 to 1 (`onecycle`: from `start_ratio`) while t < warmup;
    then it follows the shape, and is `min_lr_ratio` from `step = total` on. It is a 0-d array, float32,
    or float64 if JAX has that enabled, and within 1e-6 of the exact factor for runs of any length.

    Each shape is an optax schedule of length 1 over normalised progress, because optax's schedules
    branch on their lengths in Python, which therefore cannot be traced. `cosine` follows GPT-3
    (Brown et al., 2020), `onecycle` Smith and Topin, 2019, in two phases, `wsd` Hu et al., 2024.
    """
    import jax.numpy as jnp

    rise, fall = _rise(shape), _fall(shape)

    def factor(step: Any, start: Any, warmup: Any, total: Any) -> Any:
        # Integer differences first: a float32 step is not exact past 2^24.
        step, start, warmup, total = (
            jnp.asarray(n).astype(jnp.int32) for n in (step, start, warmup, total)
        )
        span, since = total - start, jnp.clip(step, start, jnp.maximum(start, total)) - start
        warm = rise(_ratio(since, warmup))
        return jnp.where(since < warmup, warm, fall(since - warmup, span - warmup, span))

    return factor


def schedule_block(shape: ScheduleShape, peak: float, warmup: int, total: int) -> str:
    """Return the lines about the learning rate that a run prints at its start."""
    lowest = peak if shape.scheduler == "constant" else peak * shape.min_lr_ratio
    return "\n".join(
        (
            "Learning rate schedule:",
            f"  Max learning rate: {peak:g}",
            f"  Warmup steps: {warmup}",
            f"  Total training steps: {total}",
            f"  Min LR (at end): {lowest:.2e}",
            f"  Schedule: {shape_in_words(shape, warmup)}",
        )
    )


def shape_in_words(shape: ScheduleShape, warmup: int) -> str:
    """Return a title like "Linear warmup + Cosine decay"."""
    words = {
        "cosine": "Cosine decay",
        "onecycle": f"One-cycle ({shape.anneal})",
        "wsd": f"Stable + Linear decay over the last {shape.decay_fraction:.0%}",
        "linear": "Linear decay",
        "constant": "Constant",
        "step": f"Step decay ({shape.stairs} stairs)",
        "exponential": "Exponential decay",
        "polynomial": f"Polynomial decay (power {shape.power:g})",
        "reduce_on_plateau": "Reduce on plateau",
    }[shape.scheduler]
    linear_warmup = warmup > 0 and shape.scheduler != "onecycle"
    return f"Linear warmup + {words}" if linear_warmup else words


class KeyPoint(NamedTuple):
    """One row of the table of key points."""

    name: str
    step: int
    learning_rate: float
    ratio: float


def key_points(shape: ScheduleShape, peak: float, warmup: int, total: int) -> list[KeyPoint]:
    """Return the rate at the steps worth checking, in order.

    Update s uses the rate at s - 1, so the last one used is at `total - 1`. Points that do not
    exist (such as the end of a warmup that outlasts the run) are omitted.
    """
    steps = {"start": 0}
    if warmup:
        steps |= {"mid-warmup": warmup // 2, "end of warmup": warmup}
    steps |= {"middle": total // 2, "last update": total - 1, "end": total}
    present = [item for item in sorted(steps.items(), key=lambda item: item[1]) if item[1] <= total]
    factors = factors_at(shape, [step for _, step in present], warmup, total)
    return [
        KeyPoint(name, step, peak * ratio, ratio)
        for (name, step), ratio in zip(present, factors, strict=True)
    ]


def factors_at(shape: ScheduleShape, steps: list[int], warmup: int, total: int) -> list[float]:
    """Return the factor at each of `steps`, for a schedule that started at step 0."""
    import jax
    import jax.numpy as jnp

    over_steps = jax.jit(jax.vmap(lr_multiplier_at(shape), in_axes=(0, None, None, None)))
    return [float(ratio) for ratio in over_steps(jnp.asarray(steps, jnp.int32), 0, warmup, total)]


def _rise(shape: ScheduleShape) -> Callable[[Any], Any]:
    """Return the warmup, as a function of the fraction of it that has passed."""
    import optax

    if shape.scheduler != "onecycle":
        return lambda passed: passed  # optax's 1 - (1 - passed) rounds off the first steps
    if shape.anneal == "linear":
        return optax.linear_schedule(shape.start_ratio, 1.0, 1)
    falling = optax.cosine_decay_schedule(1.0, 1, shape.start_ratio)
    return lambda passed: falling(1.0 - passed)


def _fall(shape: ScheduleShape) -> Callable[[Any, Any, Any], Any]:
    """Return the factor after the warmup, of (steps since it, steps from it to the end, span)."""
    import jax.numpy as jnp

    curve = _curve(shape)
    if shape.scheduler == "step":
        return lambda t, length, span: curve(_stair(t, length, shape.stairs) / (shape.stairs - 1))
    if shape.scheduler == "polynomial":  # of 1 - p: a root of that magnifies the rounding of p
        return lambda t, length, span: curve(_ratio(jnp.maximum(length, 1) - t, length))
    if shape.scheduler != "wsd":
        return lambda t, length, span: curve(_ratio(t, length))

    def stable_then_decay(t: Any, length: Any, span: Any) -> Any:
        decay = jnp.minimum(shape.decay_fraction * span.astype(float), length.astype(float))
        left = (length - t).astype(float)
        return curve(jnp.clip((decay - left) / jnp.maximum(decay, 1e-6), 0.0, 1.0))

    return stable_then_decay


def _curve(shape: ScheduleShape) -> Callable[[Any], Any]:
    """Return the factor as a function of progress, from 1 at 0 to the minimum at 1."""
    import optax

    low = shape.min_lr_ratio
    cosine = optax.cosine_decay_schedule(1.0, 1, low)
    linear = optax.linear_schedule(1.0, low, 1)
    constant = optax.linear_schedule(1.0, 1.0, 1)
    return {
        "cosine": cosine,
        "onecycle": cosine if shape.anneal == "cosine" else linear,
        "wsd": linear,
        "linear": linear,
        "constant": constant,
        "step": optax.exponential_decay(1.0, 1, low),
        "exponential": optax.exponential_decay(1.0, 1, low),
        "polynomial": lambda left: low + (1.0 - low) * left**shape.power,
        "reduce_on_plateau": constant,
    }[shape.scheduler]


def _ratio(part: Any, whole: Any) -> Any:
    """Return part / whole clipped to [0, 1]; a whole of 0 counts as one step."""
    import jax.numpy as jnp

    return jnp.clip(part.astype(float) / jnp.maximum(whole, 1).astype(float), 0.0, 1.0)


def _stair(t: Any, length: Any, stairs: int) -> Any:
    """Return floor(t · stairs / length), below `stairs`, without rounding or overflow.

    A float32 quotient is accurate to one stair; stair k begins at ceil(k · length / stairs).
    """
    import jax.numpy as jnp

    length = jnp.maximum(length, 1)
    t = jnp.clip(t, 0, length)
    width, rest = length // stairs, length % stairs
    guess = jnp.clip(jnp.floor(_ratio(t, length) * stairs), 0, stairs - 1).astype(jnp.int32)

    def first_step(stair: Any) -> Any:
        return stair * width + -(-stair * rest // stairs)

    too_high, too_low = t < first_step(guess), t >= first_step(guess + 1)
    stair = guess - too_high.astype(jnp.int32) + too_low.astype(jnp.int32)
    return jnp.clip(stair, 0, stairs - 1).astype(float)
