"""The built-in GPT's own changes of shape, each a function of its architecture before and after."""

from collections.abc import Mapping

from jaxmorph.morphs.gpt.depth import stack_layers
from jaxmorph.morphs.gpt.heads import regrow_heads
from jaxmorph.morphs.gpt.lora import change_ranks, merge_lora_weights
from jaxmorph.morphs.gpt.sequence import change_context
from jaxmorph.morphs.gpt.stage import Morph, Transition
from jaxmorph.morphs.gpt.width import remove_heads, widen_embed, widen_heads, widen_mlp

# By operation name; the plan turns the value into the architecture after it.
MORPHS: Mapping[str, Morph] = {
    "stack_layers": stack_layers,
    "set_n_layers": stack_layers,
    "widen_mlp": widen_mlp,
    "set_d_ff": widen_mlp,
    "widen_heads": widen_heads,
    "set_n_heads": widen_heads,
    "regrow_heads": regrow_heads,
    "remove_heads": remove_heads,
    "widen_embed": widen_embed,
    "set_d_model": widen_embed,
    "change_seq_len": change_context,
    "set_seq_len": change_context,
    "decrease_attn_lora_scaling": change_ranks,
    "decrease_vocab_lora_scaling": change_ranks,
    "set_attn_lora_rank": change_ranks,
    "set_vocab_lora_rank": change_ranks,
    "merge_lora_weights": merge_lora_weights,
}

__all__ = ["MORPHS", "Morph", "Transition"]
