"""The update rules, composed from optax; each parameter's rule follows from its signature."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.model.architecture import INDEX_AXES
from jaxmorph.model.precision import wide_dtype
from jaxmorph.model.signatures import Signature
from jaxmorph.model.trainable import Trainable
from jaxmorph.model.tree_paths import parameter_path
from jaxmorph.step.heads import HEAD_AXES, covers, over_axes

_MUON_RMS = 0.2  # of a muon update; Adam's usual one (Liu et al. 2025, arXiv 2502.16982)


def make_optimizer(
    settings: OptimizerSettings, trainable: Trainable
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer: clipping, one rule per parameter group, times the learning rate.

    Its `update(gradients, state, params, learning_rate=..., multipliers=...)` takes the learning rate as
    an array, so that a schedule is evaluated inside the compiled step and a change of rate recompiles
    nothing; likewise the multipliers of the rate, see `scale_by_multipliers`. It takes all parameters;
    its gradients, state and updates cover only the trained part.

    Groups: "hidden" are the matrices between activations, "index" those with a vocabulary or position
    axis, "vector" biases and gains. Vectors are not decayed; muon updates only the hidden matrices,
    and AdamW the rest.

    Args:
      settings: which rule, and its constants.
      trainable: what is trained; parameters are nested dicts with the paths of its signatures.
    """
    signatures = trainable.trained
    clip = [optax.clip_by_global_norm(settings.grad_clip)] if settings.grad_clip > 0 else []
    rules: dict[Hashable, optax.GradientTransformation] = {
        group: _rule(settings, group, signatures) for group in ("hidden", "index", "vector")
    }
    grouped = optax.multi_transform(rules, group_labels(signatures))
    per_head = scale_by_multipliers(signatures, HEAD_AXES)
    return of_trained_part(
        optax.chain(*clip, grouped, per_head, scale_by_learning_rate_argument()), trainable
    )


def of_trained_part(
    optimizer: optax.GradientTransformation, trainable: Trainable
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that takes all parameters and passes on those that are trained.

    Args:
      optimizer: of the trained part.
      trainable: what is trained.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> optax.OptState:
        return inner.init(trainable.view(params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        view = None if params is None else trainable.view(params)
        return inner.update(updates, state, view, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def group_labels(signatures: Mapping[str, Signature]) -> dict[str, Any]:
    """Return the optimizer group of each parameter, as nested dicts like the parameters."""
    return _labels(signatures, _group)


def _labels(
    signatures: Mapping[str, Signature], label: Callable[[Signature], str]
) -> dict[str, Any]:
    """Return a label of each parameter's signature, as nested dicts like the parameters."""
    return traverse_util.unflatten_dict(
        {tuple(path.split("/")): label(signature) for path, signature in signatures.items()}
    )


def scale_by_multipliers(
    signatures: Mapping[str, Signature], axes: str
) -> optax.GradientTransformationExtraArgs:
    """Return a transform of the updates of parameters that have some axes: a rate for each entry.

    Its extra argument `multipliers` has the factors [axes] by the axes' names; without them updates are
    unchanged. It stands after the update rule and its decay: Adam would cancel a factor on gradients.

    Args:
      signatures: of the parameters, by path; nested dicts with these paths.
      axes: the axes' names, separated by spaces: "layer head".
    """

    def scaled(updates: optax.Updates, extra: Mapping[str, Any]) -> optax.Updates:
        factors = extra.get("multipliers", {}).get(axes)
        if factors is None:
            return updates

        def one(signature: Signature, update: jax.Array) -> jax.Array:
            return update * over_axes(factors, axes, signature).astype(update.dtype)

        return by_signature(signatures, one, updates)

    def label(signature: Signature) -> str:
        return "scaled" if covers(signature, axes) else "unscaled"

    return optax.multi_transform(
        {"scaled": _with_arguments(scaled), "unscaled": optax.identity()},
        _labels(signatures, label),
    )


def by_signature(
    signatures: Mapping[str, Signature], rule: Callable[[Signature, Any], Any], tree: Any
) -> Any:
    """Return `rule` of the signature and the leaf of each parameter; masked ones are left out."""

    def one(path: tuple, leaf: Any) -> Any:
        masked = isinstance(leaf, optax.MaskedNode)
        return leaf if masked else rule(signatures[parameter_path(path)], leaf)

    return jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode)
    )


def scale_by_learning_rate_argument() -> optax.GradientTransformationExtraArgs:
    """Return a transform multiplying updates by minus the extra argument `learning_rate`."""

    def scaled(updates: optax.Updates, extra: Mapping[str, Any]) -> optax.Updates:
        rate = extra["learning_rate"]
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates)

    return _with_arguments(scaled)


def _with_arguments(
    rule: Callable[[optax.Updates, Mapping[str, Any]], optax.Updates],
) -> optax.GradientTransformationExtraArgs:
    """Return a transform without state from a function of updates and `update`'s extra arguments."""

    def init(params: optax.Params) -> optax.OptState:
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return rule(updates, extra), state

    return optax.GradientTransformationExtraArgs(init, update)


def _group(signature: Signature) -> str:
    if not signature.is_matrix:
        return "vector"
    return "index" if INDEX_AXES & set(signature.axes) else "hidden"


def _rule(
    settings: OptimizerSettings, group: str, signatures: Mapping[str, Signature]
) -> optax.GradientTransformation:
    if settings.optimizer == "muon" and group == "hidden":
        scaling = _muon(settings, signatures)
    else:
        scaling = _scaling(settings)
    decay = [] if group == "vector" else [optax.add_decayed_weights(settings.weight_decay)]
    return optax.chain(scaling, *decay)


def _scaling(settings: OptimizerSettings) -> optax.GradientTransformation:
    match settings.optimizer:
        case "adamw" | "muon":
            return optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)
        case "lion":
            return optax.scale_by_lion(settings.beta1, settings.beta2)
        case "sgd":
            return optax.trace(settings.beta1) if settings.beta1 else optax.identity()
        case "adafactor":
            # Shazeer & Stern 2018 (arXiv 1804.04235) without relative step sizes: the schedule decides.
            return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        case unknown:
            raise AssertionError(unknown)


def _muon(
    settings: OptimizerSettings, signatures: Mapping[str, Signature]
) -> optax.GradientTransformation:
    """Return muon (Jordan et al. 2024) over whole matrices, each stacked layer by itself."""

    def dimension_numbers(signature: Signature, _: jax.Array) -> MuonDimensionNumbers:
        consumed, produced = signature.matrix_dimensions
        return MuonDimensionNumbers(consumed, produced)

    def scaled(updates: optax.Updates, extra: Mapping[str, Any]) -> optax.Updates:
        heads = extra.get("multipliers", {}).get(HEAD_AXES)
        n_open = None if heads is None else (heads > 0).sum(axis=-1)

        def one(signature: Signature, update: jax.Array) -> jax.Array:
            return update * _muon_scale(signature, update, n_open)

        return by_signature(signatures, one, updates)

    return optax.chain(
        scale_by_muon(
            beta=settings.beta1,
            weight_dimension_numbers=lambda updates: by_signature(
                signatures, dimension_numbers, updates
            ),
        ),
        _with_arguments(scaled),
    )


def _muon_scale(
    signature: Signature, update: jax.Array, n_open: jax.Array | None
) -> jax.Array | float:
    """Return what gives an orthogonal update Adam's usual size.

    Args:
      signature: of the matrix.
      update: of its shape.
      n_open: int [layer], how many heads count; None: all.
    """
    sizes = [math.prod(update.shape[d] for d in part) for part in signature.matrix_dimensions]
    if n_open is None or not covers(signature, HEAD_AXES):
        return _MUON_RMS * math.sqrt(max(sizes))
    head = signature.axes.index("head")
    with_heads = head in signature.matrix_dimensions[1]
    per_head = sizes[with_heads] / update.shape[head]
    size = jnp.maximum(sizes[not with_heads], per_head * n_open).astype(update.dtype)
    return _MUON_RMS * over_axes(jnp.sqrt(size), "layer", signature)


def plateau_transform(settings: OptimizerSettings) -> optax.GradientTransformationExtraArgs:
    """Return optax's reduce_on_plateau, to update with one validation loss per evaluation."""
    return optax.contrib.reduce_on_plateau(
        factor=settings.plateau_factor,
        patience=settings.plateau_patience,
        min_scale=settings.min_lr_ratio,
    )


def global_norm(gradients: optax.Updates) -> jax.Array:
    """Return the Euclidean norm over all leaves, summed in float32 or wider."""
    squares = [
        jnp.sum(jnp.square(g.astype(wide_dtype(g.dtype)))) for g in jax.tree.leaves(gradients)
    ]
    return jnp.sqrt(sum(squares[1:], squares[0]))
