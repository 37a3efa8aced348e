"""What is measured of each head: against NumPy, finite differences and heads that are deleted."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    reference_logits,
    resolved,
    shaken,
    shape_of,
    small_config,
    small_tokens,
)

from jaxmorph.config.mesh import parse_mesh
from jaxmorph.model import gpt
from jaxmorph.model.attention import attention_entropy
from jaxmorph.step.head_measures import measure_heads
from jaxmorph.step.parts import Parts
from jaxmorph.step.programs import make_programs
from jaxmorph.step.sharding import make_mesh, mesh_shape
from jaxmorph.step.state import Start
from jaxmorph.step.task import LANGUAGE_MODELLING
from jaxmorph.training.head_meter import HeadMeter, head_batch_rows, head_batches

SHAPE = {"n_layers": 2, "seq_len": 8}
LLAMA = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "biases": False}
CLOSED = (1, 2)
# Every way that a forward pass can run, and every kind of parameter that a head can have.
VARIANTS = {
    "gpt2 blocked": {"attention": "blocked"},
    "rotary xla scanned": {**LLAMA, "attention": "xla", "scan_layers": "scan", "remat": True},
    "adapters": {"attn_lora_rank": 2, "loss_chunk": 4},
}
MESHES = ("data=1", "data=2,tensor=2")
HEAD_AXIS = {"query": 2, "key": 2, "value": 2, "out": 1, "query_bias": 1, "key_bias": 1}
HEAD_AXIS |= {"value_bias": 1, "out_lora_a": 1}
HEAD_AXIS |= {f"{name}_lora_b": 2 for name in ("query", "key", "value")}


@cache
def _model(name):
    """Architecture, parameters, tokens and gates, one of them closed, in float64."""
    config = small_config(**SHAPE, **VARIANTS[name], dtype="float64")
    params = shaken(gpt.init(config, jax.random.key(0)))
    gates = gpt.open_gates(config)
    return (
        config,
        params,
        jnp.asarray(small_tokens(3, 9)),
        gates | {"head": gates["head"].at[CLOSED].set(0)},
    )


@cache
def _program(name):
    config, _, tokens, gates = _model(name)

    def measured(params, gates_LH):
        how = {"gates": gates | {"head": gates_LH}, "task": LANGUAGE_MODELLING}
        return measure_heads(config, params, tokens, **how)

    return jax.jit(measured)


def _measured(name, layer=None):
    """What is measured of a model, a layer of it closed if asked to."""
    _, params, _, gates = _model(name)
    gates_LH = gates["head"] if layer is None else gates["head"].at[layer].set(0)
    return jax.device_get(_program(name)(params, gates_LH))


def _nats(logits, targets):
    """The mean loss of logits [B, T, V]."""
    logits = logits - logits.max(-1, keepdims=True)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (np.log(np.exp(logits).sum(-1)) - picked).mean()


def _reference_loss(config, params, tokens, gates: Any = 1.0, without=()):
    """The loss with each head's output projection times its gate [layer, head]."""
    attention = params["blocks"]["attention"]
    out = attention["out"] * np.broadcast_to(gates, attention["out"].shape[:2])[..., None, None]
    params = {**params, "blocks": {**params["blocks"], "attention": {**attention, "out": out}}}
    return _nats(reference_logits(config, params, tokens[:, :-1], without), tokens[:, 1:])


@pytest.mark.parametrize("time", [2, 150])  # 150 is three blocks of queries
def test_entropy_is_that_of_the_softmax_of_the_scores(time):
    q, k = 3 * np.random.default_rng(time).standard_normal((2, 2, time, 3, 8))
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(8)
    weights = np.where(np.tri(time, dtype=bool), np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)[..., 1:]
    expected = (entropy / np.log(np.arange(2, time + 1))).mean(axis=(0, 2))
    with jax.enable_x64(True):
        wide = attention_entropy(jnp.asarray(q), jnp.asarray(k))
        np.testing.assert_allclose(wide, expected, rtol=1e-12)
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2e-2)):
        found = attention_entropy(*(jnp.asarray(x, dtype) for x in (q, k)))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_entropy_of_equal_weights_is_one_and_of_a_single_weight_zero():
    query = jnp.zeros((1, 70, 1, 4)).at[..., 0].set(1e3)
    key = (-query).at[:, 0].set(query[:, 0])
    np.testing.assert_allclose(attention_entropy(0 * query, key), 1, rtol=1e-6)
    assert attention_entropy(query, key) == 0  # all tokens see the first one alone
    assert attention_entropy(query[:, :1], key[:, :1]) == 0


@pytest.mark.parametrize("name", ["gpt2 blocked", "rotary xla scanned"])
def test_entropy_importance_and_gate_gradient_are_those_of_numpy(name):
    with jax.enable_x64(True):
        found, (config, params, tokens, gates) = _measured(name), jax.device_get(_model(name))
    entropies: list = []
    closed = [CLOSED]
    reference_logits(config, params, tokens[:, :-1], closed, entropies)
    step = 1e-5
    for place in np.ndindex(2, 4):
        here = [entropy for *head, entropy in entropies if tuple(head) == place]
        if place != CLOSED:
            np.testing.assert_allclose(found["entropy"][place], np.mean(here), rtol=1e-12)
        # The derivative by a factor of the head's output, at 1, is the sum of output times ∂L/∂output.
        change = np.zeros((2, 4))
        change[place] = step
        low, high = (
            _reference_loss(config, params, tokens, gates["head"] + sign * change)
            for sign in (-1, 1)
        )
        slope = (high - low) / (2 * step)
        np.testing.assert_allclose(found["gate_gradient"][place], slope, rtol=1e-6, atol=1e-10)
        importance = 0 if place == CLOSED else abs(slope)
        np.testing.assert_allclose(found["importance"][place], importance, rtol=1e-6, atol=1e-10)
    assert found["importance"][CLOSED] == 0 != found["gate_gradient"][CLOSED]


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_norm_is_that_of_all_of_the_heads_parameters(name):
    with jax.enable_x64(True):
        config, params, tokens, gates = _model(name)
        found = _measured(name)["grad_norm"]

        def loss(params):
            return gpt.measure(config, params, tokens, gates=gates)["loss"].value

        gradients = jax.device_get(jax.jit(jax.grad(loss))(params))["blocks"]["attention"]
    squares = np.zeros((2, 4))
    for leaf, axis in HEAD_AXIS.items():
        if leaf in gradients:
            moved = np.moveaxis(gradients[leaf], axis, 1).reshape(2, 4, -1)
            squares += (moved**2).sum(-1)
    norms = np.sqrt(squares)
    medians = [np.median(norms[0]), np.median(norms[1, [0, 1, 3]])]  # of the open ones
    np.testing.assert_allclose(found, norms / np.reshape(medians, (2, 1)), rtol=1e-9)
    assert found[CLOSED] == 0


def test_a_layer_whose_heads_are_all_closed_has_measures():
    with jax.enable_x64(True):
        found = _measured("gpt2 blocked", layer=0)
    assert all(np.isfinite(values).all() for values in found.values())
    assert not found["grad_norm"][0].any()
    assert not found["importance"][0].any()
    assert found["gate_gradient"][0].all()


@cache
def _meter(mesh_text):
    """The meter of a float64 model on four batches, a state of it, and its programs."""
    config = small_config(**SHAPE, dtype="float64")
    shape = dataclasses.replace(shape_of(config), batch_size=17)
    mesh = make_mesh(parse_mesh(mesh_text))
    programs = make_programs(Start(resolved(), shape, 40), mesh, Parts())
    rows = head_batch_rows(shape, mesh_shape(mesh))
    tokens = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint8)
    batches = head_batches(LANGUAGE_MODELLING, tokens, seq_len=8, seed=0, rows=rows, count=4)
    state = programs.init()
    shaken_ = jax.device_put(shaken(state.params), programs.state_shardings.params)
    state = dataclasses.replace(state, params=shaken_)
    meter = HeadMeter(mesh, LANGUAGE_MODELLING, lambda: programs, lambda: batches)
    return meter, state, programs, batches, config


def _closing(state, *heads):
    gates = np.array(state["head_gate"])
    for head in heads:
        gates[head] = 0
    return state.with_variables(head_gate=jax.device_put(gates, state["head_gate"].sharding))


@pytest.mark.parametrize("mesh", MESHES)
def test_ablation_is_the_loss_of_the_model_with_the_head_deleted(mesh):
    with jax.enable_x64(True):
        meter, state, _, batches, config = _meter(mesh)
        assert [batch.shape for batch in batches] == [(2, 9)] * 4  # an eighth of 17
        state = _closing(state, CLOSED)
        heads = [(0, 0), (0, 3), (1, 0), CLOSED]
        found = meter.ablation(state, heads)
        params, tokens = jax.device_get(state.params), np.concatenate(batches)
        before = _reference_loss(config, params, tokens, without=[CLOSED])
    for place in np.ndindex(2, 4):
        if place in heads and place != CLOSED:
            after = _reference_loss(config, params, tokens, without=[CLOSED, place])
            np.testing.assert_allclose(found[place], after - before, atol=1e-12)
        else:
            assert np.isnan(found[place])


def test_measures_are_means_over_batches_and_the_same_each_time():
    with jax.enable_x64(True):
        meter, state, programs, batches, config = _meter("data=1")
        first, again = (meter.measures(state) for _ in range(2))
        meter.measures(_closing(state, CLOSED))
        assert programs.measure_heads._cache_size() == 1  # pyright: ignore
        params = jax.device_get(state.params)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    for place in ((0, 1), (1, 3)):
        change = np.zeros((2, 4))
        change[place] = 1e-5
        low, high = (
            np.array([_reference_loss(config, params, b, 1 + sign * change) for b in batches])
            for sign in (-1, 1)
        )
        slopes = (high - low) / 2e-5
        np.testing.assert_allclose(first["gate_gradient"][place], slopes.mean(), rtol=1e-5)
        np.testing.assert_allclose(first["importance"][place], abs(slopes).mean(), rtol=1e-5)
    assert (first["importance"] > abs(first["gate_gradient"]) + 1e-6).any()


def test_several_devices_measure_what_one_does():
    with jax.enable_x64(True):
        found = [meter.measures(state) for meter, state, *_ in map(_meter, MESHES)]
    for name, values in found[0].items():
        np.testing.assert_allclose(values, found[1][name], rtol=1e-9)


def test_the_batches_are_the_seeds_and_no_part_of_the_runs_stream():
    same = {"seq_len": 8, "rows": 2, "count": 3}
    tokens = np.arange(1000)
    task = LANGUAGE_MODELLING
    batches = [head_batches(task, tokens, seed=seed, **same) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(batches[0], batches[1])
    assert (np.asarray(batches[0]) != batches[2]).any()
    first = next(task.stream(tokens, seq_len=8, seed=5).batches(0, 6))
    assert (np.concatenate(batches[0]) != first).any()
