"""Small architectures and a float64 GPT in NumPy to hold the model against."""

import dataclasses
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
from flax import traverse_util

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.resolve import resolve
from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import Settings
from jaxmorph.config.start import model_config, start_shape

VARIANTS = {
    "gpt2": {},
    "untied": {"tied_head": False},
    "llama": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "biases": False,
        "tied_head": False,
    },
    "rmsnorm tied with biases": {"norm": "rmsnorm"},
    "swiglu with biases": {"activation": "swiglu"},
    "no biases": {"biases": False},
}


def small_config(**changes) -> ModelConfig:
    """A GPT small enough for a test: 3 layers of 4 heads of 8, vocabulary 50, context 24."""
    shape = ("--n_layers", "3", "--d_model", "32", "--n_heads", "4", "--d_ff", "48")
    return dataclasses.replace(model_config(resolved(*shape), 50), **{"seq_len": 24} | changes)


@cache
def resolved(*argv: str) -> Settings:
    """The settings of a command line, which is parsed once."""
    return resolve(list(argv))[0]


def shape_of(config: ModelConfig, *argv: str) -> RunShape:
    """The shape of a run that begins with an architecture; the rest as a command line says."""
    return dataclasses.replace(start_shape(resolved(*argv), None, None), model=config)


def small_tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids [batch, length]."""
    return np.random.default_rng(seed).integers(0, 50, (batch, length)).astype(np.int32)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of nested dicts by their path, as `a/b/c`."""
    leaves = traverse_util.flatten_dict(tree, sep="/")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def shaken(params: dict, seed: int = 0) -> dict:
    """Parameters with noise on every leaf, so that no bias is zero and no gain one."""
    rng = np.random.default_rng(seed)

    def shake(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: shake(child) for name, child in node.items()}
        leaf = np.asarray(node)
        return leaf + (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return shake(params)


def reference_logits(
    config: ModelConfig,
    params: dict,
    tokens: np.ndarray,
    without: Collection = (),
    entropies: list | None = None,
) -> np.ndarray:
    """Logits [B, T, V] computed with loops and full matrices in float64.

    `without` has the heads that are left out, each as (layer, head). `entropies` gets the entropy of
    the weights of every head, example and token, over the log of what it sees: (layer, head, entropy).
    """

    def wide(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: wide(child) for name, child in node.items()}
        return np.asarray(node, np.float64)

    params = wide(params)
    blocks = params["blocks"]
    x = params["embed"]["tokens"][tokens]
    if config.positions == "learned":
        x = x + params["embed"]["positions"][: tokens.shape[1]]
    for layer in range(config.n_layers):
        attention = {name: leaf[layer] for name, leaf in blocks["attention"].items()}
        mlp = {name: leaf[layer] for name, leaf in blocks["mlp"].items()}
        heads = [head for head in range(config.n_heads) if (layer, head) not in without]
        found: list = []
        x = x + _attention(config, attention, x, heads, found)
        if entropies is not None:
            entropies += [(layer, head, entropy) for head, entropy in found]
        x = x + _mlp(config, mlp, x)
    x = _norm(config, x, params["head"]["norm"], params["head"].get("norm_bias"))
    output = params["embed"]["tokens"].T if config.tied_head else params["head"]["output"]
    return x @ output


def _norm(config, x, scale, bias):
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    return y if bias is None else y + bias


def _attention(config, p, x, heads, entropies):
    x = _norm(config, x, p["norm"], p.get("norm_bias"))
    out = np.zeros_like(x)
    B, T, _ = x.shape
    for head in heads:
        q, k, v = (
            x @ p[name][:, head] + (p[f"{name}_bias"][head] if config.biases else 0.0)
            for name in ("query", "key", "value")
        )
        if config.positions == "rotary":
            q, k = _rotate(q), _rotate(k)
        for b in range(B):
            for t in range(T):
                scores = k[b, : t + 1] @ q[b, t] / np.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                weights = weights / weights.sum()
                if t:
                    nats = -weights[weights > 0] @ np.log(weights[weights > 0])
                    entropies.append((head, nats / np.log(t + 1)))
                mixed = weights @ v[b, : t + 1]
                out[b, t] += mixed @ p["out"][head]
    return out + (p["out_bias"] if config.biases else 0.0)


def _rotate(x):
    """Complex rotation: the pair (k, k + K/2) is one complex number, turned by t·10000^(-2k/K)."""
    half = x.shape[-1] // 2
    angle = np.outer(np.arange(x.shape[1]), 10_000.0 ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def _mlp(config, p, x):
    x = _norm(config, x, p["norm"], p.get("norm_bias"))
    bias = (lambda name: p[name]) if config.biases else (lambda name: 0.0)
    up = x @ p["up"] + bias("up_bias")
    if config.activation == "swiglu":
        gate = x @ p["gate"] + bias("gate_bias")
        up = gate / (1 + np.exp(-gate)) * up
    else:
        up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return up @ p["down"] + bias("down_bias")
