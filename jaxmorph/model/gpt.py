"""A GPT in Flax NNX behind a functional interface: plain nested dicts in, arrays out.

Axis dictionary (capital suffixes of names): B batch, T time, D embed, H head, K head_dim, F mlp,
V vocab, L layer, S cached time. Parameters are nested dicts with the paths and shapes of
`architecture.gpt_signatures`; block parameters are stacked on a leading layer axis.

Pre-norm decoder after Radford et al. 2019 (GPT-2); rotary positions after Su et al. 2021
(arXiv 2104.09864), RMSNorm after Zhang & Sennrich 2019 (arXiv 1910.07467), SwiGLU after Shazeer 2020
(arXiv 2002.05202).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.model.architecture import (
    INDEX_AXES,
    RANK_AXES,
    gpt_axis_sizes,
    gpt_signatures,
    loss_chunk,
    scans_layers,
)
from jaxmorph.model.blocks import (
    Block,
    Cache,
    Gates,
    Head,
    Params,
    add_row,
    dropout,
    with_params,
)
from jaxmorph.model.lora import adapted
from jaxmorph.model.measures import Mean, Measures
from jaxmorph.model.precision import parameter_dtype, wide_dtype
from jaxmorph.model.signatures import Signature

Constrain = Callable[[jax.Array], jax.Array]


class Output(NamedTuple):
    """What the forward pass returns.

    Args:
      logits: [B, T, V] of the next token, in float32 (float64 with dtype float64).
      measures: what the blocks report besides the residual stream, summed over layers; for example
        the load balance of a block that routes tokens. This GPT's blocks report nothing.
    """

    logits: jax.Array
    measures: Measures


def init(config: ModelConfig, rng: jax.Array) -> Params:
    """Return freshly initialised parameters.

    Gains are one and biases zero; matrices are normal with `init_std`, each layer's projections into
    the residual stream with `init_std / √(2·n_layers)` (Radford et al. 2019). Of an adapter, B is zero
    and A normal with variance 1 / fan-in. Each leaf's randomness depends only on its path, so that
    adding a parameter does not change the others.

    Args:
      config: the architecture.
      rng: a PRNG key.
    """
    sizes, dtype = gpt_axis_sizes(config), parameter_dtype(config)
    leaves = {
        tuple(path.split("/")): init_leaf(
            signature,
            signature.shape(sizes),
            jax.random.fold_in(rng, zlib.crc32(path.encode())),
            config,
            dtype,
        )
        for path, signature in gpt_signatures(config).items()
    }
    return traverse_util.unflatten_dict(leaves)


def init_leaf(
    signature: Signature,
    shape: tuple[int, ...],
    rng: jax.Array,
    config: ModelConfig,
    dtype: jnp.dtype,
) -> jax.Array:
    """Return the initial value of one parameter, according to its signature (see `init`)."""
    if signature.is_gain:
        return jnp.ones(shape, dtype)
    if not signature.is_matrix or RANK_AXES & set(signature.consumed):
        return jnp.zeros(shape, dtype)
    std = config.init_std
    if signature.adds_to_residual and signature.stacked:
        std /= (2 * max(1, config.n_layers)) ** 0.5
    elif RANK_AXES & set(signature.produced):
        picked = bool(INDEX_AXES & set(signature.consumed))
        summed = signature.produced if picked else signature.consumed
        sizes = dict(zip(signature.axes, shape, strict=True))
        std = math.prod(sizes[axis] for axis in summed) ** -0.5
    return jax.random.normal(rng, shape, dtype) * jnp.asarray(std, dtype)


def open_gates(config: ModelConfig) -> Gates:
    """Return gates that leave every layer and head unchanged: all ones."""
    dtype = parameter_dtype(config)
    return {
        "layer": jnp.ones(config.n_layers, dtype),
        "head": jnp.ones((config.n_layers, config.n_heads), dtype),
        "lora_alpha": jnp.ones((), dtype),
    }


def forward(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    *,
    gates: Gates,
    dropout_key: jax.Array | None = None,
    constrain: Constrain = lambda x: x,
) -> Output:
    """Return next-token logits, and what the blocks measure.

    Args:
      config: the architecture.
      params: nested dict of parameters.
      tokens_BT: token ids, int32, T ≤ seq_len.
      gates: "layer" [L] and "head" [L, H].
      dropout_key: PRNG key; None: no dropout.
      constrain: applied to the residual stream [B, T, D] after each block, to constrain its sharding.
    """
    params = adapted(config, params, gates["lora_alpha"])
    hidden_BTD, measures = _hidden(config, params, tokens_BT, gates, dropout_key, constrain)
    return Output(_logits(config, params, hidden_BTD), measures)


def _hidden(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    gates: Gates,
    dropout_key: jax.Array | None,
    constrain: Constrain,
) -> tuple[jax.Array, Measures]:
    """Return the normalised final residual stream [B, T, D], and what the blocks measure.

    `params` are without adapters.
    """
    embed_key, blocks_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    x_BTD = _embed(config, params, tokens_BT, jnp.zeros((), jnp.int32))
    x_BTD = constrain(dropout(x_BTD, config.dropout, embed_key))
    keys = None if blocks_key is None else jax.random.split(blocks_key, config.n_layers)

    def block(x_BTD: jax.Array, layer: tuple) -> tuple[jax.Array, Measures]:
        layer_params, layer_gates, key = layer
        x_BTD, _, measures = with_params(Block, config, layer_params)(x_BTD, layer_gates, key)
        return constrain(x_BTD), measures

    if config.remat:
        block = jax.checkpoint(block)
    x_BTD, stacked = _run_layers(config, block, x_BTD, (params["blocks"], _per_layer(gates), keys))
    measures = jax.tree.map(lambda per_layer: per_layer.sum(axis=0), stacked)
    return with_params(Head, config, params["head"]).normalise(x_BTD), measures


def measure(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    *,
    gates: Gates,
    dropout_key: jax.Array | None = None,
    constrain: Constrain = lambda x: x,
) -> Measures:
    """Return next-token cross-entropy ("loss", in nats), "accuracy" and what blocks measure.

    Args:
      config: the architecture.
      params: nested dict of parameters.
      tokens_BT: [B, T + 1]: inputs and, shifted by one, their targets.
      gates: "layer" [L] and "head" [L, H].
      dropout_key: PRNG key; None: no dropout.
      constrain: see `forward`.

    If all logits at once would be large, they are computed, and recomputed in the backward pass,
    `loss_chunk` tokens at a time.
    """
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    params = adapted(config, params, gates["lora_alpha"])
    hidden_BTD, measures = _hidden(config, params, inputs_BT, gates, dropout_key, constrain)
    chunk = loss_chunk(config, targets_BT.size)

    def totals(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _logits(config, params, hidden)
        target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - target_logit
        hits = jax.lax.argmax(logits, logits.ndim - 1, targets.dtype) == targets
        return nats.sum(), hits.sum(dtype=nats.dtype)

    if chunk:
        nats, hits = _in_chunks(totals, hidden_BTD, targets_BT, chunk)
    else:
        nats, hits = totals(hidden_BTD, targets_BT)
    count = jnp.asarray(targets_BT.size, nats.dtype)
    return {"loss": Mean(nats, count), "accuracy": Mean(hits, count), **measures}


def attention_entropy(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    *,
    gates: Gates,
    constrain: Constrain = lambda x: x,
) -> jax.Array:
    """Return each head's mean entropy of its attention [L, H], see `attention.attention_entropy`.

    It is a forward pass of its own, so that a training step has nothing to do with it. Beside a forward
    pass of the same batch in the same program, XLA computes what they share once, if it is unrolled.

    Args:
      config: the architecture.
      params: nested dict of parameters.
      tokens_BT: token ids, int32, T ≤ seq_len.
      gates: "layer" [L] and "head" [L, H].
      constrain: see `forward`.
    """
    params = adapted(config, params, gates["lora_alpha"])
    x_BTD = constrain(_embed(config, params, tokens_BT, jnp.zeros((), jnp.int32)))

    def block(x_BTD: jax.Array, layer: tuple) -> tuple[jax.Array, jax.Array]:
        layer_params, layer_gates = layer
        run = with_params(Block, config, layer_params)
        return constrain(run(x_BTD, layer_gates, None)[0]), run.attention.entropy(x_BTD)

    return _run_layers(config, block, x_BTD, (params["blocks"], _per_layer(gates)))[1]


def empty_cache(config: ModelConfig, batch: int) -> Cache:
    """Return an empty cache of keys and values for `batch` sequences of up to seq_len tokens."""
    shape = (config.n_layers, batch, config.seq_len, config.n_heads, config.head_dim)
    return {name: jnp.zeros(shape, jnp.dtype(config.dtype)) for name in ("key", "value")}


def extend(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    position: jax.Array,
    *,
    gates: Gates,
) -> tuple[jax.Array, Cache]:
    """Return the logits [B, T, V] of T more tokens, and the cache including them.

    Args:
      config: the architecture.
      params: nested dict of parameters.
      cache: keys and values of the previous tokens.
      tokens_BT: the new tokens.
      position: how many tokens the cache holds, an int32 scalar; position + T ≤ seq_len.
      gates: "layer" [L] and "head" [L, H].
    """
    params = adapted(config, params, gates["lora_alpha"])
    x_BTD = _embed(config, params, tokens_BT, position)

    def block(x_BTD: jax.Array, layer: tuple) -> tuple[jax.Array, Cache]:
        layer_params, layer_gates, layer_cache = layer
        run = with_params(Block, config, layer_params)
        x_BTD, layer_cache, _ = run(x_BTD, layer_gates, None, layer_cache, position)
        return x_BTD, layer_cache

    x_BTD, cache = _run_layers(config, block, x_BTD, (params["blocks"], _per_layer(gates), cache))
    return _logits(
        config, params, with_params(Head, config, params["head"]).normalise(x_BTD)
    ), cache


def _per_layer(gates: Gates) -> Gates:
    return {name: gates[name] for name in ("layer", "head")}


def _embed(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, position: jax.Array
) -> jax.Array:
    """Return token plus position embeddings in the compute dtype; the first token is at `position`."""
    dtype = jnp.dtype(config.dtype)
    x_BTD = params["embed"]["tokens"][tokens_BT].astype(dtype)
    if config.positions == "learned":
        table_PD = params["embed"]["positions"]
        rows_TD = jax.lax.dynamic_slice_in_dim(table_PD, position, tokens_BT.shape[1], 0)
        flat = add_row(x_BTD.reshape(x_BTD.shape[0], -1), rows_TD.astype(dtype).reshape(-1))
        x_BTD = flat.reshape(x_BTD.shape)
    return x_BTD


def _logits(config: ModelConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    return with_params(Head, config, params["head"]).logits(hidden_BTD, params["embed"]["tokens"])


def _run_layers(config: ModelConfig, block: Callable, x: jax.Array, stacked: Any) -> tuple:
    """Carry `x` through `block(x, layer)` for every layer of `stacked`; stack each one's output."""
    if scans_layers(config) or not config.n_layers:  # a scan over no layers knows its output shapes
        return jax.lax.scan(block, x, stacked)
    leaves, structure = jax.tree.flatten(stacked)
    outputs = []
    # unstack, not indexing: its gradient is one stack instead of n_layers padded sums.
    for layer in zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True):
        x, output = block(x, jax.tree.unflatten(structure, layer))
        outputs.append(output)
    return x, jax.tree.map(lambda *leaf: jnp.stack(leaf), *outputs)


def _in_chunks(
    totals: Callable, hidden_BTD: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Sum `totals(hidden, targets)` over chunks of tokens, recomputing each in the backward pass."""
    hidden, targets = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    whole = targets.size // chunk * chunk
    step = jax.checkpoint(totals)

    def body(carry: tuple, part: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, carry, step(*part)), None

    zero = jnp.zeros((), wide_dtype(hidden.dtype))
    parts = (
        hidden[:whole].reshape(-1, chunk, hidden.shape[-1]),
        targets[:whole].reshape(-1, chunk),
    )
    sums, _ = jax.lax.scan(body, (zero, zero), parts)
    if whole < targets.size:
        sums = jax.tree.map(jnp.add, sums, step(hidden[whole:], targets[whole:]))
    return sums
