"""Causal self-attention: cuDNN on GPU, plain XLA, and a blocked version that is fastest on CPU.

Axis letters as in `gpt`, plus S for the time of keys and values. Exact softmax attention after
Vaswani et al. 2017 (arXiv 1706.03762). As in Dao et al. 2022 (arXiv 2205.14135) the blocked version
normalises the mixed values, not the weights, and computes the softmax's gradient from the output.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.model.precision import wide_dtype

Implementation = Literal["auto", "xla", "blocked", "cudnn"]

_MIN_BLOCK = 64  # queries; smaller products are not fast
_MAX_BLOCKS = 8  # blocks are unrolled: more would cost compile time and save little work
_Residuals = tuple[jax.Array, jax.Array, jax.Array, list[jax.Array], jax.Array, jax.Array]


def causal_attention(
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHK: jax.Array,
    *,
    implementation: Implementation = "auto",
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(q·kᵀ/√K + causal mask)·v as [B, T, H, K] in the dtype of the inputs.

    The softmax is computed in float32, or in float64 for float64 inputs. The blocked implementation
    does not support forward-mode differentiation.

    Args:
      query_BTHK: queries.
      key_BTHK: keys, of the same shape and dtype.
      value_BTHK: values, of the same shape and dtype.
      implementation: "cudnn" (GPU, 16-bit dtypes, no dropout), "blocked" (blocks of queries, each
        against only the keys it can see), "xla" (all scores, then a mask), or "auto": cudnn if it
        can run, blocked on CPU, else xla.
      dropout_rate: probability of dropping an attention weight; the others are scaled up.
      dropout_key: PRNG key; None: no dropout.

    Raises:
      InputError: "cudnn" was requested but cannot run.
    """
    rate = 0.0 if dropout_key is None else dropout_rate
    chosen, time = _resolve(implementation, query_BTHK, rate), query_BTHK.shape[1]
    # jax.nn.dot_product_attention has no dropout, and computes a float64 softmax in float32.
    if rate > 0.0 or (chosen == "xla" and query_BTHK.dtype == jnp.float64):
        block = _block_size(time) if chosen == "blocked" else time
        return _by_autodiff(query_BTHK, key_BTHK, value_BTHK, block, rate, dropout_key)
    if chosen == "blocked":
        return _blocked(query_BTHK, key_BTHK, value_BTHK)
    return jax.nn.dot_product_attention(
        query_BTHK, key_BTHK, value_BTHK, is_causal=True, implementation=chosen
    )


def attention_entropy(query_BTHK: jax.Array, key_BTHK: jax.Array) -> jax.Array:
    """Return each head's mean entropy of its attention, as a fraction of the largest possible, [H].

    The largest entropy of a token is the log of how many it sees. The mean is over all tokens but the
    first, which sees only itself; of one token alone it is 0. Computed in float32, or in float64 for
    float64 inputs, as log Σ exp s - Σ p·s with scores s and weights p, by blocks of queries.

    Args:
      query_BTHK: queries.
      key_BTHK: keys, of the same shape and dtype.
    """
    q_BHTK, k_BHSK = _heads_first(_scaled(query_BTHK), key_BTHK)
    time, dtype, fractions = q_BHTK.shape[2], wide_dtype(q_BHTK.dtype), []
    if time == 1:
        return jnp.zeros(q_BHTK.shape[1], dtype)
    for start, stop in _blocks(time, _block_size(time)):
        scores_BHTS = _scores(q_BHTK, k_BHSK, start, stop)
        scores_BHTS = scores_BHTS - scores_BHTS.max(axis=-1, keepdims=True)
        weights_BHTS = jnp.exp(scores_BHTS)
        total_BHT = weights_BHTS.sum(axis=-1)
        seen_BHTS = jnp.where(weights_BHTS > 0, scores_BHTS, 0)  # 0·-inf is no number
        mean_BHT = (weights_BHTS * seen_BHTS).sum(axis=-1) / total_BHT
        largest_T = np.log(np.maximum(np.arange(start, stop) + 1, 2)).astype(dtype)
        fractions.append((jnp.log(total_BHT) - mean_BHT) / largest_T[None, None])
    return jnp.concatenate(fractions, axis=2)[:, :, 1:].mean(axis=(0, 2))


def _resolve(
    implementation: Implementation, query_BTHK: jax.Array, rate: float
) -> Literal["xla", "blocked", "cudnn"]:
    """Return the implementation: "auto" depends on the backend; "cudnn" is refused if it cannot run."""
    if implementation in ("xla", "blocked"):
        return implementation
    backend, dtype, head_dim = jax.default_backend(), query_BTHK.dtype, query_BTHK.shape[-1]
    # Hopper and newer allow head_dim up to 256; 128 runs on every GPU with flash attention.
    limit = 256 if implementation == "cudnn" else 128
    obstacles = [
        said
        for obstructed, said in (
            (backend != "gpu", f"backend {backend}"),
            (dtype not in (jnp.bfloat16, jnp.float16), f"dtype {dtype}"),
            (head_dim % 8 != 0 or head_dim > limit, f"head_dim {head_dim}"),
            (rate > 0.0, f"dropout {rate}"),
        )
        if obstructed
    ]
    if not obstacles:
        return "cudnn"
    if implementation == "cudnn":
        raise InputError(
            "--attention",
            "",
            f"cudnn with {', '.join(obstacles)}",
            "a GPU, dtype bfloat16 or float16, a head_dim that is a multiple of 8 and at most 256,"
            " and dropout 0; --attention auto picks one that can run",
        )
    return "blocked" if backend == "cpu" else "xla"


def _block_size(time: int) -> int:
    """Return the queries per block: the fastest size on CPU of those tried at T 64, 256, 1024."""
    return max(_MIN_BLOCK, -(-time // _MAX_BLOCKS))


def _blocks(time: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, time)) for start in range(0, time, size)]


def _heads_first(*arrays_BTHK: jax.Array) -> tuple[jax.Array, ...]:
    """Return [B, H, T, K], so that the products below need no transposed copies of the weights."""
    return tuple(jnp.swapaxes(x, 1, 2) for x in arrays_BTHK)


def _scaled(query_BTHK: jax.Array) -> jax.Array:
    """Return queries divided by √K: cheaper than scaling the scores, which are larger."""
    return query_BTHK * np.asarray(query_BTHK.shape[-1] ** -0.5, query_BTHK.dtype)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return an einsum of two arrays, accumulated and returned in float32 or wider."""
    wide = wide_dtype(a.dtype)
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)


def _scores(q_BHTK: jax.Array, k_BHSK: jax.Array, start: int, stop: int) -> jax.Array:
    """Return scores of (scaled) queries start:stop against keys :stop, -inf for later keys."""
    scores_BHTS = _product("BHTK,BHSK->BHTS", q_BHTK[:, :, start:stop], k_BHSK[:, :, :stop])
    seen_TS = np.arange(start, stop)[:, None] >= np.arange(stop)[None, :]
    return jnp.where(seen_TS[None, None], scores_BHTS, -jnp.inf)


def _mix(weights_BHTS: jax.Array, v_BHSK: jax.Array, stop: int) -> jax.Array:
    """Return the weighted sums of the values :stop, in float32 or wider."""
    weights_BHTS = weights_BHTS.astype(v_BHSK.dtype)
    return _product("BHTS,BHSK->BHTK", weights_BHTS, v_BHSK[:, :, :stop])


def _by_autodiff(
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHK: jax.Array,
    block: int,
    rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """Return attention by blocks of queries, with dropout if there is a key."""
    q_BHTK, k_BHSK, v_BHSK = _heads_first(_scaled(query_BTHK), key_BTHK, value_BTHK)
    mixed = []
    for start, stop in _blocks(q_BHTK.shape[2], block):
        weights_BHTS = jax.nn.softmax(_scores(q_BHTK, k_BHSK, start, stop), axis=-1)
        if dropout_key is not None and rate > 0.0:
            key = jax.random.fold_in(dropout_key, start)
            kept_BHTS = jax.random.bernoulli(key, 1.0 - rate, weights_BHTS.shape)
            scaled_BHTS = weights_BHTS * np.asarray(1.0 / (1.0 - rate), weights_BHTS.dtype)
            weights_BHTS = jnp.where(kept_BHTS, scaled_BHTS, np.zeros((), weights_BHTS.dtype))
        mixed.append(_mix(weights_BHTS, v_BHSK, stop).astype(v_BHSK.dtype))
    return jnp.swapaxes(jnp.concatenate(mixed, axis=2), 1, 2)


@jax.custom_vjp
def _blocked(query_BTHK: jax.Array, key_BTHK: jax.Array, value_BTHK: jax.Array) -> jax.Array:
    return _blocked_forward(query_BTHK, key_BTHK, value_BTHK)[0]


def _blocked_forward(
    query_BTHK: jax.Array, key_BTHK: jax.Array, value_BTHK: jax.Array
) -> tuple[jax.Array, _Residuals]:
    """Return the output and the residuals for the backward pass.

    The residuals are, per block, the exponentials of its scores minus the row maximum, in the inputs'
    dtype; per row, the reciprocal of their sum and the output.
    """
    q_BHTK, k_BHSK, v_BHSK = _heads_first(_scaled(query_BTHK), key_BTHK, value_BTHK)
    time = q_BHTK.shape[2]
    kept, shares, mixed = [], [], []
    for start, stop in _blocks(time, _block_size(time)):
        scores_BHTS = _scores(q_BHTK, k_BHSK, start, stop)
        weights_BHTS = jnp.exp(scores_BHTS - scores_BHTS.max(axis=-1, keepdims=True))
        shares.append(1 / weights_BHTS.sum(axis=-1, keepdims=True))
        kept.append(weights_BHTS.astype(v_BHSK.dtype))
        mixed.append(_mix(kept[-1], v_BHSK, stop) * shares[-1])
    out_BHTK, share_BHT1 = jnp.concatenate(mixed, axis=2), jnp.concatenate(shares, axis=2)
    out_BTHK = jnp.swapaxes(out_BHTK.astype(v_BHSK.dtype), 1, 2)
    return out_BTHK, (q_BHTK, k_BHSK, v_BHSK, kept, share_BHT1, out_BHTK)


def _blocked_backward(
    residuals: _Residuals, gradient_BTHK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries, keys and values.

    Written by hand because XLA's gradient of the slices is a padded sum per block, which takes a third
    more memory and is 10-25 % slower on CPU. Products that sum over queries return [B, H, K, S], which
    XLA's CPU backend computes up to twice as fast as [B, H, S, K].
    """
    q_BHTK, k_BHSK, v_BHSK, kept, share_BHT1, out_BHTK = residuals
    dtype, dq, dk, dv = q_BHTK.dtype, [], [], []
    (g_BHTK,) = _heads_first(gradient_BTHK)
    wide_BHTK = g_BHTK.astype(share_BHT1.dtype) * share_BHT1
    mean_BHT1 = (wide_BHTK * out_BHTK).sum(axis=-1, keepdims=True)
    g_BHTK = wide_BHTK.astype(dtype)
    blocks = _blocks(q_BHTK.shape[2], _block_size(q_BHTK.shape[2]))
    for (start, stop), e_BHTS in zip(blocks, kept, strict=True):
        here_BHTK = g_BHTK[:, :, start:stop]
        dp_BHTS = _product("BHTK,BHSK->BHTS", here_BHTK, v_BHSK[:, :, :stop])
        ds_BHTS = e_BHTS.astype(dp_BHTS.dtype) * (dp_BHTS - mean_BHT1[:, :, start:stop])
        ds_BHTS = ds_BHTS.astype(dtype)
        dq.append(_product("BHTS,BHSK->BHTK", ds_BHTS, k_BHSK[:, :, :stop]))
        dk.append(_product("BHTK,BHTS->BHKS", q_BHTK[:, :, start:stop], ds_BHTS))
        dv.append(_product("BHTK,BHTS->BHKS", here_BHTK, e_BHTS))
    dq_BTHK = jnp.swapaxes(jnp.concatenate(dq, axis=2), 1, 2)
    dk_BTHK, dv_BTHK = (jnp.transpose(_sum_by_block(x, blocks), (0, 3, 1, 2)) for x in (dk, dv))
    return _scaled(dq_BTHK).astype(dtype), dk_BTHK.astype(dtype), dv_BTHK.astype(dtype)


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _sum_by_block(parts: list[jax.Array], blocks: list[tuple[int, int]]) -> jax.Array:
    """Sum parts, the n-th of which covers keys up to the end of block n, without padding."""
    sums = [
        functools.reduce(jnp.add, [part[..., start:stop] for part in parts[n:]])
        for n, (start, stop) in enumerate(blocks)
    ]
    return jnp.concatenate(sums, axis=-1)
