"""Changes of shape: a model and its optimizer's state grow together, whoever wrote the model.

`widen` and `deepen` grow any model whose parameters are nested dicts with a signature each;
`transport` moves along any axis maps. The others grow the built-in GPT.
"""

from jaxmorph.morphs.axis_map import FRESH, AxisMap, duplicate, pad, repeat
from jaxmorph.morphs.depth import deepen, stack_layers
from jaxmorph.morphs.moments import FIELDS, KEEP, PARAMETER
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
    "deepen",
    "duplicate",
    "pad",
    "repeat",
    "stack_layers",
    "transport",
    "widen",
    "widen_embed",
    "widen_heads",
    "widen_mlp",
    "widening",
]
