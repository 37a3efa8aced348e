"""Adapters merged and of other ranks: the function, NumPy's SVD, moments by gradients, first steps."""

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

from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_signatures, lora_adapters

pytestmark = pytest.mark.usefixtures("quick_random_bits")
KEY = jax.random.key(5, impl="rbg")
ATTN, VOCAB = {"attn_lora_rank": 4}, {"vocab_lora_rank": 6}
TRAINED = {"lora_base": "trained"}
ADAPTED: dict[str, dict[str, Any]] = {
    "both trained": ATTN | VOCAB | TRAINED,
    "both frozen untied": ATTN | VOCAB | VARIANTS["untied"],
    "attention frozen": ATTN,
    "vocabulary trained untied": VOCAB | VARIANTS["untied"] | TRAINED,
}
RANKS = {"attn_rank": "attn_lora_rank", "vocab_rank": "vocab_lora_rank"}


def _rescaled(config, state, optimizer, value: float, **options) -> tuple[Any, Any, list]:
    """The GPT with every rank it has multiplied, and the reports."""
    reports = []
    for axis in RANKS:
        if getattr(config, RANKS[axis]):
            name = f"decrease_{axis.removesuffix('_rank')}_lora_scaling"
            size = {RANKS[axis]: int(getattr(config, RANKS[axis]) * value)}
            call = size | options
            config, state, report = morphed(name, config, state, optimizer, KEY, **call)
            reports.append(report)
    return config, state, reports


def _merged(config, state, optimizer, key: Any = KEY) -> tuple[Any, Any, Any]:
    return morphed("merge_lora_weights", config, state, optimizer, key)


def _products(config, params) -> dict[str, np.ndarray]:
    """(1 / rank)·A·B of every adapter as matrices, a layer each: [layer, rows, columns]."""
    leaves, found = flat(params), {}
    for base, (path_a, path_b) in lora_adapters(config).items():
        a, b = leaves[path_a], leaves[path_b]
        rank = a.shape[-1]
        layers = config.n_layers if base.startswith("blocks/") else 1
        a, b = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
        found[base] = np.stack([x @ y / rank for x, y in zip(a, b, strict=True)])
    return found


def _adapter_paths(config) -> set[str]:
    return {path for pair in lora_adapters(config).values() for path in pair}


@pytest.mark.parametrize("variant", ADAPTED)
def test_merging_and_larger_ranks_keep_the_function(variant):
    with jax.enable_x64(True):
        config = grown_config(**ADAPTED[variant])
        optimizer, state = setting_up(config)
        before = logits_of(config, state)
        _, merged, _ = _merged(config, state, optimizer)
        assert function_delta(before, logits_of(config, merged)) < 1e-12
        wide, grown, reports = _rescaled(config, state, optimizer, 2)
        doubled = {name: 2 * getattr(config, name) for name in RANKS.values()}
        assert wide == dataclasses.replace(config, **doubled)
        assert function_delta(before, logits_of(wide, grown)) < 1e-12
        assert not any(report.errors for report in reports)
        no_detour = state.with_variables(lora_alpha=jnp.zeros(()))
        assert function_delta(before, logits_of(config, no_detour)) > 1e-2


def test_merging_reinitialises_adapters_and_leaves_other_moments():
    with jax.enable_x64(True):
        config = grown_config(**ADAPTED["both trained"])
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        _, merged, report = _merged(config, state, adam)
        old, new, products = (
            flat(state.params),
            flat(merged.params),
            _products(config, state.params),
        )
        alpha = float(state["lora_alpha"])
        for path, leaf in old.items():
            if path in products:
                expected = leaf + alpha * products[path].reshape(leaf.shape)
                np.testing.assert_allclose(new[path], expected, rtol=1e-13, atol=1e-14)
            elif path.endswith("_lora_b"):
                assert leaf.any()
                assert not new[path].any()
            elif path.endswith("_lora_a"):
                over = config.vocab_lora_rank if path.startswith("embed/") else config.d_model
                assert abs(np.std(new[path]) * over**0.5 - 1) < 0.35
                assert abs(np.corrcoef(new[path].ravel(), leaf.ravel())[0, 1]) < 0.3
            else:
                np.testing.assert_array_equal(new[path], leaf)
        adapters = _adapter_paths(config)
        for field in ("mu", "nu"):
            before, after = (flat(getattr(s.opt_state, field)) for s in (state, merged))
            assert all(before[path].any() and not after[path].any() for path in adapters)
            for path in before.keys() - adapters:
                np.testing.assert_array_equal(after[path], before[path])
        assert report.totals["fresh"] == 2 * sum(old[path].size for path in adapters)
        assert report.totals["reset"] == 0
        _, other, _ = _merged(config, state, adam, key=jax.random.fold_in(KEY, 1))
        assert all((flat(other.params)[p] != new[p]).any() for p in adapters if new[p].any())
        chex.assert_trees_all_equal_shapes_and_dtypes(merged, state)


def test_at_a_larger_rank_moments_follow_the_gradients():
    with jax.enable_x64(True):
        config = grown_config(**ADAPTED["both trained"])
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        wide, grown, reports = _rescaled(config, state, adam, 2)
        gradient, old, params = (
            flat(x) for x in (gradient_of(wide, grown), state.params, grown.params)
        )
        mu, nu, fresh = flat(grown.opt_state.mu), flat(grown.opt_state.nu), 0
        for path, g in gradient.items():
            axis = next((a for a in RANKS if a in gpt_signatures(wide)[path].axes), None)
            if axis is None:
                np.testing.assert_array_equal(params[path], old[path])
                np.testing.assert_allclose(mu[path], g, rtol=1e-9, atol=1e-14)
                np.testing.assert_allclose(nu[path], g**2, rtol=1e-9, atol=1e-18)
                continue
            at, is_b = gpt_signatures(wide)[path].axes.index(axis), path.endswith("_lora_b")
            kept, begun = np.split(params[path], 2, at)
            np.testing.assert_array_equal(kept, old[path] * (2 if is_b else 1))
            assert begun.any() != is_b
            for leaf, power, tiny in ((mu[path], 1, 1e-14), (nu[path], 2, 1e-18)):
                kept, begun = np.split(leaf, 2, at)
                expected = np.split(g, 2, at)[0] ** power
                np.testing.assert_allclose(kept, expected, rtol=1e-9, atol=tiny)
                inner = tuple(range(int(path.startswith("blocks/")), leaf.ndim))
                mean = kept.mean(inner, keepdims=True) if power == 2 else np.zeros(())
                np.testing.assert_allclose(begun, np.broadcast_to(mean, begun.shape), rtol=1e-9)
                fresh += begun.size
        assert sum(report.totals["fresh"] for report in reports) == fresh


@pytest.mark.parametrize("variant", ADAPTED)
def test_any_rank_after_a_merge_keeps_the_function_and_begins_new_adapters(variant):
    with jax.enable_x64(True):
        config = grown_config(**ADAPTED[variant])
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        before, products = logits_of(config, state), _products(config, state.params)
        alpha = float(state["lora_alpha"])
        for value in (0.5, 2):
            after, changed, reports = _rescaled(config, state, adam, value, merge_first=True)
            assert function_delta(before, logits_of(after, changed)) < 1e-12
            assert not any(report.errors for report in reports)
            old, new = flat(state.params), flat(changed.params)
            mu, nu = flat(changed.opt_state.mu), flat(changed.opt_state.nu)
            for base, (a, b) in lora_adapters(after).items():
                expected = old[base] + alpha * products[base].reshape(old[base].shape)
                np.testing.assert_allclose(new[base], expected, rtol=1e-13, atol=1e-14)
                assert new[a].any()
                assert not new[b].any()
                assert not any(leaf[path].any() for leaf in (mu, nu) for path in (a, b))
            for path in mu.keys() - _adapter_paths(after):
                np.testing.assert_array_equal(mu[path], flat(state.opt_state.mu)[path])
        _, lossy, _ = _rescaled(config, state, adam, 0.5)
        assert function_delta(before, logits_of(_halved(config), lossy)) > 1e-2


def _halved(config) -> Any:
    return dataclasses.replace(
        config, **{field: getattr(config, field) // 2 for field in RANKS.values()}
    )


def test_merging_before_one_rank_leaves_the_other_adapters():
    with jax.enable_x64(True):
        config = grown_config(**ADAPTED["both trained"])
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        _, changed, _ = morphed(
            "set_attn_lora_rank", config, state, adam, KEY, attn_lora_rank=2, merge_first=True
        )
        for kept in ("embed/tokens", "embed/tokens_lora_a", "embed/tokens_lora_b"):
            np.testing.assert_array_equal(flat(changed.params)[kept], flat(state.params)[kept])
        _, same, report = morphed("set_attn_lora_rank", config, state, adam, KEY, merge_first=True)
        chex.assert_trees_all_equal(same, state)
        assert report.totals["fresh"] == 0


def test_a_smaller_rank_is_the_best_approximation_and_says_what_is_lost():
    with jax.enable_x64(True):
        config = grown_config(**ATTN, **VOCAB)
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        small, shrunk, reports = _rescaled(config, state, adam, 0.5)
        assert (small.attn_lora_rank, small.vocab_lora_rank) == (2, 3)
        shrink = jax.jit(
            lambda state, key: morphed(
                "decrease_attn_lora_scaling", config, state, adam, key, attn_lora_rank=2
            )[1:]
        )
        compiled, report = shrink(state, KEY)
        name = "blocks/attention/out_lora_b"
        np.testing.assert_allclose(
            flat(compiled.params)[name], flat(shrunk.params)[name], rtol=1e-9
        )
        assert report.lines == reports[0].lines
        errors = {path: e for report in reports for path, e in report.errors.items()}
        found = _products(small, shrunk.params)
        for base, products in _products(config, state.params).items():
            u, s, v = np.linalg.svd(products, full_matrices=False)
            rank = getattr(
                small, RANKS["attn_rank" if base.startswith("blocks/") else "vocab_rank"]
            )
            best = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
            np.testing.assert_allclose(found[base], best, rtol=1e-9, atol=1e-13)
            tail = np.sqrt((s[:, rank:] ** 2).sum() / (s**2).sum())
            assert tail > 1e-2
            np.testing.assert_allclose(errors[base], tail, rtol=1e-9)
            lost = np.linalg.norm(found[base] - products) / np.linalg.norm(products)
            np.testing.assert_allclose(errors[base], lost, rtol=1e-9)
        assert f"{float(errors['embed/tokens']):.2g}, of embed/tokens" in str(reports[1])
        assert all(line.how == "transported" for line in reports[0].lines if line.field == "params")
        before, after = flat(state.opt_state.nu), flat(shrunk.opt_state.nu)
        adapters = _adapter_paths(config)
        for path, mu in flat(shrunk.opt_state.mu).items():
            if path not in adapters:
                np.testing.assert_array_equal(mu, flat(state.opt_state.mu)[path])
                np.testing.assert_array_equal(after[path], before[path])
                continue
            assert not mu.any()
            factor = 2.0 if path.endswith("_a") else 4.0
            np.testing.assert_allclose(after[path].mean(), before[path].mean() * factor, rtol=1e-9)
        chex.assert_trees_all_equal_shapes_and_dtypes(shrunk.params, gpt.init(small, KEY))
        assert np.isfinite(logits_of(small, shrunk)).all()


def test_a_rank_that_was_not_needed_is_given_back_without_loss():
    with jax.enable_x64(True):
        config = grown_config(**ATTN, **VOCAB)
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        wide, grown, _ = _rescaled(config, state, adam, 2)
        back, shrunk, reports = _rescaled(wide, grown, adam, 0.5)
        assert back == config
        assert function_delta(logits_of(config, state), logits_of(config, shrunk)) < 1e-12
        assert all(float(e) < 1e-14 for report in reports for e in report.errors.values())
        same, kept, reports = _rescaled(config, state, adam, 1)
        assert same == config
        chex.assert_trees_all_equal(kept, state)
        assert [report.totals["fresh"] for report in reports] == [0, 0]


def test_adapters_that_add_nothing_can_still_learn_at_a_smaller_rank():
    with jax.enable_x64(True):
        config = grown_config(**ATTN, **VOCAB)
        optimizer, state = setting_up(config)
        for zero in ("_lora_a", "_lora_b"):
            params = jax.tree_util.tree_map_with_path(
                lambda path, leaf, zero=zero: leaf * (not path[-1].key.endswith(zero)), state.params
            )
            old = dataclasses.replace(state, params=params)
            small, shrunk, reports = _rescaled(config, old, optimizer, 0.5)
            before, after = flat(old.params), flat(shrunk.params)
            assert all(float(e) == 0 for report in reports for e in report.errors.values())
            for a, b in lora_adapters(small).values():
                assert not after[b].any()
                assert after[a].any()
                if zero == "_lora_b":
                    length = np.sqrt((after[a] ** 2).sum() / after[a].shape[-1])
                    expected = np.sqrt((before[a] ** 2).sum() / before[a].shape[-1])
                    np.testing.assert_allclose(length, expected, rtol=0.1)


def test_a_rank_above_the_number_of_rows_shrinks_without_loss():
    with jax.enable_x64(True):
        config = grown_config(vocab_lora_rank=16, vocab_size=8)
        optimizer, state = setting_up(config)
        small, shrunk, (report,) = _rescaled(config, state, optimizer, 0.75)
        expected, found = _products(config, state.params), _products(small, shrunk.params)
        np.testing.assert_allclose(found["embed/tokens"], expected["embed/tokens"], atol=1e-13)
        assert float(report.errors["embed/tokens"]) == 0
        assert flat(shrunk.params)["embed/tokens_lora_a"].any(0).all()


def test_a_gpt_without_layers_has_its_adapters_changed_too():
    with jax.enable_x64(True):
        config = grown_config(n_layers=0, **ATTN)
        optimizer, state = setting_up(config)
        for value in (2, 0.25):
            config, state, (report,) = _rescaled(config, state, optimizer, value)
            _assert_shaped_as_new(config, optimizer, state)
            assert all(float(e) == 0 for e in report.errors.values())
        config, state, _ = _merged(config, state, optimizer)
        _assert_shaped_as_new(config, optimizer, state)


def _assert_shaped_as_new(config, optimizer, state) -> None:
    params = jax.eval_shape(lambda: gpt.init(config, KEY))
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, params)
    opt_state = jax.eval_shape(optimizer.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.opt_state, opt_state)


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_state_is_shaped_as_a_fresh_one_and_goes_on(optimizer):
    with jax.enable_x64(True):
        config = grown_config(**ATTN, **VOCAB)
        rule, state = setting_up(config, optimizer=optimizer, grad_clip=1.0, weight_decay=0.1)
        state, _ = updates_after(config, rule, state, 1)
        for change in ("up", "down", "merge"):
            if change == "merge":
                after, changed, last = _merged(config, state, rule)
                reports = [last]
            else:
                value = 2 if change == "up" else 0.5
                after, changed, reports = _rescaled(config, state, rule, value)
            _assert_shaped_as_new(after, rule, changed)
            leaves = jax.tree.leaves(changed.opt_state)
            assert sum(reports[-1].totals.values()) == sum(leaf.size for leaf in leaves)
        _, updates = updates_after(config, rule, changed, 1)
        assert all(np.isfinite(update).all() for update in updates[0].values())


def test_first_steps_of_new_adapters_do_not_overshoot():
    """Those after a merge do, on purpose: see `merge_lora_weights`."""
    with jax.enable_x64(True):
        config = grown_config(**ADAPTED["both trained"])
        optimizer, state = setting_up(config, beta2=0.999)
        state, _ = updates_after(config, optimizer, state, 60)
        for value in (2, 0.5):
            after, changed, _ = _rescaled(config, state, optimizer, value)
            _assert_shaped_as_new(after, optimizer, changed)
            _, updates = updates_after(after, optimizer, changed, 20)
            for axis, field in RANKS.items():
                old = getattr(config, field) if value > 1 else 0
                worst = worst_ratio(after, axis, old, updates)
                assert max(worst.values()) <= 1.5, (value, worst)
        _, merged, _ = _merged(config, state, optimizer)
        _, updates = updates_after(config, optimizer, merged, 20)
        worst = [max(worst_ratio(config, axis, 0, updates).values()) for axis in RANKS]
        assert 1.5 < max(worst) < 3
