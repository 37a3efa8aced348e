"""Changes of shape: a model and its optimizer's state grow together, whoever wrote the model.

`widen` and `deepen` grow any model whose parameters are nested dicts with a signature each;
`transport` moves along any axis maps. Those of the built-in GPT are in `morphs.gpt`.
"""

from jaxmorph.morphs.axis_map import FRESH, AxisMap, cut, duplicate, pad, renew, repeat
from jaxmorph.morphs.deepen import deepen
from jaxmorph.morphs.moments import FIELDS, KEEP, PARAMETER
from jaxmorph.morphs.transport import Line, Report, transport
from jaxmorph.morphs.widen import widen, widening

__all__ = [
    "FIELDS",
    "FRESH",
    "KEEP",
    "PARAMETER",
    "AxisMap",
    "Line",
    "Report",
    "cut",
    "deepen",
    "duplicate",
    "pad",
    "renew",
    "repeat",
    "transport",
    "widen",
    "widening",
]
