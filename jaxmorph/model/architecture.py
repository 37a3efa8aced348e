"""The built-in GPT's specification: its table of signatures, its sizes and FLOPs per token.

Axes: vocab, position (index axes: looked up, not summed over), embed, head, head_dim, mlp, layer, and
attn_rank and vocab_rank of the LoRA adapters. The arrays and the computation are in `gpt`; this
module does not import JAX.
"""

from __future__ import annotations

from collections.abc import Collection

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.model.signatures import Signature, count_parameters, parse_table

INDEX_AXES = frozenset({"vocab", "position"})
RANK_AXES = frozenset({"attn_rank", "vocab_rank"})  # their consumer, LoRA's B, starts at zero
_LARGEST_LOGITS = 256 << 20  # bytes of logits above which the loss is computed in chunks
_LOSS_CHUNK = 4096  # tokens


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
        # With a tied head the logits are a product with the embedding itself, so the final norm takes
        # the share that a plain output matrix would take as the consumer.
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


def _lora_table(config: ModelConfig) -> dict[str, str]:
    """Return the adapters' signatures: a low-rank path parallel to each adapted matrix."""
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


def flops_per_token(config: ModelConfig, frozen_layers: Collection[int] = ()) -> int:
    """Return the floating-point operations of training on one token, backward pass included.

    6 per parameter of every matrix multiplied (a tied embedding counts once, as the head; row lookups
    are free) and 12·n_layers·n_heads·head_dim·seq_len for attention, counted unmasked as is customary
    (Chowdhery et al. 2022, PaLM, appendix B; also nanoGPT's estimate). Adapters are added to their
    matrices once per step, so they cost nothing per token; a matrix frozen under an adapter costs as
    much as any other, as the adapter's gradient is computed from the matrix's. Matrices of a frozen
    layer cost 4 per parameter: they propagate the gradient but have none of their own.

    Args:
      config: the architecture.
      frozen_layers: layers that are not trained.
    """
    sizes = gpt_axis_sizes(config)
    matrices = [
        s
        for s in gpt_signatures(config).values()
        if s.is_matrix and not INDEX_AXES & set(s.consumed) and not RANK_AXES & set(s.axes)
    ]
    tied = config.vocab_size * config.d_model if config.tied_head else 0
    attention = config.n_layers * config.n_heads * config.head_dim * config.seq_len
    frozen = count_parameters(
        [s for s in matrices if s.stacked], sizes | {"layer": len(frozen_layers)}
    )
    return 6 * (count_parameters(matrices, sizes) + tied) - 2 * frozen + 12 * attention


def scans_layers(config: ModelConfig) -> bool:
    """Return whether the blocks run in a `lax.scan`: `auto` scans above 12 layers."""
    return config.scan_layers == "scan" or (config.scan_layers == "auto" and config.n_layers > 12)


def loss_chunk(config: ModelConfig, tokens: int) -> int:
    """Return how many of a batch's tokens have their logits computed at once; 0 for all."""
    if config.loss_chunk is not None:
        return 0 if config.loss_chunk >= tokens else config.loss_chunk
    return _LOSS_CHUNK if 4 * tokens * config.vocab_size > _LARGEST_LOGITS else 0
