"""Changes of shape: a model and its optimizer's state grow together, whoever wrote the model.

`widen` and `deepen` grow any model whose parameters are nested dicts with a signature each;
`transport` moves along any axis maps. The others grow the built-in GPT.
"""

from jaxmorph.morphs.axis_map import FRESH, AxisMap, cut, duplicate, pad, renew, repeat
from jaxmorph.morphs.depth import deepen, stack_layers
from jaxmorph.morphs.lora import (
    decrease_attn_lora_scaling,
    decrease_vocab_lora_scaling,
    merge_lora_weights,
)
from jaxmorph.morphs.moments import FIELDS, KEEP, PARAMETER
from jaxmorph.morphs.sequence import change_seq_len, set_seq_len
from jaxmorph.morphs.transport import Line, Report, transport
from jaxmorph.morphs.width import widen, widen_embed, widen_heads, widen_mlp, widening

__all__ = [
    "FIELDS",
    "FRESH",
    "KEEP",
    "PARAMETER",
    "AxisMap",
    "Line",
    "Report",
    "change_seq_len",
    "cut",
    "decrease_attn_lora_scaling",
    "decrease_vocab_lora_scaling",
    "deepen",
    "duplicate",
    "merge_lora_weights",
    "pad",
    "renew",
    "repeat",
    "set_seq_len",
    "stack_layers",
    "transport",
    "widen",
    "widen_embed",
    "widen_heads",
    "widen_mlp",
    "widening",
]
