"""Every optimizer against formulas in float64 NumPy; what is decayed, clipped and skipped."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from small_models import VARIANTS, flat, shaken, small_config

from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.model.trainable import Trainable
from jaxmorph.model.tree_paths import parameter_path
from jaxmorph.step.optimizer import global_norm, group_labels, make_optimizer

OPTIMIZERS = ("adamw", "muon", "lion", "sgd", "adafactor")


def _settings(**changes) -> OptimizerSettings:
    return dataclasses.replace(OptimizerSettings(grad_clip=0.0, weight_decay=0.1), **changes)


def _setting_up(config=None):
    config = config or small_config(dtype="float64", tied_head=False)
    params = shaken(jax.device_get(gpt.init(config, jax.random.key(0))))
    return gpt_signatures(config), params


def _run(settings, signatures, params, gradients, rates):
    optimizer = make_optimizer(settings, Trainable(signatures))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient, rate in zip(gradients, rates, strict=True):
        updates, state = update(gradient, state, params, learning_rate=jnp.asarray(rate))
        params = optax.apply_updates(params, updates)
    return flat(params)


def _gradients(params, count=3):
    return [shaken(jax.tree.map(np.zeros_like, params), seed=seed) for seed in range(count)]


def _adamw(p, gradients, rates, decay):
    m = v = 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        p = p - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decay * p)
    return p


def _lion(p, gradients, rates, decay):
    m = 0.0
    for g, rate in zip(gradients, rates, strict=True):
        p = p - rate * (np.sign(0.9 * m + 0.1 * g) + decay * p)
        m = 0.95 * m + 0.05 * g
    return p


def _sgd(p, gradients, rates, decay):
    m = 0.0
    for g, rate in zip(gradients, rates, strict=True):
        m = 0.9 * m + g
        p = p - rate * (m + decay * p)
    return p


@pytest.mark.parametrize(("name", "formula"), [("adamw", _adamw), ("lion", _lion), ("sgd", _sgd)])
def test_updates_follow_the_formula_and_decay_only_matrices(name, formula):
    with jax.enable_x64(True):
        signatures, params = _setting_up()
        gradients, rates = _gradients(params), (1e-2, 3e-2, 2e-2)
        found = _run(_settings(optimizer=name), signatures, params, gradients, rates)
        leaves = [flat(g) for g in gradients]
        for path, p in flat(params).items():
            last = path.split("/")[-1]
            decay = 0.0 if last == "norm" or last.endswith("bias") else 0.1
            expected = formula(p, [g[path] for g in leaves], rates, decay)
            np.testing.assert_allclose(found[path], expected, rtol=1e-11, atol=1e-13, err_msg=path)


def test_muon_orthogonalises_hidden_matrices_layer_by_layer_and_leaves_the_rest_to_adamw():
    with jax.enable_x64(True):
        signatures, params = _setting_up()
        gradients, rate = _gradients(params, 1), 1e-2
        found = _run(
            _settings(optimizer="muon", weight_decay=0.0), signatures, params, gradients, [rate]
        )
        before = flat(params)
        gradient = flat(gradients[0])
        for path, signature in signatures.items():
            change = (before[path] - found[path]) / rate
            if not path.startswith("blocks/") or not signature.is_matrix:
                expected = _adamw(before[path], [gradient[path]], [rate], 0.0)
                np.testing.assert_allclose(found[path], expected, rtol=1e-9, err_msg=path)
                continue
            for layer, g in zip(change, gradient[path], strict=True):
                inputs = int(np.prod(g.shape[: len(signature.consumed)]))
                expected = _muon_direction(g.reshape(inputs, -1))
                np.testing.assert_allclose(
                    layer.reshape(inputs, -1), expected, atol=1e-6, err_msg=path
                )


def _muon_direction(matrix):
    """Five Newton-Schulz steps act on singular values alone; then RMS-matched to Adam's update."""
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    singular = singular / np.linalg.norm(singular)
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return 0.2 * np.sqrt(max(matrix.shape)) * (left * singular) @ right


def test_adafactor_is_optax_s():
    signatures, params = _setting_up(small_config(d_model=128, d_ff=160, head_dim=32))
    gradients, rates = _gradients(params), [1e-2] * 3
    settings = _settings(optimizer="adafactor", weight_decay=0.0)
    found = _run(settings, signatures, params, gradients, rates)
    theirs = optax.adafactor(1e-2, multiply_by_parameter_scale=False, clipping_threshold=1.0)
    state = theirs.init(params)
    for gradient in gradients:
        updates, state = jax.jit(theirs.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(found, flat(params), rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    with jax.enable_x64(True):
        signatures, params = _setting_up()
        gradients = _gradients(params, 1)
        settings = _settings(optimizer="sgd", beta1=0.0, weight_decay=0.0, grad_clip=0.5)
        found = _run(settings, signatures, params, gradients, [1.0])
        before = flat(params)
        whole = np.sqrt(sum(((before[path] - found[path]) ** 2).sum() for path in found))
        np.testing.assert_allclose(whole, 0.5, rtol=1e-9)
        raw = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradients[0])))
        np.testing.assert_allclose(global_norm(gradients[0]), raw, rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_follow_from_signatures(variant):
    signatures = gpt_signatures(small_config(**VARIANTS[variant]))
    groups = traverse_util.flatten_dict(group_labels(signatures), sep="/")
    for path, group in groups.items():
        last = path.split("/")[-1]
        if last == "norm" or last.endswith("bias"):
            assert group == "vector", path
        elif path in ("embed/tokens", "embed/positions", "head/output"):
            assert group == "index", path
        else:
            assert group == "hidden", path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_state_leaf_is_a_count_or_mirrors_a_parameter(name):
    config = small_config()
    signatures, params = _setting_up(config)
    optimizer = make_optimizer(_settings(optimizer=name, grad_clip=1.0), Trainable(signatures))
    shapes = {path: s.shape for path, s in flat(params).items()}
    state = optimizer.init(params)
    mirrored = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        parameter = parameter_path(path)
        if parameter == "":
            assert leaf.size <= 15, path  # counts, and muon's Newton-Schulz coefficients
        else:
            mirrored.add(parameter)
            if name != "adafactor":  # whose second moments are factored
                assert leaf.shape == shapes[parameter], path
    assert mirrored == set(shapes)


def test_learning_rate_is_traced():
    signatures, params = _setting_up(small_config())
    optimizer = make_optimizer(_settings(), Trainable(signatures))
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    state = optimizer.init(params)
    gradient = _gradients(params, 1)[0]
    for rate in (1e-3, 2e-3):
        _, state = update(gradient, state, params, learning_rate=jnp.float32(rate))


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _settings().beta1 = 0.5  # pyright: ignore[reportAttributeAccessIssue]
