"""Wider GPTs: the function, the moments against the wide net's own gradients, the first steps."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from growing import (
    function_delta,
    gradient_of,
    grown_config,
    logits_of,
    morphed,
    setting_up,
    updates_after,
    with_gradient_moments,
    worst_ratio,
)
from small_models import VARIANTS, flat

from jaxmorph import morphs
from jaxmorph.cli.errors import InputError
from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.model.signatures import Role
from jaxmorph.step.state import VARIABLES

pytestmark = pytest.mark.usefixtures("quick_random_bits")
KEY = jax.random.key(0, impl="rbg")
ADAPTED = {"attn_lora_rank": 3, "vocab_lora_rank": 5, "lora_base": "trained"}
ALL = VARIANTS | {"adapted": ADAPTED, "adapted untied": ADAPTED | {"tied_head": False}}
WIDENINGS = {
    "mlp": ("widen_mlp", 1.5, "d_ff", 36),
    "head": ("widen_heads", 1.75, "n_heads", 7),
    "embed": ("widen_embed", 3, "d_model", 48),
}
UNITS = ("mlp", "head")


def _widened(axis, config, state, optimizer, **options) -> tuple[Any, Any, morphs.Report]:
    name, factor, field, _ = WIDENINGS[axis]
    size = int(dataclasses.asdict(config)[field] * options.pop("factor", factor))
    return morphed(name, config, state, optimizer, KEY, **{field: size}, **options)


@pytest.mark.parametrize("axis", WIDENINGS)
@pytest.mark.parametrize("variant", ALL)
def test_function_is_kept_and_moments_are_those_of_the_wide_net_s_gradients(variant, axis):
    with jax.enable_x64(True):
        config = grown_config(**ALL[variant])
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        before = logits_of(config, state)
        wide, grown, _ = _widened(axis, config, state, adam, recipe="even")
        assert dataclasses.asdict(wide)[WIDENINGS[axis][2]] == WIDENINGS[axis][3]
        assert function_delta(before, logits_of(wide, grown)) < 1e-12
        gradient = gradient_of(wide, grown)
        chex.assert_trees_all_close(grown.opt_state.mu, gradient, rtol=1e-9, atol=1e-14)
        squares = jax.tree.map(jnp.square, gradient)
        chex.assert_trees_all_close(grown.opt_state.nu, squares, rtol=1e-9, atol=1e-18)
        for recipe in ("split",) if axis == "embed" else ("split", "fresh", "noise"):
            _, grown, _ = _widened(axis, config, state, adam, recipe=recipe)
            delta = function_delta(before, logits_of(wide, grown))
            assert (delta < 1e-12) == (recipe != "noise"), (recipe, delta)
            assert delta < 0.1


@pytest.mark.parametrize("axis", UNITS)
def test_fresh_units_leave_the_gradients_of_old_ones(axis):
    with jax.enable_x64(True):
        config = grown_config()
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        wide, grown, report = _widened(axis, config, state, adam, recipe="fresh")
        gradient, mu = flat(gradient_of(wide, grown)), flat(grown.opt_state.mu)
        old = dataclasses.asdict(config)[WIDENINGS[axis][2]]
        fresh = 0
        for path, signature in gpt_signatures(wide).items():
            if axis not in signature.axes:
                np.testing.assert_allclose(mu[path], gradient[path], rtol=1e-9, atol=1e-14)
                continue
            at = signature.axes.index(axis)
            kept, begun = np.split(mu[path], [old], at)
            np.testing.assert_allclose(
                kept, np.split(gradient[path], [old], at)[0], rtol=1e-9, atol=1e-14
            )
            assert not begun.any()
            fresh += 2 * begun.size
            new = np.split(flat(grown.params)[path], [old], at)[1]
            assert new.any() == (signature.role(axis) is Role.PRODUCED and signature.is_matrix)
        assert report.totals["fresh"] == fresh
        np.testing.assert_array_equal(grown["head_gate"][:, config.n_heads :], 1.0)


@pytest.mark.parametrize("axis", WIDENINGS)
def test_even_copies_follow_the_narrow_net_when_consumers_updates_take_their_share(axis):
    """After 20 updates of Adam on both, the wide net's parameters are still the narrow one's, widened.

    Consumers' updates are multiplied by the share c, and ε by the factor of the gradient.
    """
    with jax.enable_x64(True):
        config = grown_config()
        _, state = setting_up(config)
        adam, state = with_gradient_moments(config, state)
        wide, grown, _ = _widened(axis, config, state, adam, recipe="even")
        source = np.arange(WIDENINGS[axis][3]) % dataclasses.asdict(config)[WIDENINGS[axis][2]]
        share = 1.0 / np.bincount(source)[source]

        def along(path: str, role: Role) -> Any:
            signature = gpt_signatures(wide)[path]
            if axis not in signature.axes or signature.role(axis) is not role:
                return 1.0
            shape = [1] * len(signature.axes)
            shape[signature.axes.index(axis)] = -1
            return share.reshape(shape)

        narrow = _adam_steps(config, state, lambda path, role: 1.0)
        followed = _adam_steps(wide, grown, along)
        moved = dataclasses.replace(state, params=narrow)
        _, expected, _ = _widened(axis, config, moved, adam, recipe="even")
        before, found = flat(grown.params), flat(followed)
        for path, leaf in flat(expected.params).items():
            if path.endswith("key_bias"):
                continue  # its gradient is zero but for rounding
            assert np.abs(leaf - before[path]).max() > 1e-3, path
            error = np.linalg.norm(found[path] - leaf) / np.linalg.norm(leaf)
            assert error < 1e-10, (path, error)


def _adam_steps(config, state, factor):
    params, moments = state.params, state.opt_state
    mu, nu = flat(moments.mu), flat(moments.nu)
    for step in range(20):
        gradient = flat(gradient_of(config, dataclasses.replace(state, params=params), seed=step))
        new, t = {}, int(moments.count) + step + 1
        for path, g in gradient.items():
            mu[path], nu[path] = 0.9 * mu[path] + 0.1 * g, 0.95 * nu[path] + 0.05 * g**2
            epsilon = 1e-8 * factor(path, Role.PRODUCED)
            scaled = mu[path] / (1 - 0.9**t) / (np.sqrt(nu[path] / (1 - 0.95**t)) + epsilon)
            new[path] = -1e-3 * scaled * factor(path, Role.CONSUMED)
        params = _added(params, new)
    return params


def _added(params, updates):
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p + updates["/".join(key.key for key in path)], params
    )


@pytest.mark.parametrize("axis", WIDENINGS)
def test_a_size_that_is_there_already_leaves_everything_as_it_is(axis):
    config = grown_config(dtype="float32", **ADAPTED)
    optimizer, state = setting_up(config)
    same, kept, report = _widened(axis, config, state, optimizer, factor=1)
    assert same == config
    chex.assert_trees_all_equal(kept, state)
    assert (report.totals["fresh"], report.totals["reset"]) == (0, 0)


@pytest.mark.parametrize("variant", ["gpt2", "llama", "adapted"])
def test_split_copies_of_the_residual_stream_part_in_training_and_even_ones_do_not(variant):
    with jax.enable_x64(True):
        config = grown_config(**ALL[variant])
        optimizer, state = setting_up(config)
        for recipe in ("even", "split"):
            wide, grown, _ = _widened("embed", config, state, optimizer, factor=2, recipe=recipe)
            trained, _ = updates_after(wide, optimizer, grown, 10)
            parts = {}
            for name, each in (("start", grown), ("end", trained)):
                first, second = np.split(flat(each.params)["blocks/attention/out"], 2, -1)
                parts[name] = np.abs(first - second).max() / np.abs(first).max()
            assert parts["start"] == 0
            assert parts["end"] < 1e-9 if recipe == "even" else parts["end"] > 0.01, parts


@pytest.mark.parametrize("axis", UNITS)
def test_only_even_copies_stay_equal(axis):
    with jax.enable_x64(True):
        config = grown_config()
        _, state = setting_up(config)
        adam, state = with_gradient_moments(config, state)
        produced = "blocks/mlp/up" if axis == "mlp" else "blocks/attention/value"
        for recipe in ("even", "split", "noise"):
            wide, grown, _ = _widened(axis, config, state, adam, recipe=recipe, factor=2)
            at = gpt_signatures(wide)[produced].axes.index(axis)
            first, second = np.split(flat(gradient_of(wide, grown))[produced], 2, at)
            apart = np.abs(first - second).max() / np.abs(first).max()
            assert (apart < 1e-12) == (recipe == "even")
            weights = np.split(flat(grown.params)[produced], 2, at)
            assert (weights[0] == weights[1]).all() == (recipe != "noise")


def test_split_shares_are_uniform_around_even_ones_and_sum_to_one():
    with jax.enable_x64(True):
        config = grown_config(d_ff=512)
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        old = flat(state.params)["blocks/mlp/down"]
        for spread in (1.0, 0.25):
            _, grown, _ = _widened("mlp", config, state, adam, factor=2, spread=spread)
            first, second = np.split(flat(grown.params)["blocks/mlp/down"], 2, 1)
            np.testing.assert_allclose(first + second, old, rtol=1e-12, atol=1e-15)
            for share in (first / old, second / old):
                low, high = 0.5 - spread, 0.5 + spread
                assert share.min() >= low - 1e-9
                assert share.max() <= high + 1e-9
                np.testing.assert_allclose(np.quantile(share, [0.01, 0.5, 0.99]),
                    np.interp([0.01, 0.5, 0.99], [0, 1], [low, high]), atol=0.05 * spread)  # fmt: skip
        _, grown, _ = _widened("mlp", config, state, adam, factor=2.5)
        copies = np.split(flat(grown.params)["blocks/mlp/down"], [512, 1024], 1)
        copies[2] = np.pad(copies[2], [(0, 0), (0, 256), (0, 0)])
        np.testing.assert_allclose(sum(copies), old, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("recipe", ["split", "even", "noise", "fresh"])
def test_gates_and_status_follow_their_heads(recipe):
    config = grown_config(dtype="float32")
    optimizer, state = setting_up(config)
    _, grown, _ = _widened("head", config, state, optimizer, recipe=recipe)
    old = np.asarray(state["head_gate"])
    np.testing.assert_array_equal(grown["head_gate"][:, :4], old)
    copied = old[:, :3] if recipe != "fresh" else np.ones((2, 3))
    np.testing.assert_array_equal(grown["head_gate"][:, 4:], copied)
    status = (
        np.zeros((2, 7)) if recipe != "fresh" else np.r_["1", np.zeros((2, 4)), -np.ones((2, 3))]
    )
    np.testing.assert_array_equal(grown["head_status"], status)
    of_heads = {name for name, each in VARIABLES.items() if "head" in each.axes.names}
    chex.assert_trees_all_equal(
        *({n: v for n, v in each.variables.items() if n not in of_heads} for each in (grown, state))
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "sgd", "adafactor"])
def test_state_is_shaped_as_a_fresh_one_and_goes_on(optimizer):
    with jax.enable_x64(True):
        config = grown_config(**ADAPTED | {"lora_base": "frozen"})
        rule, state = setting_up(config, optimizer=optimizer, grad_clip=1.0, weight_decay=0.1)
        state, _ = updates_after(config, rule, state, 1)
        for axis in WIDENINGS:
            config, state, report = _widened(axis, config, state, rule)
            chex.assert_trees_all_equal_shapes_and_dtypes(state.opt_state, rule.init(state.params))
            leaves = jax.tree.leaves(state.opt_state)
            assert sum(report.totals.values()) == sum(leaf.size for leaf in leaves)
        _, updates = updates_after(config, rule, state, 1)
        assert all(np.isfinite(update).all() for update in updates[0].values())


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("axis", UNITS)
def test_first_steps_of_fresh_units_do_not_overshoot(axis, beta2):
    config = grown_config(dtype="float32")
    optimizer, state = setting_up(config, beta2=beta2)
    state, _ = updates_after(config, optimizer, state, 60)
    for recipe in ("fresh", "split"):
        wide, grown, _ = _widened(axis, config, state, optimizer, recipe=recipe)
        _, updates = updates_after(wide, optimizer, grown, 20)
        worst = worst_ratio(wide, axis, dataclasses.asdict(config)[WIDENINGS[axis][2]], updates)
        assert max(worst.values()) <= 1.5, (recipe, worst)


@pytest.mark.parametrize(
    ("axis", "options", "words"),
    [
        ("head", {"factor": 0.5}, ["head", "more than its size now, 4"]),
        ("head", {"recipe": "evn"}, ["did you mean 'even'"]),
        ("embed", {"recipe": "fresh"}, ["'fresh'", "split, even"]),
    ],
)
def test_what_cannot_be_widened_is_refused(axis, options, words):
    config = grown_config(dtype="float32")
    optimizer, state = setting_up(config)
    with pytest.raises(InputError) as raised:
        _widened(axis, config, state, optimizer, **options)
    for word in words:
        assert word in str(raised.value)
