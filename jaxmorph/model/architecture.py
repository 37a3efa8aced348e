"""The built-in GPT in words: its table of signatures, its sizes and what a token costs.

Axes: vocab, position (index axes: one entry is picked, not summed over), embed, head, head_dim, mlp,
layer, and attn_rank and vocab_rank of the LoRA adapters. The arrays and the arithmetic are in
`gpt`; this module needs no JAX.
"""

from __future__ import annotations

from jaxmorph.config.settings import ModelConfig
from jaxmorph.model.signatures import Signature, count_parameters, parse_table

INDEX_AXES = frozenset({"vocab", "position"})
RANK_AXES = frozenset({"attn_rank", "vocab_rank"})  # what consumes one, LoRA's B, begins at zero


def gpt_signatures(config: ModelConfig) -> dict[str, Signature]:
    """Return the signature of every parameter of the GPT that `config` describes, by path."""
    table = {
        "embed/tokens": "vocab +> embed",
        "blocks/attention/norm": "layer | *> embed",
        "blocks/attention/query": "layer | embed -> head head_dim",
        "blocks/attention/key": "layer | embed -> head head_dim",
        "blocks/attention/value": "layer | embed -> head head_dim",
        "blocks/attention/out": "layer | head head_dim +> embed",
        "blocks/mlp/norm": "layer | *> embed",
        "blocks/mlp/up": "layer | embed -> mlp",
        "blocks/mlp/down": "layer | mlp +> embed",
        # With a tied head the logits are a product with the embedding itself: the final norm then
        # takes the share that the consuming side of a plain matrix would take.
        "head/norm": "embed *>" if config.tied_head else "*> embed",
    }
    if config.positions == "learned":
        table["embed/positions"] = "position +> embed"
    if config.activation == "swiglu":
        table["blocks/mlp/gate"] = "layer | embed -> mlp"
    if not config.tied_head:
        table["head/output"] = "embed -> vocab"
    if config.biases:
        table |= {
            "blocks/attention/query_bias": "layer | -> head head_dim",
            "blocks/attention/key_bias": "layer | -> head head_dim",
            "blocks/attention/value_bias": "layer | -> head head_dim",
            "blocks/attention/out_bias": "layer | +> embed",
            "blocks/mlp/up_bias": "layer | -> mlp",
            "blocks/mlp/down_bias": "layer | +> embed",
        }
        if config.activation == "swiglu":
            table["blocks/mlp/gate_bias"] = "layer | -> mlp"
        if config.norm == "layernorm":
            table |= {
                "blocks/attention/norm_bias": "layer | -> embed",
                "blocks/mlp/norm_bias": "layer | -> embed",
                "head/norm_bias": "embed ->" if config.tied_head else "-> embed",
            }
    return parse_table(table | _lora_table(config))


def lora_adapters(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Return the matrices with a LoRA adapter, each with the paths of its A and its B.

    The adapted matrix acts as W + (alpha / rank)·A·B (Hu et al. 2021, arXiv 2106.09685); a tied head
    uses the adapted embedding too.
    """
    attention = ("query", "key", "value", "out") if config.attn_lora_rank else ()
    bases = [f"blocks/attention/{name}" for name in attention]
    bases += ["embed/tokens"] if config.vocab_lora_rank else []
    return {base: (f"{base}_lora_a", f"{base}_lora_b") for base in bases}


def frozen_parameters(config: ModelConfig) -> frozenset[str]:
    """Return the paths of the parameters that get no update: the adapted ones of a frozen base."""
    return frozenset(lora_adapters(config) if config.lora_base == "frozen" else ())


def _lora_table(config: ModelConfig) -> dict[str, str]:
    """Return the lines of the adapters: detours over a rank, from what a matrix consumes."""
    table = {}
    if config.attn_lora_rank:
        for name in ("query", "key", "value"):
            table |= {
                f"blocks/attention/{name}_lora_a": "layer | embed -> attn_rank",
                f"blocks/attention/{name}_lora_b": "layer | attn_rank -> head head_dim",
            }
        table |= {
            "blocks/attention/out_lora_a": "layer | head head_dim -> attn_rank",
            "blocks/attention/out_lora_b": "layer | attn_rank +> embed",
        }
    if config.vocab_lora_rank:
        table |= {
            "embed/tokens_lora_a": "vocab -> vocab_rank",
            "embed/tokens_lora_b": "vocab_rank +> embed",
        }
    return table


def gpt_axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the size of every axis of the GPT."""
    return {
        "vocab": config.vocab_size,
        "position": config.seq_len,
        "embed": config.d_model,
        "head": config.n_heads,
        "head_dim": config.head_dim,
        "mlp": config.d_ff,
        "layer": config.n_layers,
        "attn_rank": config.attn_lora_rank,
        "vocab_rank": config.vocab_lora_rank,
    }


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters."""
    return count_parameters(gpt_signatures(config).values(), gpt_axis_sizes(config))


def flops_per_token(config: ModelConfig) -> int:
    """Return the floating-point operations of training on one token, backward pass included.

    6 per parameter of every matrix that multiplies (a tied embedding counts once, as the head; looking
    up a row is free) and 12·n_layers·n_heads·head_dim·seq_len for attention, counted unmasked as is
    customary (Chowdhery et al. 2022, PaLM, appendix B; also nanoGPT's estimate). Adapters are added to
    their matrices once a step and so cost no token anything; a frozen matrix costs as much as any, as
    its adapter's gradient comes from its own.
    """
    sizes = gpt_axis_sizes(config)
    matrices = [
        s
        for s in gpt_signatures(config).values()
        if s.is_matrix and not INDEX_AXES & set(s.consumed) and not RANK_AXES & set(s.axes)
    ]
    tied = config.vocab_size * config.d_model if config.tied_head else 0
    attention = config.n_layers * config.n_heads * config.head_dim * config.seq_len
    return 6 * (count_parameters(matrices, sizes) + tied) + 12 * attention


def scans_layers(config: ModelConfig) -> bool:
    """Say whether the blocks run by `lax.scan`: `auto` scans above 12 layers."""
    return config.scan_layers == "scan" or (config.scan_layers == "auto" and config.n_layers > 12)
