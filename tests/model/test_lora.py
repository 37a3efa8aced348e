"""Adapters: the function they add, what trains, and what they cost the optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from small_models import VARIANTS, reference_logits, shaken, shape_of, small_config, small_tokens

from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_signatures, lora_adapters
from jaxmorph.model.lora import adapted
from jaxmorph.model.trainable import trainable_of

ADAPTED = {"attn_lora_rank": 3, "vocab_lora_rank": 5}


def _flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def _forward(config):
    def logits(params, tokens, *, gates):
        return gpt.forward(config, params, tokens, gates=gates).logits

    return jax.jit(logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_merged_weights(variant):
    with jax.enable_x64(True):
        config = small_config(dtype="float64", **VARIANTS[variant], **ADAPTED)
        params = shaken(jax.device_get(gpt.init(config, jax.random.key(0))))
        gates = {**gpt.open_gates(config), "lora_alpha": jnp.asarray(7.0)}
        tokens = small_tokens(2, 20)
        found = _forward(config)(params, jnp.asarray(tokens), gates=gates)
        merged = dict(_flat(params))
        for base, (a, b) in lora_adapters(config).items():
            factor_a, factor_b = np.asarray(merged.pop(a)), np.asarray(merged.pop(b))
            scale = 7.0 / factor_a.shape[-1]
            if base.startswith("blocks/"):
                added = [np.tensordot(x, y, 1) for x, y in zip(factor_a, factor_b, strict=True)]
            else:
                added = np.tensordot(factor_a, factor_b, 1)
            merged[base] = np.asarray(merged[base]) + scale * np.asarray(added)
        plain = dataclasses.replace(config, attn_lora_rank=0, vocab_lora_rank=0)
        expected = reference_logits(plain, traverse_util.unflatten_dict(merged, sep="/"), tokens)
        np.testing.assert_allclose(found, expected, atol=1e-11)


def test_fresh_adapters_add_nothing():
    config = small_config(**ADAPTED)
    params = gpt.init(config, jax.random.key(0))
    plain = dataclasses.replace(config, attn_lora_rank=0, vocab_lora_rank=0)
    tokens = jnp.asarray(small_tokens(2, 20))
    found = _forward(config)(params, tokens, gates=gpt.open_gates(config))
    without = gpt.init(plain, jax.random.key(0))
    expected = _forward(plain)(without, tokens, gates=gpt.open_gates(plain))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("lora_base", ["frozen", "trained"])
def test_a_frozen_base_is_out_of_the_trainable_view(lora_base):
    config = small_config(**ADAPTED, lora_base=lora_base)
    trainable = trainable_of(shape_of(config))
    params = shaken(jax.device_get(gpt.init(config, jax.random.key(0))))
    frozen = set(lora_adapters(config)) if lora_base == "frozen" else set()
    view = trainable.view(params)
    assert set(_flat(view)) == set(trainable.trained) == set(_flat(params)) - frozen
    doubled = _flat(trainable.merged(params, jax.tree.map(lambda leaf: 2 * leaf, view)))
    for path, leaf in _flat(params).items():
        np.testing.assert_array_equal(
            doubled[path], leaf if path in frozen else np.multiply(2, np.asarray(leaf))
        )


def test_adapters_are_gone_once_added():
    config = small_config(**ADAPTED)
    params = gpt.init(config, jax.random.key(0))
    plain = dataclasses.replace(config, attn_lora_rank=0, vocab_lora_rank=0)
    assert set(_flat(adapted(config, params, jnp.ones(())))) == set(gpt_signatures(plain))
