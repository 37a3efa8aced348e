"""Causal attention against a naive reference, in values, gradients and every transformation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.model.attention import causal_attention

TIMES = (1, 64, 65, 150, 600)
IMPLEMENTATIONS = ("auto", "xla", "blocked")


def inputs(time, dtype: type[np.floating] = np.float64, batch=2, heads=3, head_dim=8, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, time, heads, head_dim)).astype(dtype) for _ in range(4)]


def reference(q, k, v, g):
    """Return the output and the gradients of sum(output · g), query by query."""
    out, dq, dk, dv = (np.zeros(q.shape) for _ in range(4))
    scale = 1 / np.sqrt(q.shape[-1])
    for b, t, h in np.ndindex(q.shape[:3]):
        keys, values = k[b, : t + 1, h], v[b, : t + 1, h]
        scores = keys @ q[b, t, h] * scale
        p = np.exp(scores - scores.max())
        p /= p.sum()
        out[b, t, h] = p @ values
        dv[b, : t + 1, h] += np.outer(p, g[b, t, h])
        dp = values @ g[b, t, h]
        ds = p * (dp - p @ dp) * scale
        dq[b, t, h] = ds @ keys
        dk[b, : t + 1, h] += np.outer(ds, q[b, t, h])
    return out, (dq, dk, dv)


@functools.partial(jax.jit, static_argnums=0)
def attend(implementation, q, k, v):
    return causal_attention(q, k, v, implementation=implementation)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(implementation, q, k, v, g):
    out, pullback = jax.vjp(
        lambda *qkv: causal_attention(*qkv, implementation=implementation), q, k, v
    )
    return out, pullback(g)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("time", TIMES)
def test_float64_matches_reference_to_1e12(implementation, time):
    arrays = inputs(time, batch=1, heads=2)
    with jax.enable_x64():
        device = [jnp.asarray(x) for x in arrays]
        got = value_and_gradients(implementation, *device)
        chex.assert_trees_all_close(got, reference(*arrays), rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-5), ("bfloat16", 0.12)])
def test_narrow_dtypes_stay_narrow_and_close(implementation, dtype, atol):
    arrays = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in inputs(150)]
    device = [jnp.asarray(x, dtype) for x in arrays]
    out, gradients = value_and_gradients(implementation, *device)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(dtype)}
    narrow = jax.tree.map(lambda x: np.asarray(x, np.float64), (out, gradients))
    chex.assert_trees_all_close(narrow, reference(*arrays), rtol=0.02, atol=atol)


def test_bfloat16_softmax_is_taken_in_float32():
    # Equal scores over 300 keys: weights summed in bfloat16 would stop growing at 256.
    q, _, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs(300))
    ones = jnp.ones_like(v)
    for implementation in IMPLEMENTATIONS:
        out = attend(implementation, q, jnp.zeros_like(q), ones)
        np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=2e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_token_sees_the_future(implementation):
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in inputs(150))
    before = attend(implementation, q, k, v)
    changed = [x.at[:, 70:].add(1.0) for x in (q, k, v)]
    after = attend(implementation, *changed)
    np.testing.assert_array_equal(before[:, :70], after[:, :70])
    assert not np.allclose(before[:, 70:], after[:, 70:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_stay_finite(implementation):
    q, k, v, g = (jnp.asarray(x, jnp.float32) for x in inputs(70))
    results = value_and_gradients(implementation, q * 1e4, k * 1e4, v, g)
    chex.assert_tree_all_finite(results)


def test_vmap_equals_a_loop():
    q, k, v, g = (jnp.asarray(x, jnp.float32).reshape(2, 1, 70, 3, 8) for x in inputs(70))
    together = jax.vmap(lambda *x: value_and_gradients("blocked", *x))(q, k, v, g)
    for i in range(2):
        alone = value_and_gradients("blocked", q[i], k[i], v[i], g[i])
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_drops_the_rate_and_keeps_the_mean(implementation):
    q, k, _, _ = (jnp.asarray(x, jnp.float32) for x in inputs(70, batch=64, head_dim=2))
    ones = jnp.ones_like(q)  # outputs are then the sums of the kept weights: 1 on average

    @functools.partial(jax.jit, static_argnums=0)
    def attend_some(rate, key, *qkv):
        return causal_attention(
            *qkv, implementation=implementation, dropout_rate=rate, dropout_key=key
        )

    def run(rate, key):
        return attend_some(rate, key, q, k, ones)  # as constants they would be folded, for seconds

    first, again = run(0.25, jax.random.key(0)), run(0.25, jax.random.key(0))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, run(0.25, jax.random.key(1)))
    assert abs(first.mean() - 1.0) < 5e-3
    # The first query has one weight: dropped, or scaled by 1 / (1 - rate).
    alone = np.asarray(first[:, 0, :, 0])
    assert set(np.round(np.unique(alone), 4)) == {0.0, np.float32(1.3333)}
    assert 0.1 < (alone == 0).mean() < 0.4
    plain = attend(implementation, q, k, ones)
    np.testing.assert_allclose(run(0.25, None), plain, atol=1e-5)
    np.testing.assert_allclose(run(0.0, jax.random.key(0)), plain, atol=1e-5)


def test_dropout_gradient_is_that_of_the_same_mask():
    q, k, v, g = (jnp.asarray(x) for x in inputs(70, np.float32, batch=1, heads=1))

    @jax.jit
    def value(v):
        return (
            causal_attention(
                q, k, v, implementation="blocked", dropout_rate=0.5, dropout_key=jax.random.key(3)
            )
            * g
        ).sum()

    # Linear in v, so the gradient's inner product with v is the value itself.
    np.testing.assert_allclose((jax.grad(value)(v) * v).sum(), value(v), rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "rate", "named"),
    [("bfloat16", 0.0, "backend cpu"), ("float32", 0.0, "float32"), ("bfloat16", 0.1, "dropout")],
)
def test_cudnn_where_it_cannot_run_is_refused(dtype, rate, named):
    q, k, v, _ = (jnp.asarray(x, dtype) for x in inputs(4))
    with pytest.raises(InputError, match=named):
        causal_attention(
            q,
            k,
            v,
            implementation="cudnn",
            dropout_rate=rate,
            dropout_key=jax.random.key(0),
        )


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "rate", "expected"),
    [
        ("cpu", "float32", 8, 0.0, "blocked"),
        ("tpu", "bfloat16", 8, 0.0, "xla"),
        ("gpu", "bfloat16", 64, 0.0, "cudnn"),
        ("gpu", "float16", 128, 0.0, "cudnn"),
        ("gpu", "float32", 64, 0.0, "xla"),
        ("gpu", "bfloat16", 64, 0.1, "xla"),
        ("gpu", "bfloat16", 20, 0.0, "xla"),
        ("gpu", "bfloat16", 256, 0.0, "xla"),
    ],
)
def test_auto_picks_by_backend(monkeypatch, backend, dtype, head_dim, rate, expected):
    from jaxmorph.model import attention

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    query = jnp.zeros((1, 2, 1, head_dim), dtype)
    assert attention._resolve("auto", query, rate) == expected


def test_blocked_does_less_work_than_xla():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in inputs(1024, batch=1))

    def flops(implementation):
        run = jax.jit(lambda *x: causal_attention(*x, implementation=implementation))
        cost = run.lower(q, k, v).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert flops("blocked") < 0.65 * flops("xla")
