"""The controller's rules on their own: which heads close and open, how fast, and within which limits."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmorph.config.settings import HeadSettings
from jaxmorph.step.controller import (
    Control,
    boosts,
    gate_of,
    rules_of,
    shortlisted,
    step_size,
    updated,
)

PLAIN = HeadSettings(enable_controller=True, controller_min_change=0.0, max_pruned_heads=0.5)
OLD = 10**6  # a status far from opening is 0; such a step decays the rate to its minimum
LAYERS, HEADS = 4, 6


def settings(**changes: Any) -> HeadSettings:
    return dataclasses.replace(PLAIN, **changes)


def opened(layers: int = LAYERS, heads: int = HEADS, **fields: Any) -> Control:
    """A controller before its first update, all heads open."""
    shape = (layers, heads)
    none, first = (
        jnp.zeros((), jnp.int32),
        {"gates": jnp.ones(shape), "logits": jnp.full(shape, 3.0)},
    )
    counts = {"updates": none, "plateau": none, "stopped": jnp.zeros((), bool)}
    return Control(**{**first, "course": jnp.zeros(shape, jnp.int32), **counts, **fields})


def measured(
    seed: int = 0, layers: int = LAYERS, heads: int = HEADS, **given: Any
) -> dict[str, Any]:
    """Measurements of which importance and ablation agree, and no closed head is missed."""
    rng = np.random.default_rng(seed)
    worth = (1 + rng.permutation(layers * heads).reshape(layers, heads)) / 100
    names = {"entropy": 0 * worth, "grad_norm": 1 + 0 * worth, "gate_gradient": 0 * worth}
    found = {**names, "importance": worth, "ablation": worth}
    found |= {"status": np.zeros((layers, heads), np.int32), "step": np.int32(0)}
    return {k: jnp.asarray(np.asarray(v, np.float32 if k in names else None)) for k, v in (
        found | given).items()}  # fmt: skip


def as_float(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v if v.dtype == jnp.int32 else v.astype(jnp.float32) for k, v in metrics.items()}


def run(settings: HeadSettings, control: Control, metrics: dict[str, Any], updates: int):
    """The controllers after each update; only what is shortlisted has been ablated."""
    rules, seen = rules_of(settings, control.gates.size), []
    for _ in range(updates):
        chosen = shortlisted(rules, control, as_float(metrics))
        ablation = jnp.where(chosen, metrics["ablation"], jnp.nan)
        gates, control = updated(rules, control, as_float(metrics | {"ablation": ablation}))
        assert gates is control.gates or np.array_equal(gates, control.gates)
        seen.append(control)
    return seen


def path_of(seen: list[Control], head: tuple[int, ...]) -> list[float]:
    return [float(each.gates[head]) for each in seen]


def test_a_head_closes_within_six_updates_along_the_sigmoid_and_then_is_exactly_zero():
    worth = measured()["importance"]
    cheapest = tuple(int(k) for k in np.argwhere(np.asarray(worth) == np.asarray(worth).min())[0])
    path = path_of(run(settings(), opened(), measured(), 8), cheapest)
    expected = [1 / (1 + np.exp(-x)) for x in (2, 1, 0, -1, -2)] + [0, 0, 0]
    np.testing.assert_allclose(path, expected, rtol=1e-6)
    assert path[5] == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "limits",
    [(0.3, 1), (0.5, 1), (0.99, 1), (0.5, 4), (0.99, 5), (0.0, 1), (0.5, 6), (0.04, 1), (0.5, 9)],
)
def test_limits_hold_after_every_update_whatever_is_measured(seed, limits):
    """Random measurements at each update, so that heads turn round; the limits are then reached."""
    part, least = limits
    rules = settings(max_pruned_heads=part, min_heads_per_layer=least, gate_l1=0.2 * (seed == 2))
    rng, control = np.random.default_rng(seed), opened()
    shape = (LAYERS, HEADS)
    for _ in range(40):
        noise: dict[str, Any] = {
            name: rng.normal(size=shape) for name in ("gate_gradient", "ablation", "entropy")
        }
        noise |= {"importance": rng.random(shape), "grad_norm": rng.random(shape)}
        before = control
        control = run(rules, control, measured(seed, **noise), 1)[0]
        closed = np.asarray(control.gates <= 0.1)
        assert closed.sum() <= part * LAYERS * HEADS
        assert ((~closed).sum(axis=1) >= min(least, HEADS)).all()
        assert (np.asarray(control.gates)[closed] == 0).all()
        assert np.abs(control.logits - before.logits).max() <= 1.81  # a closed one starts at 0.1
    control = run(rules, control, measured(seed), 40)[-1]
    possible = LAYERS * max(0, HEADS - least)
    wanted = 0 if rules.gate_l1 else min(int(part * LAYERS * HEADS), possible)
    assert (control.gates == 0).sum() >= wanted


def test_half_of_the_heads_close_within_nine_updates_the_cheapest_of_them():
    seen = run(settings(), opened(), measured(), 9)
    worth, closed = np.asarray(measured()["importance"]), np.asarray(seen[-1].gates == 0)
    assert closed.sum() == 12
    assert worth[closed].max() < worth[~closed].min()
    assert (np.asarray(seen[-1].gates)[~closed] == 1).all()


def test_ablation_decides_among_the_shortlist_and_audits_look_at_all_heads():
    """The least important head is costly, and a head of high importance costs nothing."""
    metrics = measured()
    order = np.argsort(np.asarray(metrics["importance"]).ravel())
    ablation = np.full(24, 0.5)
    ablation[order[0]], ablation[order[5]], ablation[order[23]] = 1.0, 0.0, -1.0
    metrics["ablation"] = jnp.asarray(ablation.reshape(LAYERS, HEADS))
    rules = settings(controller_audit=5)

    def begun(updates: int) -> set[int]:
        control = opened(updates=jnp.asarray(updates, jnp.int32))
        course = np.asarray(run(rules, control, metrics, 1)[0].course)
        return {int(head) for head in np.flatnonzero(course == -1)}

    audited = begun(5)
    assert order[23] in audited
    assert order[5] in audited
    between = begun(6)
    assert order[5] in between
    assert order[0] not in between
    assert between <= set(order[:6])  # a quarter
    assert len(between) == 3
    counts = [opened(updates=jnp.asarray(n, jnp.int32)) for n in range(7)]
    chosen = [shortlisted(rules_of(rules, 24), each, as_float(metrics)) for each in counts]
    sizes = [int(heads.sum()) for heads in chosen]
    assert sizes == [24, 6, 6, 6, 6, 24, 6]


def test_a_head_of_high_entropy_and_low_gradient_is_shortlisted_whatever_its_importance():
    metrics = measured()
    last = np.unravel_index(np.argmax(np.asarray(metrics["importance"])), (LAYERS, HEADS))
    one = np.zeros((LAYERS, HEADS))
    one[last] = 1
    metrics |= {"entropy": jnp.asarray(one), "grad_norm": jnp.asarray(1 - one)}
    control = opened(updates=jnp.asarray(1, jnp.int32))
    assert shortlisted(rules_of(settings(), 24), control, as_float(metrics))[last]
    metrics["grad_norm"] = jnp.asarray(1 + one)
    assert not shortlisted(rules_of(settings(), 24), control, as_float(metrics))[last]


def test_a_missed_head_opens_again_fully_and_is_then_left_alone_for_a_while():
    closed = run(settings(), opened(), measured(), 20)[-1]
    head = tuple(int(k) for k in np.argwhere(np.asarray(closed.gates) == 0)[0])
    pull = np.zeros((LAYERS, HEADS))
    pull[head] = -1.0
    seen = run(settings(), closed, measured(gate_gradient=pull), 1)
    assert 0.2 <= float(seen[0].gates[head]) < 1
    seen += run(settings(), seen[0], measured(), 5)  # no longer missed: it does not turn round
    path = path_of(seen, head)
    assert path == sorted(path)
    assert path[-1] == 1
    fresh = np.zeros((LAYERS, HEADS), np.int32)
    fresh[head] = 5
    rules = settings(max_pruned_heads=0.9)
    assert path_of(run(rules, seen[-1], measured(status=fresh), 8), head) == [1] * 8
    assert path_of(run(rules, seen[-1], measured(), 8), head)[-1] < 1
    pull[head] = 1.0  # closed heads that would do harm stay closed
    assert path_of(run(settings(), closed, measured(gate_gradient=pull), 8), head) == [0] * 8


def test_a_closing_head_that_is_missed_turns_round():
    _, early, *_, begun = run(settings(), opened(), measured(), 5)  # the next one is an audit
    head = tuple(int(k) for k in np.argwhere(np.asarray(begun.course) == -1)[0])
    pull = np.zeros((LAYERS, HEADS))
    pull[head] = -9.0
    path = path_of(run(settings(), begun, measured(gate_gradient=pull), 6), head)
    assert path[0] > float(begun.gates[head])
    assert path[-1] == 1
    missed = np.where(
        np.asarray(early.course) == -1, -9.0, 0
    )  # what the others are worth is not known
    assert (run(settings(), early, measured(gate_gradient=missed), 1)[0].course != 1).all()


def test_heads_that_an_operation_closed_count_and_none_is_closed_beyond_the_limit():
    gates = jnp.ones((LAYERS, HEADS)).at[:, 0].set(0).at[0, 1:4].set(0)  # 7 of 24
    logits = jnp.where(gates == 0, -3.0, 3.0)
    control = opened(gates=gates, logits=logits)
    for part, closed in ((0.3, 7), (0.1, 7), (0.5, 12)):
        last = run(settings(max_pruned_heads=part), control, measured(), 20)[-1]
        assert (last.gates == 0).sum() == closed


def test_a_head_that_an_operation_closes_or_opens_on_its_way_stays_so():
    """One begins to close and an operation opens it; one begins to open and an operation closes it."""
    control, none = opened(), settings(max_pruned_heads=0.0)
    course = control.course.at[0, 0].set(-1).at[1, 1].set(1)
    gates, logits = control.gates.at[1, 1].set(0), control.logits.at[1, 1].set(-3)
    control = dataclasses.replace(control, course=course, gates=gates, logits=logits)
    seen = run(none, control, measured(), 3)
    assert path_of(seen, (0, 0)) == [1] * 3
    assert path_of(seen, (1, 1)) == [0] * 3


@pytest.mark.parametrize(("patience", "stops"), [(1, 10), (3, 12)])
def test_it_stops_after_so_many_updates_that_change_little_and_then_changes_nothing(
    patience, stops
):
    """Half of the heads are closed at the ninth update; nothing moves from there on."""
    rules = settings(controller_patience=patience, controller_min_change=0.001)
    seen = run(rules, opened(), measured(), stops)
    assert [bool(each.stopped) for each in seen] == [False] * (stops - 1) + [True]
    pull = -np.ones((LAYERS, HEADS))
    after = run(rules, seen[-1], measured(gate_gradient=pull), 2)[-1]
    np.testing.assert_array_equal(after.gates, seen[-1].gates)
    assert after.updates == seen[-1].updates


def test_what_has_begun_is_finished_before_it_stops():
    """Every update counts as a small one, so it may begin at two of them."""
    rules = settings(controller_patience=2, controller_min_change=1.0)
    seen = run(rules, opened(), measured(), 7)
    assert [bool(each.stopped) for each in seen] == [False] * 6 + [True]
    assert set(np.unique(seen[-1].gates)) == {0, 1}
    assert (seen[-1].gates == 0).sum() == 6


def test_with_l1_the_logits_also_descend_and_the_limits_still_decide_what_closes():
    slope = np.linspace(-0.5, 0.5, 24).reshape(LAYERS, HEADS)
    rules = settings(gate_l1=0.25, max_pruned_heads=0.0)
    half = jnp.zeros((LAYERS, HEADS))
    control = opened(gates=gate_of(half), logits=half)
    seen = run(rules, control, measured(gate_gradient=slope), 30)
    np.testing.assert_allclose(seen[0].logits, -(slope + 0.25), atol=1e-6)
    np.testing.assert_allclose(seen[0].gates, 1 / (1 + np.exp(slope + 0.25)), rtol=1e-5)
    last = np.asarray(seen[-1].gates)
    assert (last[slope < -0.35] == 1).all()
    np.testing.assert_allclose(last[slope > -0.2], 0.2, rtol=1e-5)  # as low as they may learn
    closing = run(settings(gate_l1=0.25), seen[-1], measured(gate_gradient=slope), 10)[-1]
    assert (closing.gates == 0).sum() == 12
    assert (np.asarray(closing.gates)[last == 1] == 1).all()
    alone = run(settings(max_pruned_heads=0.0), control, measured(gate_gradient=slope), 3)[-1]
    np.testing.assert_array_equal(alone.gates, control.gates)


def test_the_step_decays_with_training_steps_to_its_minimum():
    rules = settings(controller_lr=2.0, controller_lr_decay=0.5, controller_lr_decay_steps=100)
    found = [float(step_size(rules_of(rules, 24), step)) for step in (0, 50, 100, 200, OLD)]
    np.testing.assert_allclose(found, [2, 2 * 0.5**0.5, 1, 0.5, 0.1], rtol=1e-6)
    seen = run(rules, opened(), measured(step=np.int32(200)), 1)[0]
    assert np.isclose(np.unique(seen.logits), [2.5, 3]).all()


@pytest.mark.parametrize("name", ["importance", "entropy", "grad_norm", "gate_gradient"])
def test_measurements_that_are_not_finite_change_nothing(name):
    broken = measured()
    broken[name] = broken[name].at[1, 2].set(jnp.nan)
    before = run(settings(), opened(), measured(), 3)[-1]
    after = run(settings(), before, broken, 1)[0]
    for field in dataclasses.fields(Control):
        np.testing.assert_array_equal(getattr(after, field.name), getattr(before, field.name))


def test_a_single_layer_or_head_is_no_special_case():
    for layers, heads, closed in ((1, 2, 1), (3, 1, 0)):
        last = run(settings(), opened(layers, heads), measured(0, layers, heads), 20)[-1]
        assert (last.gates == 0).sum() == closed


def test_boosts_lie_between_a_half_and_two():
    gates, worth = np.ones((3, 2), np.float32), np.asarray([[0, 1], [2, 4], [8, 100.0]])
    found = {"importance": worth, "grad_norm": worth / 2}
    for adaptive, expected in (
        ("layer", [[0.5] * 2, [1] * 2, [2] * 2]),
        ("importance", [[0.5, 0.5], [2 / 3, 4 / 3], [2, 2]]),  # over the median, 3
        ("gradient", [[0.5, 0.5], [1, 2], [2, 2]]),
    ):
        scale = boosts(settings(head_lr_adaptive=adaptive), gates, found)
        np.testing.assert_allclose(scale, expected, rtol=1e-6)
        assert scale.dtype == gates.dtype
    gates[1:, 0] = 0  # closed heads have no importance and no gradient: what they open with is 1
    for adaptive in ("importance", "gradient"):
        shut = boosts(
            settings(head_lr_adaptive=adaptive), gates, {n: v * gates for n, v in found.items()}
        )
        assert shut[1:, 0].tolist() == [1, 1]
    nothing = {"importance": 0 * worth, "grad_norm": np.full((3, 2), np.nan)}
    for adaptive in ("importance", "gradient"):
        assert (boosts(settings(head_lr_adaptive=adaptive), gates, nothing) == 1).all()
    assert boosts(settings(head_lr_adaptive="layer"), gates[:1], {}).tolist() == [[1, 1]]
