"""The GPT against a float64 reference, its initialisation, gates, cache and loss."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from small_models import VARIANTS, flat, reference_logits, shaken, small_config, small_tokens

from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_axis_sizes, gpt_signatures
from jaxmorph.model.signatures import check_coverage

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def _made(config, seed=0):
    return shaken(jax.device_get(gpt.init(config, jax.random.key(seed))), seed)


@functools.cache
def _forward(config):
    return jax.jit(functools.partial(gpt.forward, config))


def _logits(config, params, tokens, gates=None):
    gates = gpt.open_gates(config) if gates is None else gates
    return _forward(config)(params, jnp.asarray(tokens), gates=gates).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_reference(variant):
    with jax.enable_x64(True):
        config = small_config(dtype="float64", **VARIANTS[variant])
        params, tokens = _made(config), small_tokens(2, 17)
        found = np.asarray(_logits(config, params, tokens))
    np.testing.assert_allclose(found, reference_logits(config, params, tokens), atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.15)])
def test_logits_in_narrow_types_are_close_to_the_reference(dtype, tolerance):
    config = small_config(dtype=dtype)
    params, tokens = _made(config), small_tokens(2, 24)
    found = _logits(config, params, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference_logits(config, params, tokens), atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_bfloat16_are_close_to_those_in_float32(variant):
    """Products in 16 bits have a gradient written by hand."""
    tokens, found = jnp.asarray(small_tokens(4, 25)), {}
    for dtype in ("float32", "bfloat16"):
        config = small_config(dtype=dtype, **VARIANTS[variant])
        params, gates = _made(config), gpt.open_gates(config)

        def value(params, config=config, gates=gates):
            return gpt.measure(config, params, tokens, gates=gates)["loss"].value

        found[dtype] = flat(jax.jit(jax.grad(value))(params))
    for path, exact in found["float32"].items():
        error = np.linalg.norm(found["bfloat16"][path] - exact)
        assert error <= 0.03 * np.linalg.norm(exact) + 2e-4, path  # a key bias has none


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_every_parameter_is_the_slope_of_the_reference(variant):
    rng, tokens, step = np.random.default_rng(1), small_tokens(1, 9), 1e-5
    with jax.enable_x64(True):
        config = small_config(dtype="float64", n_layers=2, **VARIANTS[variant])
        params, gates = _made(config), gpt.open_gates(config)

        def value(params):
            return gpt.measure(config, params, jnp.asarray(tokens), gates=gates)["loss"].value

        gradients = flat(jax.jit(jax.grad(value))(params))

    def loss(leaves):
        logits = reference_logits(
            config, traverse_util.unflatten_dict(leaves, sep="/"), tokens[:, :-1]
        )
        largest = logits.max(-1, keepdims=True)
        log_sums = np.log(np.exp(logits - largest).sum(-1, keepdims=True)) + largest
        return np.take_along_axis(log_sums - logits, tokens[:, 1:, None], -1).mean()

    for path, leaf in flat(params).items():
        way = rng.standard_normal(leaf.shape)
        rise = [loss({**flat(params), path: leaf + sign * step * way}) for sign in (1, -1)]
        slope = (rise[0] - rise[1]) / (2 * step)
        np.testing.assert_allclose(
            np.vdot(gradients[path], way), slope, rtol=1e-6, atol=1e-8, err_msg=path
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_have_the_shapes_of_their_signatures(variant):
    config = small_config(**VARIANTS[variant])
    params = flat(gpt.init(config, jax.random.key(0)))
    signatures = gpt_signatures(config)
    check_coverage(signatures, {path: leaf.shape for path, leaf in params.items()})
    for path, leaf in params.items():
        chex.assert_shape(leaf, signatures[path].shape(gpt_axis_sizes(config)))


def test_initialisation_is_gpt2_s():
    config = small_config(d_model=128, d_ff=512, n_heads=4, head_dim=32, vocab_size=300)
    params = flat(gpt.init(config, jax.random.key(0)))
    residual = 0.02 / np.sqrt(2 * config.n_layers)
    for path, leaf in params.items():
        name = path.split("/")[-1]
        if name == "norm":
            assert (leaf == 1).all(), path
        elif name.endswith("bias"):
            assert (leaf == 0).all(), path
        else:
            expected = residual if name in ("out", "down") else 0.02
            assert abs(float(leaf.std()) / expected - 1) < 0.05, path
            assert abs(float(leaf.mean())) < 4 * expected / np.sqrt(leaf.size), path


def test_initialisation_of_a_leaf_does_not_depend_on_the_others():
    few = gpt.init(small_config(biases=False), jax.random.key(0))
    many = gpt.init(small_config(tied_head=False), jax.random.key(0))
    chex.assert_trees_all_equal(few["blocks"]["mlp"]["up"], many["blocks"]["mlp"]["up"])


@functools.cache
def _loss_and_gradient(config):
    """((loss, accuracy), gradient) on a few tokens, with dropout where the config has it."""
    params, tokens = _made(config), jnp.asarray(small_tokens(2, 25))
    gates, key = gpt.open_gates(config), jax.random.key(7)

    def value(params):
        found = gpt.measure(config, params, tokens, gates=gates, dropout_key=key)
        return found["loss"].value, found["accuracy"].value

    return jax.jit(jax.value_and_grad(value, has_aux=True))(params)


@pytest.mark.parametrize(
    "policy", [{"scan_layers": "scan"}, {"remat": True}, {"scan_layers": "scan", "remat": True}]
)
def test_policies_change_no_value_and_no_gradient(policy):
    with jax.enable_x64(True):
        plain = small_config(dtype="float64", dropout=0.1, scan_layers="unrolled")
        other = dataclasses.replace(plain, **policy)
        chex.assert_trees_all_close(
            _loss_and_gradient(other), _loss_and_gradient(plain), atol=1e-13, rtol=1e-11
        )


@pytest.mark.parametrize("chunk", [1, 7, 16, 48, 1000])
def test_loss_in_chunks_is_the_whole_loss(chunk):
    with jax.enable_x64(True):
        config = small_config(dtype="float64", scan_layers="scan")
        params, tokens = _made(config), small_tokens(2, 25)
        chunked = _loss_and_gradient(dataclasses.replace(config, loss_chunk=chunk))
        chex.assert_trees_all_close(chunked, _loss_and_gradient(config), atol=1e-13, rtol=1e-11)
        (found, accuracy), _ = chunked
        logits = reference_logits(config, params, tokens[:, :-1])
        nats = np.log(np.exp(logits).sum(-1))
        picked = np.take_along_axis(logits, tokens[:, 1:, None].astype(int), -1)[..., 0]
        np.testing.assert_allclose(found, (nats - picked).mean(), rtol=1e-12)
        np.testing.assert_allclose(
            accuracy, (logits.argmax(-1) == tokens[:, 1:]).mean(), rtol=1e-12
        )


def test_no_token_sees_a_later_one():
    config = small_config(positions="rotary")
    params, tokens = _made(config), small_tokens(1, 24)
    other = tokens.copy()
    other[0, 11:] = (other[0, 11:] + 1) % 50
    first, second = _logits(config, params, tokens), _logits(config, params, other)
    np.testing.assert_array_equal(first[:, :11], second[:, :11])
    assert (first[:, 11:] != second[:, 11:]).any(axis=-1).all()


def test_a_closed_head_gate_is_the_head_removed():
    config = small_config()
    params, tokens = _made(config), small_tokens(2, 24)
    gates = gpt.open_gates(config)
    closed = {**gates, "head": gates["head"].at[:, 2].set(0.0)}
    fewer = dataclasses.replace(config, n_heads=3)
    kept = [0, 1, 3]
    attention = {
        name: leaf[:, kept] if name == "out" else leaf[:, :, kept]
        for name, leaf in params["blocks"]["attention"].items()
        if name in ("query", "key", "value", "out")
    }
    attention = params["blocks"]["attention"] | attention
    for name in ("query_bias", "key_bias", "value_bias"):
        attention[name] = attention[name][:, kept]
    removed = {**params, "blocks": {**params["blocks"], "attention": attention}}
    found = _logits(config, params, tokens, closed)
    np.testing.assert_allclose(found, reference_logits(fewer, removed, tokens), atol=2e-5)


def test_a_closed_layer_gate_is_the_layer_removed():
    config = small_config()
    params, tokens = _made(config), small_tokens(2, 24)
    gates = gpt.open_gates(config)
    closed = {**gates, "layer": gates["layer"].at[1].set(0.0)}
    blocks = jax.tree.map(lambda leaf: leaf[[0, 2]], params["blocks"])
    fewer = dataclasses.replace(config, n_layers=2)
    found = _logits(config, params, tokens, closed)
    expected = reference_logits(fewer, {**params, "blocks": blocks}, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
@pytest.mark.parametrize("scan_layers", ["scan", "unrolled"])
def test_cached_logits_are_those_without_a_cache(variant, scan_layers):
    config = small_config(**VARIANTS[variant], scan_layers=scan_layers)
    params, tokens = _made(config), jnp.asarray(small_tokens(2, 24))
    gates = gpt.open_gates(config)
    cache = gpt.empty_cache(config, 2)
    extend = jax.jit(functools.partial(gpt.extend, config))
    pieces, position = [], 0
    for length in (9, 1, 1, 5, 8):
        piece = tokens[:, position : position + length]
        logits, cache = extend(params, cache, piece, jnp.int32(position), gates=gates)
        pieces.append(logits)
        position += length
    expected = reference_logits(config, params, np.asarray(tokens))
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, atol=2e-5)


def test_dropout_drops_at_its_rate_and_only_with_a_key():
    config = small_config(dropout=0.5)
    params, tokens = _made(config), jnp.asarray(small_tokens(2, 24))
    gates = gpt.open_gates(config)

    @jax.jit
    def run(key):
        return gpt.forward(config, params, tokens, gates=gates, dropout_key=key).logits

    expected = reference_logits(config, params, np.asarray(tokens))
    np.testing.assert_allclose(run(None), expected, atol=2e-5)
    one, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_gates_and_parameters_are_traced():
    config = small_config()
    params, tokens = _made(config), jnp.asarray(small_tokens(2, 24))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, gates):
        return gpt.forward(config, params, tokens, gates=gates)

    gates = gpt.open_gates(config)
    run(params, gates)
    run(_made(config, seed=1), {**gates, "head": gates["head"] / 2})
