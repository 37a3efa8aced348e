"""Deeper GPTs: orders, exact and inexact recipes, where moments come from, growth from no layers."""

import dataclasses
import functools
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
from small_models import VARIANTS, flat, small_tokens

from jaxmorph import morphs
from jaxmorph.cli.errors import InputError
from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.morphs.gpt import MORPHS, Transition
from jaxmorph.morphs.gpt.depth import RECIPES
from jaxmorph.step.state import gates_of

pytestmark = pytest.mark.usefixtures("quick_random_bits")
KEY = jax.random.key(0, impl="rbg")
ADAPTED = {"attn_lora_rank": 3, "vocab_lora_rank": 5, "lora_base": "trained"}
OPTIMIZERS = ("adamw", "muon", "lion", "sgd", "adafactor")


def _stacked(config, state, optimizer, **options) -> tuple[Any, Any, morphs.Report]:
    layers = options.pop("n_layers", 2 * config.n_layers)
    return morphed("stack_layers", config, state, optimizer, KEY, n_layers=layers, **options)


@pytest.mark.parametrize(
    ("order", "old", "new", "source"),
    [
        ("stack", 2, 4, [0, 1, 0, 1]),
        ("stack", 4, 6, [0, 1, 2, 3, 0, 1]),
        ("interleave", 2, 4, [0, 0, 1, 1]),
        ("interleave", 4, 6, [0, 0, 1, 2, 2, 3]),
        ("middle", 4, 6, [0, 1, 2, 1, 2, 3]),
        ("middle", 4, 8, [0, 1, 2, 1, 2, 1, 2, 3]),
        ("middle", 3, 5, [0, 1, 1, 1, 2]),
        ("middle", 5, 6, [0, 1, 2, 2, 3, 4]),
        ("middle", 1, 3, [0, 0, 0]),
        ("stack", 0, 2, [-1, -1]),
    ],
)
def test_orders(order, old, new, source):
    change = morphs.repeat("layer", old, new, order=order)
    assert change.source.tolist() == source
    fresh = morphs.repeat("layer", old, new, order=order, fresh=True)
    kept = [layer for layer in fresh.source.tolist() if layer >= 0]
    assert kept == list(range(old))
    assert (change.is_copy | change.is_fresh).tolist() == fresh.is_fresh.tolist()


@pytest.mark.parametrize(
    ("source", "fresh"),
    [([0, 0, 1, 1], [1, 3]), ([1, 0, 0, 1], [2, 3]), ([0, 0, 0, 1], [1, 2])],
)
def test_a_list_of_layers_is_copied_as_it_stands(source, fresh):
    config = grown_config(dtype="float32")
    optimizer, state = setting_up(config)
    deep = dataclasses.replace(config, n_layers=4)
    transition = Transition(config, deep, state, optimizer, KEY, value=tuple(source))
    copied, _ = MORPHS["stack_layers"](transition)
    silent, _ = MORPHS["stack_layers"](transition, recipe="identity")
    for path, leaf in flat(state.params).items():
        if not path.startswith("blocks/"):
            continue
        np.testing.assert_array_equal(flat(copied.params)[path], leaf[source])
        quiet = gpt_signatures(config)[path].adds_to_residual
        expected = leaf[source].copy()
        expected[fresh] = 0 if quiet else expected[fresh]
        np.testing.assert_array_equal(flat(silent.params)[path], expected)
    np.testing.assert_array_equal(copied["layer_gate"], np.asarray(state["layer_gate"])[source])


def test_as_many_layers_as_there_are_leave_everything_as_it_is():
    config = grown_config(dtype="float32")
    optimizer, state = setting_up(config)
    for recipe in RECIPES:
        _, kept, report = _stacked(config, state, optimizer, n_layers=2, recipe=recipe)
        chex.assert_trees_all_equal(kept, state)
        assert report.totals["fresh"] == 0


@pytest.mark.parametrize("variant", [*VARIANTS, "adapted"])
def test_identity_and_masked_growth_keep_the_function_and_the_gradients_of_old_layers(variant):
    with jax.enable_x64(True):
        config = grown_config(**(ADAPTED if variant == "adapted" else VARIANTS[variant]))
        adam, state = with_gradient_moments(config, setting_up(config)[1])
        before, gradient = logits_of(config, state), flat(gradient_of(config, state))
        deep = dataclasses.replace(config, n_layers=4)
        for order in ("stack", "interleave"):
            new = [2, 3] if order == "stack" else [1, 3]
            for recipe, blocks in (
                ("identity", "copied"), ("identity", "fresh"), ("masked", "copied"), ("masked", "fresh"),
            ):  # fmt: skip
                found, grown, _ = _stacked(
                    config, state, adam, order=order, recipe=recipe, blocks=blocks
                )
                assert found == deep
                assert function_delta(before, logits_of(deep, grown)) < 1e-12, (recipe, blocks)
                mu = flat(grown.opt_state.mu)
                for path, signature in gpt_signatures(config).items():
                    kept = np.delete(mu[path], new, 0) if signature.stacked else mu[path]
                    np.testing.assert_array_equal(kept, gradient[path])
        after = flat(gradient_of(deep, grown))
        for path, g in gradient.items():
            kept = after[path][[0, 2]] if path.startswith("blocks/") else after[path]
            np.testing.assert_allclose(kept, g, rtol=1e-9, atol=1e-14)
        for blocks in ("copied", "fresh"):
            _, grown, _ = _stacked(config, state, adam, blocks=blocks)
            assert function_delta(before, logits_of(deep, grown)) > 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("order", ["stack", "interleave", "middle"])
def test_weights_moments_and_gates_come_from_the_layer_that_was_copied(order, recipe):
    config = grown_config(dtype="float32", n_layers=4)
    _, state = setting_up(config)
    adam, state = with_gradient_moments(config, state)
    _, grown, report = _stacked(config, state, adam, order=order, recipe=recipe, n_layers=6)
    change = morphs.repeat("layer", 4, 6, order=order)
    source, new = change.source, np.flatnonzero(change.is_copy)
    trees = [(state.params, grown.params)]
    trees += [(getattr(state.opt_state, m), getattr(grown.opt_state, m)) for m in ("mu", "nu")]
    fresh = 0
    for number, (old_tree, new_tree) in enumerate(trees):
        old, found = flat(old_tree), flat(new_tree)
        for path, signature in gpt_signatures(config).items():
            if not signature.stacked:
                np.testing.assert_array_equal(found[path], old[path])
                continue
            expected = old[path][source]
            if recipe == "identity" and signature.adds_to_residual:
                mean = old[path].reshape(4, -1).mean(1)[source[new]]
                start = mean if number == 2 else np.zeros(len(new))
                expected[new] = start.reshape([-1] + [1] * (expected.ndim - 1))
                fresh += 0 if number == 0 else expected[new].size
            np.testing.assert_allclose(found[path], expected, rtol=1e-5)
    assert report.totals["fresh"] == fresh
    gate = np.asarray(state["layer_gate"])[source]
    if recipe == "masked":
        gate[new] = 0
    np.testing.assert_array_equal(grown["layer_gate"], gate)
    np.testing.assert_array_equal(grown["head_gate"], np.asarray(state["head_gate"])[source])


def test_moments_of_copies_can_be_fresh_or_all_of_them_restarted():
    config = grown_config(dtype="float32")
    adam, state = with_gradient_moments(config, setting_up(config)[1])
    entries = sum(leaf.size for leaf in jax.tree.leaves(state.params["blocks"]))
    _, grown, report = _stacked(config, state, adam, moments="fresh")
    for path, mu in flat(grown.opt_state.mu["blocks"]).items():
        np.testing.assert_array_equal(mu[:2], flat(state.opt_state.mu["blocks"])[path])
        assert not mu[2:].any()
    assert report.totals["fresh"] == 2 * entries
    assert grown.opt_state.count == 5
    _, grown, report = _stacked(config, state, adam, moments="restart")
    chex.assert_trees_all_equal(grown.opt_state, adam.init(grown.params))
    assert report.totals["transported"] == report.totals["fresh"] == 0


@pytest.mark.parametrize(
    "variant", [{}, ADAPTED, VARIANTS["llama"]], ids=["gpt2", "adapted", "llama"]
)
def test_from_no_layers(variant):
    with jax.enable_x64(True):
        config = grown_config(n_layers=0, **variant)
        optimizer, state = setting_up(config)
        before = logits_of(config, state)
        state, _ = updates_after(config, optimizer, state, 2)
        after = logits_of(config, state)
        assert np.isfinite(after).all()
        assert function_delta(before, after) > 0
        cache = gpt.empty_cache(config, 2)
        extend = jax.jit(functools.partial(gpt.extend, config))
        tokens, start = jnp.asarray(small_tokens(2, 12)), jnp.zeros((), jnp.int32)
        extended, _ = extend(state.params, cache, tokens, start, gates=gates_of(state.variables))
        for recipe in RECIPES:
            deep, grown, report = _stacked(config, state, optimizer, recipe=recipe, n_layers=3)
            assert deep.n_layers == 3
            fresh = jax.eval_shape(lambda deep=deep: optimizer.init(gpt.init(deep, KEY)))
            chex.assert_trees_all_equal_shapes_and_dtypes(grown.opt_state, fresh)
            if recipe != "copy":
                assert function_delta(after, logits_of(deep, grown)) < 1e-12
            blocks = sum(leaf.size for leaf in jax.tree.leaves(grown.params["blocks"]))
            assert report.totals["fresh"] == 2 * blocks
            np.testing.assert_array_equal(grown["layer_gate"], float(recipe != "masked"))
        np.testing.assert_allclose(extended, after, atol=1e-9)


@pytest.mark.parametrize("n_layers", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_shaped_as_a_fresh_one_and_goes_on(optimizer, n_layers):
    with jax.enable_x64(True):
        config = grown_config(n_layers=n_layers)
        rule, state = setting_up(config, optimizer=optimizer, grad_clip=1.0, weight_decay=0.1)
        state, _ = updates_after(config, rule, state, 1)
        deep, grown, report = _stacked(
            config, state, rule, recipe="identity", n_layers=n_layers + 2
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(grown.opt_state, rule.init(grown.params))
        leaves = jax.tree.leaves(grown.opt_state)
        assert sum(report.totals.values()) == sum(leaf.size for leaf in leaves)
        _, updates = updates_after(deep, rule, grown, 1)
        assert all(np.isfinite(update).all() for update in updates[0].values())


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("n_layers", [2, 0])
def test_first_steps_of_new_layers_do_not_overshoot(n_layers, beta2):
    config = grown_config(dtype="float32", n_layers=n_layers)
    optimizer, state = setting_up(config, beta2=beta2)
    state, _ = updates_after(config, optimizer, state, 60)
    for blocks in ("copied", "fresh") if n_layers else ("fresh",):
        layers = n_layers + 2
        deep, grown, _ = _stacked(
            config, state, optimizer, recipe="identity", blocks=blocks, n_layers=layers
        )
        _, updates = updates_after(deep, optimizer, grown, 20)
        worst = worst_ratio(deep, "layer", n_layers, updates)
        assert max(worst.values()) <= 1.5, (blocks, worst)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_layers": 1}, ["more than its size now, 2"]),
        ({"order": "stak"}, ["did you mean 'stack'"]),
        ({"recipe": "identiy"}, ["did you mean 'identity'"]),
        ({"blocks": "new"}, ["one of copied, fresh"]),
    ],
)
def test_what_cannot_be_stacked_is_refused(options, words):
    config = grown_config(dtype="float32")
    optimizer, state = setting_up(config)
    with pytest.raises(InputError) as raised:
        _stacked(config, state, optimizer, **options)
    for word in words:
        assert word in str(raised.value)
