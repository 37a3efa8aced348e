"""The architecture of a model, as plain sizes and policies."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmorph.config.settings import Attention, Count, Fraction, Positive, PositiveFloat


@dataclass(frozen=True)
class ModelConfig:
    """The architecture at one point: all sizes and policies that the model's programs depend on."""

    n_layers: Count
    d_model: Positive
    n_heads: Positive
    head_dim: Positive
    d_ff: Positive
    vocab_size: Count
    seq_len: Positive
    dropout: Fraction
    positions: str
    norm: str
    activation: str
    tied_head: bool
    biases: bool
    init_std: PositiveFloat
    scan_layers: str
    dtype: str
    remat: bool
    attention: Attention
    loss_chunk: Count | None
    attn_lora_rank: Count
    """Rank of the adapters on the attention's matrices; 0: none."""
    vocab_lora_rank: Count
    """Rank of the adapter on the token embedding; 0: none."""
    lora_base: str
    """frozen or trained: whether the matrices that have an adapter are trained."""
