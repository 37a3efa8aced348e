"""Changes of shape: grow or shrink a model together with its optimizer state, for any model.

`widen`, `deepen` and `keep` describe a change of one axis, independently of any model; `apply` applies
any number of them at once to parameters (nested dicts of arrays) and to the state of any optax
optimizer. A model is described by its **signatures**, one line per parameter, which name the axis of
every dimension in the array's order:

    stacked axes | consumed axes ARROW produced axes

    "width -> hidden"               a matrix, from width to hidden
    "-> hidden"                     its bias
    "*> hidden"                     a gain on hidden, neutral at one: a norm's scale
    "layer | hidden +> width"       one matrix per layer, added to the residual stream
    "height width | channels -> hidden"    a convolution

An axis has one name and one size everywhere. The arrows are `->` (plain), `+>` (the output is added to
the residual stream) and `*>` (a gain). The *role* of an axis in a parameter decides how weights w and
moments change when entry i' becomes a copy of entry i and takes over the share c of its
contribution:

    role        weights     gradient    Adam's mu, nu       a fresh entry
    produced    w           c·g         c·mu, c²·nu         random; biases 0, gains 1
    consumed    c·w         g           mu, nu              0, so it contributes nothing yet
    stacked     w           g           mu, nu              random; 0 with `identity` and +>

The shares of an entry and its copies sum to 1, which preserves the function. Fresh entries have first
moments of 0 and second moments equal to their layer's mean.

What else an optimizer keeps moves by the power of the gradient that it holds: c for mu, c² for nu, 1
for updates. That depends on the transform and on what comes before it: `TRANSFORMS` lists those that
are known, by name. A state that no rule covers is refused; `apply`'s `fields` states its power.
Epsilons, clipping thresholds and initial accumulators count as gradients of their own unit, as if they
were scaled along.

For example, growing a GPT-like block:

    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> from jaxmorph import morphs
    >>> class Net(nn.Module):
    ...     hidden: int
    ...     layers: int
    ...
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         stack = nn.scan(
    ...             Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
    ...         )
    ...         x, _ = stack(self.hidden, name="blocks")(x, None)
    ...         return nn.Dense(3)(nn.RMSNorm()(x))
    >>> class Block(nn.Module):
    ...     hidden: int
    ...
    ...     @nn.compact
    ...     def __call__(self, x, _):
    ...         units = nn.gelu(nn.Dense(self.hidden, name="up")(nn.RMSNorm(name="norm")(x)))
    ...         return x + nn.Dense(x.shape[-1], name="down")(units), None
    >>> signatures = {
    ...     "blocks/norm/scale": "layer | *> width",
    ...     "blocks/up/kernel": "layer | width -> hidden",
    ...     "blocks/up/bias": "layer | -> hidden",
    ...     "blocks/down/kernel": "layer | hidden +> width",
    ...     "blocks/down/bias": "layer | +> width",
    ...     "RMSNorm_0/scale": "*> width",
    ...     "Dense_0/kernel": "width -> classes",
    ...     "Dense_0/bias": "-> classes",
    ... }
    >>> x = jax.random.normal(jax.random.key(0), (5, 4))
    >>> small, large = Net(hidden=8, layers=2), Net(hidden=12, layers=3)
    >>> params = small.init(jax.random.key(1), x)["params"]
    >>> optimizer = optax.adamw(1e-3)
    >>> grown, opt_state, report = morphs.apply(
    ...     [morphs.widen("hidden", to=12), morphs.deepen(to=3, identity=True)],
    ...     signatures, params, optimizer.init(params), optimizer, key=jax.random.key(2),
    ... )
    >>> before, after = small.apply({"params": params}, x), large.apply({"params": grown}, x)
    >>> bool(jnp.allclose(before, after, atol=1e-5))
    True
    >>> gradient = jax.grad(lambda p: jnp.mean(large.apply({"params": p}, x) ** 2))(grown)
    >>> updates, opt_state = optimizer.update(gradient, opt_state, grown)  # training continues

Other arrays per layer or per head, declared with `NamedAxes`, change along with the parameters;
`trained` is for optimizers whose state covers only some layers. The built-in GPT's own changes are
in `morphs.gpt`.
"""

from jaxmorph.cli.errors import InputError
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.model.signatures import SignatureError
from jaxmorph.morphs.apply import apply
from jaxmorph.morphs.axis_map import FRESH, AxisMap, cut, duplicate, pad, renew, repeat
from jaxmorph.morphs.change import Change, FreshStart, by_map
from jaxmorph.morphs.declared import moved
from jaxmorph.morphs.deepen import deepen
from jaxmorph.morphs.keep import keep
from jaxmorph.morphs.report import Line, Report
from jaxmorph.morphs.trained import trained
from jaxmorph.morphs.transforms import KEEP, PARAMETER, TRANSFORMS
from jaxmorph.morphs.widen import widen

__all__ = [
    "FRESH",
    "KEEP",
    "PARAMETER",
    "TRANSFORMS",
    "AxisMap",
    "Change",
    "FreshStart",
    "InputError",
    "Line",
    "NamedAxes",
    "Report",
    "SignatureError",
    "apply",
    "by_map",
    "cut",
    "deepen",
    "duplicate",
    "keep",
    "moved",
    "pad",
    "renew",
    "repeat",
    "trained",
    "widen",
]
