"""The GPT's parts as Flax NNX modules; `gpt` runs them.

Axis dictionary as in `gpt`. A module holds one layer's parameters, without the layer axis, with the
names and shapes of `architecture.gpt_signatures`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.model.architecture import gpt_axis_sizes, gpt_signatures
from jaxmorph.model.attention import attention_entropy, causal_attention
from jaxmorph.model.measures import Measures
from jaxmorph.model.precision import parameter_dtype, wide_dtype

Params = dict[str, Any]
# Run-time factors of the forward pass: "layer" [L] scales a block's change, "head" [L, H] a head's
# output, "lora_alpha" [] the adapters. A block gets its own layer's "layer" and "head".
Gates = dict[str, jax.Array]
Cache = dict[str, jax.Array]  # "key", "value" [L, B, S, H, K]; without L inside a block
_NORM_EPSILON = 1e-5
_ROTARY_BASE = 10_000.0


class Block(nnx.Module):
    """One transformer block; its parameters have no layer axis."""

    def __init__(self, config: ModelConfig):
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.rate = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        gates: Gates,
        key: jax.Array | None,
        cache: Cache | None = None,
        position: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, Measures]:
        """Return the next residual stream, the extended cache ({} without one) and measures.

        The layer gate scales the change (h + α·(block(h) - h)), the head gates each head. Measures are
        sums with counts of whatever a type of block reports; this one reports nothing.
        """
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        attended_BTD, cache = self.attention(x_BTD, gates["head"], keys[0], cache, position)
        attended_BTD = dropout(attended_BTD, self.rate, keys[1])
        change_BTD = attended_BTD + dropout(self.mlp(x_BTD + attended_BTD), self.rate, keys[2])
        return x_BTD + gates["layer"].astype(x_BTD.dtype) * change_BTD, cache, {}


class Attention(nnx.Module):
    """Causal multi-head self-attention with its pre-norm."""

    def __init__(self, config: ModelConfig):
        new = _parameter_maker(config, "blocks/attention")
        self.norm, self.norm_bias = new("norm"), new("norm_bias")
        self.query, self.query_bias = new("query"), new("query_bias")
        self.key, self.key_bias = new("key"), new("key_bias")
        self.value, self.value_bias = new("value"), new("value_bias")
        self.out, self.out_bias = new("out"), new("out_bias")
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        gates_H: jax.Array,
        key: jax.Array | None,
        cache: Cache | None,
        position: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        """Return the change of the residual stream [B, T, D] and the extended cache."""
        config = self.config
        query_BTHK, key_BTHK, value_BTHK = self._projected(x_BTD, position)
        if cache is None or position is None:
            cache = {}
            mixed_BTHK = causal_attention(
                query_BTHK,
                key_BTHK,
                value_BTHK,
                implementation=config.attention,
                dropout_rate=config.dropout if key is not None else 0.0,
                dropout_key=key,
            )
        else:
            cache = {
                "key": jax.lax.dynamic_update_slice_in_dim(cache["key"], key_BTHK, position, 1),
                "value": jax.lax.dynamic_update_slice_in_dim(
                    cache["value"], value_BTHK, position, 1
                ),
            }
            mixed_BTHK = _attend_to_cache(query_BTHK, cache, position)
        # The gate scales the small projection, not the activations: the same function, and a gate
        # of zero is exactly the same as a removed head.
        out_HKD = self.out[...] * gates_H[:, None, None]
        return _linear(mixed_BTHK, out_HKD, self.out_bias, 2), cache

    def entropy(self, x_BTD: jax.Array) -> jax.Array:
        """Return the heads' mean entropy [H], see `attention_entropy`; it has no gradient."""
        return attention_entropy(*self._projected(jax.lax.stop_gradient(x_BTD), None)[:2])

    def _projected(
        self, x_BTD: jax.Array, position: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values [B, T, H, K] of the residual stream."""
        x_BTD = normalise(self.config, x_BTD, self.norm, self.norm_bias)
        query_BTHK = _linear(x_BTD, self.query, self.query_bias, 1)
        key_BTHK = _linear(x_BTD, self.key, self.key_bias, 1)
        value_BTHK = _linear(x_BTD, self.value, self.value_bias, 1)
        if self.config.positions == "rotary":
            start = jnp.zeros((), jnp.int32) if position is None else position
            query_BTHK, key_BTHK = _rotate(query_BTHK, start), _rotate(key_BTHK, start)
        return query_BTHK, key_BTHK, value_BTHK


class MLP(nnx.Module):
    """Two-layer perceptron with its pre-norm."""

    def __init__(self, config: ModelConfig):
        new = _parameter_maker(config, "blocks/mlp")
        self.norm, self.norm_bias = new("norm"), new("norm_bias")
        self.gate, self.gate_bias = new("gate"), new("gate_bias")
        self.up, self.up_bias = new("up"), new("up_bias")
        self.down, self.down_bias = new("down"), new("down_bias")
        self.config = config

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return the change of the residual stream [B, T, D]."""
        x_BTD = normalise(self.config, x_BTD, self.norm, self.norm_bias)
        up_BTF = _linear(x_BTD, self.up, self.up_bias, 1)
        if self.config.activation == "swiglu":
            up_BTF = _swiglu(_linear(x_BTD, self.gate, self.gate_bias, 1), up_BTF)
        else:
            up_BTF = _gelu(up_BTF)
        return _linear(up_BTF, self.down, self.down_bias, 1)


# Recomputed in the backward pass: loading its intermediates would take as long, and a lot of memory.
@jax.checkpoint
def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


@jax.checkpoint
def _swiglu(gate: jax.Array, x: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * x


class Head(nnx.Module):
    """The final norm and, unless tied to the embedding, the output matrix."""

    def __init__(self, config: ModelConfig):
        new = _parameter_maker(config, "head")
        self.norm, self.norm_bias, self.output = new("norm"), new("norm_bias"), new("output")
        self.config = config

    def normalise(self, x_BTD: jax.Array) -> jax.Array:
        """Return the normalised residual stream [B, T, D], the input of the output matrix."""
        return normalise(self.config, x_BTD, self.norm, self.norm_bias)

    def logits(self, x_BTD: jax.Array, tokens_VD: jax.Array) -> jax.Array:
        """Return logits [..., V]; `tokens_VD` is the embedding, used if the head is tied."""
        output_DV = tokens_VD.T if self.output is None else self.output[...]
        wide = wide_dtype(x_BTD.dtype)
        return jnp.matmul(x_BTD, output_DV.astype(x_BTD.dtype), preferred_element_type=wide)


def normalise(
    config: ModelConfig, x_BTD: jax.Array, scale: nnx.Param, bias: nnx.Param | None
) -> jax.Array:
    """Return LayerNorm or RMSNorm of `x_BTD` over its last axis, with statistics in float32."""
    wide = _standardise(x_BTD.astype(wide_dtype(x_BTD.dtype)), config.norm == "layernorm")
    wide = scale_row(wide, scale[...].astype(wide.dtype))
    if bias is not None:
        wide = add_row(wide, bias[...].astype(wide.dtype))
    return wide.astype(x_BTD.dtype)


def _standardised(x: jax.Array, centred: bool) -> jax.Array:
    """Return `x` divided by the RMS of its last axis, minus its mean first if `centred`.

    The gradient is written by hand because autodiff's makes more passes over memory.
    """
    return _standardise_forward(x, centred)[0]


def _standardise_forward(x: jax.Array, centred: bool) -> tuple[jax.Array, tuple]:
    if centred:
        x = x - x.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + _NORM_EPSILON)
    return x * scale, (x * scale, scale)


def _standardise_backward(centred: bool, saved: tuple, gradient: jax.Array) -> tuple[jax.Array]:
    y, scale = saved
    change = gradient - y * (gradient * y).mean(axis=-1, keepdims=True)
    if centred:
        change = change - gradient.mean(axis=-1, keepdims=True)
    return (change * scale,)


_standardise = jax.custom_vjp(_standardised, nondiff_argnums=(1,))
_standardise.defvjp(_standardise_forward, _standardise_backward)


@jax.custom_vjp
def add_row(x: jax.Array, row: jax.Array) -> jax.Array:
    """Return `x` [..., C] plus a vector [C].

    The gradient of the vector is a sum over rows. XLA's CPU backend compiles it to a slow tree, but a
    product with a row of ones to a fast matmul; other backends sum well.
    """
    return x + row.reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_vjp
def scale_row(x: jax.Array, row: jax.Array) -> jax.Array:
    """Return `x` [..., C] times a vector [C]; see `add_row`."""
    return x * row.reshape((1,) * (x.ndim - 1) + (-1,))


def _sum_rows(x: jax.Array) -> jax.Array:
    x = x.reshape(-1, x.shape[-1])
    if jax.default_backend() == "cpu":
        return (jnp.ones((1, x.shape[0]), x.dtype) @ x)[0]
    return x.sum(axis=0)


def _scale_row_backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, row = saved
    return scale_row(gradient, row), _sum_rows(gradient * x)


add_row.defvjp(lambda x, row: (add_row(x, row), None), lambda _, g: (g, _sum_rows(g)))
scale_row.defvjp(lambda x, row: (scale_row(x, row), (x, row)), _scale_row_backward)


@jax.custom_vjp
def _narrow_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Return `x` [..., C] times a matrix [C, P], in 16 bits.

    The gradient of the matrix sums over the batch's axes as they are. XLA's CPU backend then transposes
    with a cheap copy; over a single axis it does not, and since it multiplies 16-bit arrays as such only
    where none is transposed, it converts both to float32 and takes twice as long.
    """
    return x @ matrix


def _narrow_product_backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = saved
    batch = tuple(range(x.ndim - 1))
    return gradient @ matrix.T, jax.lax.dot_general(x, gradient, ((batch, batch), ((), ())))


_narrow_product.defvjp(
    lambda x, matrix: (_narrow_product(x, matrix), (x, matrix)), _narrow_product_backward
)


def _linear(
    x: jax.Array, weight: nnx.Param | jax.Array, bias: nnx.Param | None, contracted: int
) -> jax.Array:
    """Contract the last `contracted` axes of `x` with the first of `weight`, as a product of matrices.

    XLA's CPU backend is about twice as fast on plain matrices as on contractions of several axes; but
    see `_narrow_product`.
    """
    consumed, produced = weight.shape[:contracted], weight.shape[contracted:]
    batch = x.shape[: x.ndim - contracted]
    assert x.shape[x.ndim - contracted :] == consumed, (x.shape, weight.shape)
    matrix = weight[...].astype(x.dtype).reshape((math.prod(consumed), math.prod(produced)))
    if x.dtype.itemsize == 2:
        y = _narrow_product(x.reshape((*batch, math.prod(consumed))), matrix)
    else:
        y = x.reshape((math.prod(batch), math.prod(consumed))) @ matrix
    if bias is not None:
        y = add_row(y, bias[...].astype(y.dtype).reshape(-1))
    return y.reshape(batch + produced)


def _rotate(x_BTHK: jax.Array, start: jax.Array) -> jax.Array:
    """Rotate pairs (k, k + K/2) by the token's position; the first token is at `start`."""
    half = x_BTHK.shape[-1] // 2
    wide = wide_dtype(x_BTHK.dtype)
    frequency = _ROTARY_BASE ** (-jnp.arange(half, dtype=wide) / half)
    positions = (start + jnp.arange(x_BTHK.shape[1], dtype=start.dtype)).astype(wide)
    angle = (positions[:, None] * frequency[None, :])[None, :, None, :]
    low, high = x_BTHK[..., :half].astype(wide), x_BTHK[..., half:].astype(wide)
    rotated = [
        low * jnp.cos(angle) - high * jnp.sin(angle),
        low * jnp.sin(angle) + high * jnp.cos(angle),
    ]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


def _attend_to_cache(query_BTHK: jax.Array, cache: Cache, position: jax.Array) -> jax.Array:
    """Return attention of T new tokens, the first at `position`, to the cached tokens up to each."""
    wide = wide_dtype(query_BTHK.dtype)
    scores_BHTS = jnp.einsum(
        "BTHK,BSHK->BHTS", query_BTHK, cache["key"], preferred_element_type=wide
    ) * jnp.asarray(query_BTHK.shape[-1] ** -0.5, wide)
    new, held = scores_BHTS.shape[2:]
    old_S, new_T = (jnp.arange(size, dtype=position.dtype) for size in (held, new))
    seen_TS = old_S[None, :] <= position + new_T[:, None]
    scores_BHTS = jnp.where(seen_TS[None, None], scores_BHTS, -jnp.inf)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(query_BTHK.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, cache["value"])


def _parameter_maker(config: ModelConfig, scope: str) -> Callable[[str], Any]:
    """Return a function that makes the parameter `scope/name`, shaped per layer; None if absent."""
    signatures, sizes = gpt_signatures(config), gpt_axis_sizes(config)

    def new(name: str) -> nnx.Param | None:
        signature = signatures.get(f"{scope}/{name}")
        if signature is None:
            return None
        shape = tuple(sizes[axis] for axis in signature.consumed + signature.produced)
        return nnx.Param(jnp.zeros(shape, parameter_dtype(config)))

    return new


def with_params(cls: Callable[[ModelConfig], Any], config: ModelConfig, params: Params) -> Any:
    """Return the module holding `params`, without allocating its own initial values."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config)))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Return `x` with entries dropped at `rate` and the rest scaled up; unchanged without a key."""
    return x if key is None or rate == 0.0 else nnx.Dropout(rate)(x, rngs=key)
