"""The training step: accumulation, skipped updates, learning rate, and the same on any mesh."""

import dataclasses
import math
import os
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import shape_of, small_config, small_tokens

from jaxmorph.config.mesh import parse_mesh
from jaxmorph.config.settings import OptimizerSettings, Settings
from jaxmorph.model.tree_paths import leaves_by_path
from jaxmorph.morphs.gpt import MORPHS, Transition
from jaxmorph.step.memory import memory
from jaxmorph.step.parts import Parts
from jaxmorph.step.programs import _XLA_CHOOSES_WELL, make_programs
from jaxmorph.step.sharding import make_mesh, place_batch
from jaxmorph.step.state import Start


def _programs(config=None, mesh="data=1", parts=None, frozen_layers=(), **changes):
    settings = dataclasses.replace(Settings(), optimizer=OptimizerSettings(**changes))
    shape = dataclasses.replace(
        shape_of(config or small_config()), warmup_steps=3, frozen_layers=frozen_layers
    )
    return make_programs(Start(settings, shape, 40), make_mesh(parse_mesh(mesh)), parts or Parts())


def _step(programs, mesh, state, sums, batches):
    for index, batch in enumerate(batches):
        sums = programs.accumulate(state, sums, place_batch(mesh, batch), np.int32(index))
    return programs.update(state, sums)


def _with(state, **variables):
    """The state with other values of scalars, placed as they were."""
    placed = {
        name: jax.device_put(jnp.asarray(value, state[name].dtype), state[name].sharding)
        for name, value in variables.items()
    }
    return state.with_variables(**placed)


def _train(programs, mesh_text, steps, split=1, batch=8):
    mesh = make_mesh(parse_mesh(mesh_text))
    state, sums, losses = programs.init(), programs.zero_sums(), []
    for step in range(steps):
        whole = small_tokens(batch, 25, seed=step)
        state, sums, metrics = _step(programs, mesh, state, sums, np.split(whole, split))
        losses.append(float(metrics["train/loss"]))  # also waits: many steps in flight can deadlock
    return state, losses


def test_accumulated_gradients_are_those_of_the_big_batch():
    with jax.enable_x64(True):
        config = small_config(dtype="float64")
        programs = _programs(config)
        whole, losses = _train(programs, "data=1", 4, batch=32)
        parts, losses_of_parts = _train(programs, "data=1", 4, split=4, batch=32)
        np.testing.assert_allclose(losses_of_parts, losses, rtol=1e-12)
        chex.assert_trees_all_close(parts.params, whole.params, atol=1e-11)


@pytest.mark.skipif(_XLA_CHOOSES_WELL, reason="this jaxlib is left to choose by itself")
def test_products_by_ynnpack_are_those_by_eigen(monkeypatch):
    """Users' programs are compiled with YNNPACK, those of the other tests without, to save time."""
    tokens, found = place_batch(make_mesh(parse_mesh("data=1")), small_tokens(8, 25)), []
    for flags in (os.environ["XLA_FLAGS"], ""):
        monkeypatch.setenv("XLA_FLAGS", flags)  # XLA has read it already, for good
        programs: Any = _programs(small_config(scan_layers="scan"))
        arguments = programs.init(), programs.zero_sums(), tokens, np.int32(0)
        accumulate = programs.accumulate.lower(*arguments).compile()
        assert ("%ynn_fusion" in accumulate.as_text()) == (not flags)
        found.append(jax.device_get(accumulate(*arguments)))
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)


def test_no_hyperparameter_and_no_count_compiles_anything():
    programs, mesh = _programs(), make_mesh(parse_mesh("data=1"))
    state, sums, _ = _step(
        programs, mesh, programs.init(), programs.zero_sums(), [small_tokens(8, 25)]
    )
    compiled = programs.accumulate._cache_size(), programs.update._cache_size()  # pyright: ignore
    for batches, variables in (
        (3, {"lr_multiplier": 0.5}),
        (2, {"schedule_start": 5, "warmup_steps": 1, "total_steps": 90}),
    ):
        state = _with(state, **variables)
        state, sums, _ = _step(programs, mesh, state, sums, [small_tokens(8, 25)] * batches)
    assert (programs.accumulate._cache_size(), programs.update._cache_size()) == compiled  # pyright: ignore


def test_learning_rate_is_the_documents_formula_times_the_multiplier():
    programs, mesh = (
        _programs(learning_rate=3e-3, min_lr_ratio=0.1),
        make_mesh(parse_mesh("data=1")),
    )
    state, sums = programs.init(), programs.zero_sums()
    for step in range(45):
        if step == 20:
            state = _with(state, lr_multiplier=0.5)
        state, sums, metrics = _step(programs, mesh, state, sums, [small_tokens(8, 25)])
        progress = min(1.0, (step - 3) / (40 - 3))
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        expected = 3e-3 * (step / 3 if step < 3 else cosine) * (0.5 if step >= 20 else 1.0)
        assert abs(float(metrics["train/learning_rate"]) - expected) < 1e-6 * 3e-3, step


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_update_is_skipped_and_counted(poison):
    programs, mesh = _programs(), make_mesh(parse_mesh("data=1"))
    state, sums, _ = _step(
        programs, mesh, programs.init(), programs.zero_sums(), [small_tokens(8, 25)]
    )
    before = jax.device_get({"params": state.params, "opt_state": state.opt_state})
    for bad in (1, 2):
        batch = place_batch(mesh, small_tokens(8, 25))
        sums = programs.accumulate(state, sums, batch, np.int32(0))
        bias = sums.gradients["head"]["norm_bias"]
        sums.gradients["head"]["norm_bias"] = jax.device_put(bias.at[0].set(poison), bias.sharding)
        state, sums, metrics = programs.update(state, sums)
        after = jax.device_get({"params": state.params, "opt_state": state.opt_state})
        chex.assert_trees_all_equal(after, before)
        assert (int(state["step"]), int(state["skipped"])) == (1 + bad, bad)
        assert int(metrics["skipped_in_a_row"]) == bad
        assert not np.isfinite(metrics["train/grad_norm"])
    state, sums, metrics = _step(programs, mesh, state, sums, [small_tokens(8, 25)])
    assert (int(metrics["train/skipped"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    assert np.isfinite(metrics["train/loss"])


def test_dropout_differs_between_steps_and_micro_batches_and_repeats_itself():
    programs, mesh = _programs(small_config(dropout=0.3)), make_mesh(parse_mesh("data=1"))
    state, batch = programs.init(), place_batch(mesh, small_tokens(8, 25))

    def loss(state, index):
        sums = programs.accumulate(state, programs.zero_sums(), batch, np.int32(index))
        return float(sums.measures["loss"].value)

    later = _with(state, step=1)
    assert loss(state, 0) == loss(state, 0)
    assert len({loss(state, 0), loss(state, 1), loss(later, 0)}) == 3


def test_plateau_halves_the_rate_after_patience_and_feeds_on_nothing_else():
    programs = _programs(
        scheduler="reduce_on_plateau", plateau_factor=0.5, plateau_patience=2, min_lr_ratio=0.2
    )
    state, scales = programs.init(), []
    for loss in (3.0, 2.0, 2.0, 2.0, float("nan"), 2.5, 1.0, 1.0, 1.0, 1.0, 1.0):
        state = programs.observe(state, np.float32(loss))
        scales.append(float(state["plateau"].scale))
    # improvement, improvement, then two without: halved; two more (one of them nan): halved again
    np.testing.assert_allclose(scales, [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2])
    same = _programs(scheduler="cosine")
    state = same.init()
    for _ in range(5):
        state = same.observe(state, np.float32(3.0))
    assert float(state["plateau"].scale) == 1.0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)], ids=["float32", "float64"]
)
def test_a_mesh_of_eight_gives_the_loss_of_one_device(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        config = small_config(dtype=dtype)
        mesh = "data=2,fsdp=2,tensor=2"
        sharded = _programs(config, mesh)
        _, losses = _train(sharded, mesh, 20)
        single = _programs(config, "data=1")
        state, sums = single.init(), single.zero_sums()
        for step, loss in enumerate(losses):
            batch = jax.device_put(small_tokens(8, 25, seed=step), jax.devices()[0])
            sums = single.accumulate(state, sums, batch, np.int32(0))
            state, sums, metrics = single.update(state, sums)
            np.testing.assert_allclose(loss, float(metrics["train/loss"]), rtol=tolerance)


def test_parameters_and_moments_lie_where_the_axis_rules_say():
    mesh = "data=2,fsdp=2,tensor=2"
    programs = _programs(small_config(), mesh)
    expected = {
        "embed/tokens": ("tensor", "fsdp"),
        "blocks/attention/query": (None, "fsdp", "tensor", None),
        "blocks/attention/out": (None, "tensor", None, "fsdp"),
        "blocks/mlp/up": (None, "fsdp", "tensor"),
        "blocks/mlp/down_bias": (None, "fsdp"),
        "head/norm": ("fsdp",),
    }
    state = leaves_by_path(programs.init())
    for path, spec in expected.items():
        found = [leaf for name, leaf in state.items() if name.endswith(path)]
        assert len(found) == 3, path  # the parameter and both moments
        for leaf in found:
            assert tuple(leaf.sharding.spec) == spec, path
    # a width that the mesh does not divide is kept whole rather than refused
    odd = leaves_by_path(_programs(small_config(d_ff=49), mesh).init())
    assert tuple(odd["params/blocks/mlp/up"].sharding.spec) == (None, "fsdp", None)


def test_evaluation_does_not_change_the_state():
    programs, mesh = _programs(small_config(dropout=0.5)), make_mesh(parse_mesh("data=1"))
    state, batch = programs.init(), place_batch(mesh, small_tokens(8, 25))
    first = programs.evaluate(state, batch)
    again = programs.evaluate(state, batch)
    chex.assert_trees_all_equal(first, again)


def _flat(tree):
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(tree).items()}


def test_frozen_layers_cost_nothing_and_the_others_train_as_if_they_were_put_back():
    """Against a run that trains all, and whose layer is set back to what it was after each update."""
    with jax.enable_x64(True):
        plain: Any = {"weight_decay": 0.1, "grad_clip": 0.0, "beta2": 0.9}
        config, mesh = small_config(dtype="float64"), make_mesh(parse_mesh("data=1"))
        whole, part = _programs(config, **plain), _programs(config, frozen_layers=(1,), **plain)
        shape = dataclasses.replace(shape_of(config), frozen_layers=(1,))
        held = memory(shape, OptimizerSettings())
        sums = part.zero_sums()
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(sums.gradients)) == held.gradients
        moments = [leaf for leaf in jax.tree.leaves(part.abstract_state.opt_state) if leaf.ndim]
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in moments) == held.optimizer
        states, first = [whole.init(), part.init()], _flat(part.init().params)
        for seed in range(4):
            batch = [small_tokens(8, 25, seed=seed)]
            for which, programs in enumerate((whole, part)):
                states[which], _, _ = _step(
                    programs, mesh, states[which], programs.zero_sums(), batch
                )
            back = jax.tree.map(
                lambda leaf, old: leaf.at[1].set(old[1]),
                states[0].params["blocks"],
                part.init().params["blocks"],
            )
            params = {**states[0].params, "blocks": back}
            states[0] = dataclasses.replace(states[0], params=params)
        found, expected = (_flat(state.params) for state in reversed(states))
        for path, leaf in found.items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-9, atol=1e-12, err_msg=path)
            if path.startswith("blocks/"):
                np.testing.assert_array_equal(leaf[1], first[path][1], err_msg=path)
                assert (leaf[0] != first[path][0]).any() or "key_bias" in path, path


def test_clipping_is_by_the_norm_of_what_is_trained():
    config, mesh = small_config(), make_mesh(parse_mesh("data=1"))
    whole, part = _programs(config), _programs(config, frozen_layers=(0, 2))
    batch = place_batch(mesh, small_tokens(8, 25))
    sums = whole.accumulate(whole.init(), whole.zero_sums(), batch, np.int32(0))
    count = float(sums.measures["loss"].count)
    gradients = {path: leaf / count for path, leaf in _flat(sums.gradients).items()}
    trained = [g[1] if path.startswith("blocks/") else g for path, g in gradients.items()]
    expected = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in trained))
    sums = part.accumulate(part.init(), part.zero_sums(), batch, np.int32(0))
    _, _, metrics = part.update(part.init(), sums)
    np.testing.assert_allclose(float(metrics["train/grad_norm"]), expected, rtol=1e-5)


def test_a_morph_beside_frozen_layers_moves_what_the_optimizer_has():
    shapes = [
        dataclasses.replace(shape_of(small_config(d_ff=size)), frozen_layers=(1,))
        for size in (48, 72)
    ]
    before, after = (_programs(shape.model, frozen_layers=(1,)) for shape in shapes)
    state, _, _ = _step(
        before, make_mesh(parse_mesh("data=1")), before.init(), before.zero_sums(),
        [small_tokens(8, 25)],
    )  # fmt: skip
    transition = Transition(
        shapes[0].model, shapes[1].model, state, after.optimizer, jax.random.key(0),
        frozen_layers=((1,), (1,)),
    )  # fmt: skip
    new, _ = MORPHS["widen_mlp"](transition, recipe="even")
    chex.assert_trees_all_equal_shapes_and_dtypes(new, after.abstract_state)
    source, copies = np.arange(72) % 48, np.bincount(np.arange(72) % 48)
    old, moved = (_flat(each.opt_state) for each in (state, new))
    (up,) = [path for path in old if path.endswith("mu/blocks/mlp/up")]
    assert old[up].shape[0] == 2
    np.testing.assert_allclose(moved[up], old[up][..., source] / copies[source], rtol=1e-6)
