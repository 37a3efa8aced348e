"""The built-in GPT's own changes of shape, each a function of its architecture before and after."""

from collections.abc import Callable, Mapping

from jaxmorph.morphs.gpt.depth import stack_layers
from jaxmorph.morphs.gpt.lora import (
    decrease_attn_lora_scaling,
    decrease_vocab_lora_scaling,
    merge_lora_weights,
)
from jaxmorph.morphs.gpt.sequence import change_seq_len, set_seq_len
from jaxmorph.morphs.gpt.width import widen_embed, widen_heads, widen_mlp

MORPHS: Mapping[str, Callable] = {
    morph.__name__: morph
    for morph in (
        stack_layers,
        widen_mlp,
        widen_heads,
        widen_embed,
        change_seq_len,
        set_seq_len,
        decrease_attn_lora_scaling,
        decrease_vocab_lora_scaling,
        merge_lora_weights,
    )
}
