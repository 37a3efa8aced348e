"""Generating tokens from a model, with a cache of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.model import gpt
from jaxmorph.model.blocks import Cache, Gates, Params


def generate(
    config: ModelConfig,
    params: Params,
    gates: Gates,
    prompt: Sequence[int],
    *,
    vocab_size: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> Iterator[int]:
    """Yield sampled token ids for ever, each given the prompt and the previous ones.

    When the context is full, the model continues from its newer half.

    Args:
      config: the architecture.
      params: its parameters.
      gates: its gates.
      prompt: token ids, at least one; only the last seq_len - 1 are used.
      vocab_size: ids from here on are padding of the vocabulary and never sampled.
      temperature: the logits are divided by it; 0 takes the likeliest token.
      top_k: sample from this many likeliest tokens; 0: from all.
      seed: of the samples.
    """
    extend = jax.jit(functools.partial(gpt.extend, config), donate_argnums=1)
    draw = jax.jit(
        functools.partial(_draw, vocab_size=vocab_size, temperature=temperature, top_k=top_k)
    )
    key = jax.random.key(seed)
    context = list(prompt)[-max(1, config.seq_len - 1) :]
    logits_V, cache = _read(config, extend, params, gates, context)
    while True:
        key, subkey = jax.random.split(key)
        token = int(draw(logits_V, subkey))
        yield token
        if len(context) == config.seq_len:
            context = context[config.seq_len // 2 + 1 :]
            context.append(token)
            logits_V, cache = _read(config, extend, params, gates, context)
            continue
        position = jnp.asarray(len(context), jnp.int32)
        context.append(token)
        logits_BTV, cache = extend(params, cache, _one(token), position, gates=gates)
        logits_V = logits_BTV[0, -1]


def _read(
    config: ModelConfig, extend, params: Params, gates: Gates, context: list[int]
) -> tuple[jax.Array, Cache]:
    """Return the logits after the context, and the cache that holds it.

    The context is padded to a power of two, so that few lengths are compiled. The cache entries of
    the padding are overwritten before any token can see them.
    """
    length = min(config.seq_len, 1 << (len(context) - 1).bit_length())
    padded = jnp.asarray([context + [0] * (length - len(context))], jnp.int32)
    start = jnp.zeros((), jnp.int32)
    cache = gpt.empty_cache(config, 1)
    logits_BTV, cache = extend(params, cache, padded, start, gates=gates)
    return logits_BTV[0, len(context) - 1], cache


def _one(token: int) -> jax.Array:
    return jnp.asarray([[token]], jnp.int32)


def _draw(
    logits_V: jax.Array, key: jax.Array, *, vocab_size: int, temperature: float, top_k: int
) -> jax.Array:
    logits_V = logits_V[:vocab_size]
    if temperature == 0:
        return jnp.argmax(logits_V)
    if 0 < top_k < vocab_size:
        smallest = jax.lax.top_k(logits_V, top_k)[0][-1]
        logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
    return jax.random.categorical(key, logits_V / temperature)
