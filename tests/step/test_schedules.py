"""Every shape against a plain float64 formula and, where it has them, optax's own schedules."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.step.schedules import (
    SCHEDULERS,
    ScheduleShape,
    factors_at,
    key_points,
    lr_multiplier_at,
    restarted_warmup,
    schedule_block,
    schedule_shape,
)

COSINE = ScheduleShape("cosine", 0.1, "cosine", 0.04, 0.2, 3, 2.0)


def shape(scheduler, **changes):
    return dataclasses.replace(COSINE, scheduler=scheduler, **changes)


@functools.cache
def compiled(shape):
    return jax.jit(jax.vmap(lr_multiplier_at(shape), in_axes=(0, None, None, None)))


def first_factors(shape, warmup, total):
    """The factors at steps 0 to 1,000, by one program for all lengths."""
    return np.asarray(compiled(shape)(jnp.arange(1001, dtype=jnp.int32), 0, warmup, total))


def reference(shape, t, warmup, total):
    """The factor at step t in plain float64 arithmetic, written from the definitions."""
    low, start = shape.min_lr_ratio, shape.start_ratio
    one_cycle = shape.scheduler == "onecycle"
    smooth = shape.anneal == "cosine"
    if t < warmup:
        passed = t / warmup
        if not one_cycle:
            return passed
        return start + (1 - start) * ((1 - math.cos(math.pi * passed)) / 2 if smooth else passed)
    p = min(1.0, (t - warmup) / max(1, total - warmup))
    cosine = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * p))
    if shape.scheduler == "wsd":
        decay = min(shape.decay_fraction * total, total - warmup)
        begun = t - (total - decay)
        return 1.0 if begun <= 0 or decay == 0 else 1 - (1 - low) * begun / decay
    if shape.scheduler == "step":
        stair = min(shape.stairs - 1, (t - warmup) * shape.stairs // max(1, total - warmup))
        return low ** (stair / (shape.stairs - 1))
    if one_cycle:
        return cosine if smooth else 1 - (1 - low) * p
    return {
        "cosine": cosine,
        "linear": 1 - (1 - low) * p,
        "constant": 1.0,
        "reduce_on_plateau": 1.0,
        "exponential": math.exp(math.log(low) * p) if low else 0.0,
        "polynomial": (1 - low) * (1 - p) ** shape.power + low,
    }[shape.scheduler]


ALL_SHAPES = [
    *(shape(name) for name in SCHEDULERS),
    shape("cosine", min_lr_ratio=0.0),
    shape("onecycle", anneal="linear", min_lr_ratio=1e-3),
    shape("onecycle", start_ratio=0.0),
    shape("wsd", decay_fraction=1.0),
    shape("wsd", decay_fraction=0.003),
    shape("step", stairs=7),
    shape("step", stairs=10_000, min_lr_ratio=1e-3),
    shape("polynomial", power=0.5),
    shape("linear", min_lr_ratio=1.0),
]


def named(shape):
    changed = [f"{k}={v}" for k, v in vars(shape).items() if v != vars(COSINE)[k]]
    return " ".join(changed) or "cosine"


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=named)
@pytest.mark.parametrize(("warmup", "total"), [(100, 1000), (0, 1000), (1, 7), (0, 1), (999, 1000)])
def test_factor_is_the_formula_at_every_step(shape, warmup, total):
    wanted = [reference(shape, min(t, total), warmup, total) for t in range(1001)]
    np.testing.assert_allclose(first_factors(shape, warmup, total), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=named)
def test_factor_is_exact_in_long_runs_too(shape):
    warmup, total = 12_345, 1_000_003
    # Around each stair's edge a step one off would show as a jump of the whole stair.
    edges = [warmup + -(-k * (total - warmup) // 7) for k in range(8)]
    around = [step + d for step in (warmup, *edges) for d in (-1, 0, 1)]
    steps = sorted({*range(0, total, 2003), *around, total} - {total + 1})
    wanted = [reference(shape, t, warmup, total) for t in steps]
    np.testing.assert_allclose(factors_at(shape, steps, warmup, total), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stairs", [2, 100, 1000])
@pytest.mark.parametrize("total", [900, 1000, 999_999, 10_000_019])
def test_stairs_begin_at_the_exact_step(stairs, total):
    """A float32 quotient puts some of these edges a step off."""
    edges = [-(-k * total // stairs) for k in range(1, stairs)]
    steps = sorted({edge + d for edge in edges for d in (-1, 0)})
    falls = compiled(shape("step", stairs=stairs, min_lr_ratio=1e-3))
    got = falls(jnp.asarray(steps, jnp.int32), 0, 0, total)
    stair = [min(stairs - 1, t * stairs // total) for t in steps]
    wanted = [1e-3 ** (k / (stairs - 1)) for k in stair]
    np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=0)


def test_cosine_is_the_documented_learning_rate_at_every_step():
    peak, warmup, total, low = 3e-3, 2000, 17_600, 0.1
    wanted = []
    for t in range(total):
        if t < warmup:
            wanted.append(peak * (t / warmup))
        else:
            progress = (t - warmup) / (total - warmup)
            wanted.append(peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))))
    got = np.asarray(factors_at(COSINE, list(range(total)), warmup, total)) * peak
    np.testing.assert_allclose(got, wanted, atol=1e-6 * peak, rtol=0)


OPTAX_TWINS = {
    "cosine": (
        COSINE,
        optax.warmup_cosine_decay_schedule(0.0, 1.0, 250, 1000, end_value=0.1),
    ),
    "linear": (
        shape("linear"),
        optax.join_schedules(
            [optax.linear_schedule(0.0, 1.0, 250), optax.linear_schedule(1.0, 0.1, 750)], [250]
        ),
    ),
    "polynomial": (
        shape("polynomial", power=3.0),
        optax.join_schedules(
            [optax.linear_schedule(0.0, 1.0, 250), optax.polynomial_schedule(1.0, 0.1, 3.0, 750)],
            [250],
        ),
    ),
    "exponential": (
        shape("exponential"),
        optax.warmup_exponential_decay_schedule(0.0, 1.0, 250, 750, 0.1, end_value=0.1),
    ),
    "onecycle, cosine": (
        shape("onecycle", min_lr_ratio=1e-3),
        optax.cosine_onecycle_schedule(1000, 1.0, 0.25, 25.0, 40.0),
    ),
    # optax has a third phase; it lies on the line of the second where it begins at 4 % of the peak.
    "onecycle, linear": (
        shape("onecycle", anneal="linear", min_lr_ratio=0.01, start_ratio=0.04 * 0.99 + 0.01),
        optax.linear_onecycle_schedule(1000, 1.0, 0.25, 0.97, 1 / 0.0496, 0.0496 / 0.01),
    ),
}


@pytest.mark.parametrize("name", OPTAX_TWINS)
def test_factor_is_that_of_optax_where_optax_has_it(name):
    shape, twin = OPTAX_TWINS[name]
    with jax.numpy_dtype_promotion("standard"):  # optax mixes whole numbers and floats
        wanted = jax.vmap(twin)(jnp.arange(1001))
    np.testing.assert_allclose(first_factors(shape, 250, 1000), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=named)
def test_changing_a_length_recompiles_nothing(shape):
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(lr_multiplier_at(shape), n=1))
    for step, start, warmup, total in [(5, 0, 10, 100), (5, 0, 0, 100), (50, 40, 3, 77)]:
        arguments = [jnp.asarray(n, jnp.int32) for n in (step, start, warmup, total)]
        factor = traced(*arguments)
        chex.assert_shape(factor, ())
        chex.assert_type(factor, jnp.float32)
        assert float(factor) == pytest.approx(
            reference(shape, step - start, warmup, total - start), abs=1e-6
        )


def test_factor_has_float64_where_that_is_enabled():
    with jax.enable_x64(True):
        factor = lr_multiplier_at(COSINE)(jnp.asarray(321), 0, jnp.asarray(100), 1000)
        chex.assert_type(factor, jnp.float64)
        assert float(factor) == pytest.approx(reference(COSINE, 321, 100, 1000), abs=1e-15)


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=named)
def test_factor_rises_in_warmup_and_never_after(shape):
    factors = first_factors(shape, 100, 1000)
    assert np.all(np.diff(factors[:101]) > 0)
    assert np.all(np.diff(factors[100:]) <= 1e-7)
    flat = shape.scheduler in ("constant", "reduce_on_plateau")
    assert factors[-1] == pytest.approx(1.0 if flat else shape.min_lr_ratio, abs=1e-7)


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=named)
def test_factor_stays_at_its_end_after_the_run(shape):
    factors = first_factors(shape, 100, 600)
    assert np.all(factors[600:] == factors[600])


def test_warmup_that_outlasts_the_run_just_rises():
    factors = factors_at(COSINE, [0, 880, 1760], 2000, 1760)
    np.testing.assert_allclose(factors, [0.0, 0.44, 0.88], atol=1e-6)


@pytest.mark.parametrize("step", [0, 300, 990, 999])
def test_restarted_schedule_begins_at_zero_and_ends_at_the_minimum(step):
    factor, total = lr_multiplier_at(COSINE), 1000
    warmup = restarted_warmup(50, step, total)
    assert float(factor(step, step, warmup, total)) == (0.0 if warmup else 1.0)
    assert float(factor(step + warmup, step, warmup, total)) == 1.0
    assert float(factor(total, step, warmup, total)) == pytest.approx(0.1)


@pytest.mark.parametrize("scheduler", ["step", "exponential"])
def test_falling_by_factors_to_zero_is_refused(scheduler):
    with pytest.raises(InputError, match=rf"--min_lr_ratio: got 0.0, .*above 0.*{scheduler}"):
        shape(scheduler, min_lr_ratio=0.0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_shape_comes_from_the_settings(scheduler):
    settings = OptimizerSettings(scheduler=scheduler, min_lr_ratio=0.3, lr_stairs=5)  # pyright: ignore[reportArgumentType]
    made = schedule_shape(settings)
    assert (made.scheduler, made.min_lr_ratio, made.stairs) == (scheduler, 0.3, 5)


def test_start_up_block_is_the_documented_one():
    assert schedule_block(COSINE, 3e-3, 2000, 17_600) == (
        "Learning rate schedule:\n"
        "  Max learning rate: 0.003\n"
        "  Warmup steps: 2000\n"
        "  Total training steps: 17600\n"
        "  Min LR (at end): 3.00e-04\n"
        "  Schedule: Linear warmup + Cosine decay"
    )


@pytest.mark.parametrize(
    ("shape", "warmup", "lowest", "words"),
    [
        (shape("linear"), 0, "1.00e-04", "Linear decay"),
        (shape("constant"), 10, "1.00e-03", "Linear warmup + Constant"),
        (shape("onecycle"), 10, "1.00e-04", "One-cycle (cosine)"),
        (
            shape("wsd"),
            10,
            "1.00e-04",
            "Linear warmup + Stable + Linear decay over the last 20%",
        ),
        (shape("step"), 10, "1.00e-04", "Linear warmup + Step decay (3 stairs)"),
    ],
)
def test_start_up_block_names_the_shape(shape, warmup, lowest, words):
    lines = schedule_block(shape, 1e-3, warmup, 100).splitlines()
    assert lines[-2:] == [f"  Min LR (at end): {lowest}", f"  Schedule: {words}"]


def test_key_points_are_the_documented_table():
    points = key_points(COSINE, 1e-3, 100, 1000)
    assert [(point.name, point.step) for point in points] == [
        ("start", 0),
        ("mid-warmup", 50),
        ("end of warmup", 100),
        ("middle", 500),
        ("last update", 999),
        ("end", 1000),
    ]
    ratios = [point.ratio for point in points]
    # The formula's value in the middle; 0.1 + 0.9 · (1 + cos(4π/9)) / 2.
    np.testing.assert_allclose(ratios, [0, 0.5, 1, 0.628142, 0.1000027, 0.1], atol=1e-6)
    np.testing.assert_allclose([p.learning_rate for p in points], np.multiply(ratios, 1e-3))


def test_key_points_leave_out_what_does_not_exist():
    assert [p.name for p in key_points(COSINE, 1.0, 0, 10)] == [
        "start",
        "middle",
        "last update",
        "end",
    ]
    past_end = key_points(COSINE, 1.0, 2000, 1760)
    assert [(p.name, p.step) for p in past_end] == [
        ("start", 0),
        ("middle", 880),
        ("mid-warmup", 1000),
        ("last update", 1759),
        ("end", 1760),
    ]
