"""Every public transform of optax: its moved state is proven by a replay, or it is refused by name.

The oracle does without the package: a small and a wide tree are updated from step 0, the wide one with
the small one's gradients, mapped entry by entry. What is moved after some steps must equal the wide
state then, in float64 to 1e-12.
"""

import functools
import inspect
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib as contrib
import pytest

from jaxmorph import morphs
from jaxmorph.cli.errors import InputError

TABLE = {
    "inner/kernel": "pixels -> hidden",
    "gain": "*> hidden",
    "outer/kernel": "hidden -> classes",
}
STEPS = 3
UNEVEN, DOUBLED = np.arange(15) % 6, np.arange(12) % 6  # three copies of some units, two of others
apply: Any = morphs.apply


def _tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    return {
        "inner": {"kernel": draw(5, 6)},
        "gain": draw(6),
        "outer": {"kernel": draw(6, 3)},
    }


def _mapped(tree: Any, source: np.ndarray, *, weights: bool = False) -> Any:
    """A tree of gradients, or of weights, of the wide network."""
    share = 1 / np.bincount(source)[source]
    made, used = (1, share[:, None]) if weights else (share, 1)
    tree = jax.tree.map(np.asarray, tree)
    wide = {
        "inner": {"kernel": tree["inner"]["kernel"][:, source] * made},
        "gain": tree["gain"][source] * made,
        "outer": {"kernel": tree["outer"]["kernel"][source] * used},
    }
    return jax.tree.map(jnp.asarray, wide)


def _plainly(optimizer, gradient, state, params) -> Any:
    return optimizer.update(gradient, state, params)[1]


def _with_value(optimizer, gradient, state, params) -> Any:
    return optimizer.update(gradient, state, params, value=jnp.asarray(1.5))[1]


def _with_objective(optimizer, gradient, state, params) -> Any:
    objective = lambda p: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))  # noqa: E731
    return optimizer.update(gradient, state, params, obj_fn=objective)[1]


def _as_pair(optimizer, gradient, state, params) -> Any:
    return optimizer.update(gradient, state, optax.LookaheadParams(params, params))[1]


def _per_example(optimizer, gradient, state, params) -> Any:
    return optimizer.update(jax.tree.map(lambda g: g[None], gradient), state, params)[1]


def _matrices(params) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _groups(params) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params)


def _reducing(tree) -> Any:
    return optax.tree.norm(tree)


# Without epsilons, so that updates do not depend on the gradient's scale.
ADAM, MOMENTUM = optax.adam(0.1, eps=0.0), optax.sgd(0.1, momentum=0.9)
SCALE_BY_ADAM, SCALE_BY_RMS = optax.scale_by_adam(eps=0.0), optax.scale_by_rms(eps=0.0)
MULTI_STEPS = partial(optax.MultiSteps, accumulator_dtype="float64")
GROUPED: Any = {"matrix": ADAM, "vector": MOMENTUM}
FROZEN = {"inner": {"kernel": True}, "gain": False, "outer": {"kernel": False}}
LATER: Any = lambda step: step > 1  # noqa: E731
SCHEDULE = optax.linear_schedule(0.1, 0.01, 9)
ADAFACTOR = {"min_dim_size_to_factor": 2, "multiply_by_parameter_scale": False}

# By public name, one factory for each variant.
SUPPORTED: dict[str, list[Any]] = {
    "adabelief": [partial(optax.adabelief, 0.1), partial(optax.adabelief, 0.1, nesterov=True)],
    "adadelta": [partial(optax.adadelta, 0.1, eps=1e-60)],
    "adafactor": [
        partial(optax.adafactor, 0.1, **ADAFACTOR),
        partial(optax.adafactor, 0.1, **ADAFACTOR, momentum=0.9),
        partial(optax.adafactor, 0.1, momentum=0.9, multiply_by_parameter_scale=False),
        partial(optax.adafactor, 0.1),
    ],
    "adagrad": [partial(optax.adagrad, 0.1), partial(optax.adagrad, 0.1, 0.0)],
    "adam": [partial(optax.adam, 0.1), partial(optax.adam, SCHEDULE, nesterov=True)],
    "adamax": [partial(optax.adamax, 0.1, eps=0.0)],
    "adamaxw": [partial(optax.adamaxw, 0.1, eps=0.0)],
    "adamw": [
        partial(optax.adamw, 0.1), partial(optax.adamw, 0.1, weight_decay=SCHEDULE, mask=_matrices)
    ],
    "adan": [partial(optax.adan, 0.1)],
    "adaptive_grad_clip": [lambda: optax.chain(optax.adaptive_grad_clip(1e9), ADAM)],
    "add_decayed_weights": [
        lambda: optax.chain(ADAM, optax.add_decayed_weights(0.1)),
        lambda: optax.chain(optax.add_decayed_weights(0.0), MOMENTUM),
    ],
    "add_noise": [partial(optax.add_noise, 0.1, 0.5, 7)],
    "amsgrad": [partial(optax.amsgrad, 0.1), partial(optax.amsgrad, 0.1, bias_correction_nu=False)],
    "apply_every": [lambda: optax.chain(optax.apply_every(2), MOMENTUM)],
    "apply_if_finite": [lambda: optax.chain(optax.apply_if_finite(ADAM, 3), optax.trace(0.5))],
    "centralize": [optax.centralize],
    "chain": [
        lambda: optax.chain(optax.trace(0.9), optax.chain(SCALE_BY_ADAM), optax.trace(0.5)),
        lambda: optax.chain(optax.scale_by_sign(), optax.trace(0.9), optax.scale_by_adam()),
    ],
    "clip": [lambda: optax.chain(optax.clip(1e9), ADAM)],
    "clip_by_block_rms": [lambda: optax.chain(optax.clip_by_block_rms(1e9), ADAM)],
    "clip_by_global_norm": [lambda: optax.chain(optax.clip_by_global_norm(1e9), ADAM)],
    "conditionally_mask": [lambda: optax.conditionally_mask(ADAM, LATER)],
    "conditionally_transform": [lambda: optax.conditionally_transform(ADAM, LATER)],
    "ema": [lambda: optax.ema(0.9), lambda: optax.chain(SCALE_BY_ADAM, optax.ema(0.9))],
    "freeze": [lambda: optax.chain(optax.freeze(FROZEN), ADAM)],
    "fromage": [partial(optax.fromage, 0.1)],
    "identity": [lambda: optax.chain(optax.identity(), ADAM)],
    "inject_hyperparams": [
        lambda: optax.inject_hyperparams(optax.adamw)(SCHEDULE, b1=0.8),
        lambda: optax.chain(optax.inject_hyperparams(optax.rmsprop)(0.1, eps=0.0, momentum=0.9)),
    ],
    "inject_stateful_hyperparams": [lambda: optax.inject_stateful_hyperparams(optax.adam)(SCHEDULE)],
    "keep_params_nonnegative": [lambda: optax.chain(ADAM, optax.keep_params_nonnegative())],
    "lamb": [partial(optax.lamb, 0.1)],
    "lion": [partial(optax.lion, 0.1)],
    "lookahead": [lambda: optax.lookahead(ADAM, 2, 0.5)],
    "masked": [lambda: optax.masked(ADAM, _matrices)],
    "multi_transform": [lambda: optax.multi_transform(GROUPED, _groups)],
    "nadam": [partial(optax.nadam, 0.1)],
    "nadamw": [partial(optax.nadamw, 0.1)],
    "named_chain": [lambda: optax.named_chain(("one", SCALE_BY_ADAM), ("two", optax.trace(0.9)))],
    "noisy_sgd": [partial(optax.noisy_sgd, 0.1, key=3)],
    "normalize_by_update_norm": [optax.normalize_by_update_norm],
    "optimistic_adam": [partial(optax.optimistic_adam, 0.1, eps=0.0)],
    "optimistic_adam_v2": [partial(optax.optimistic_adam_v2, 0.1, eps=0.0)],
    "optimistic_gradient_descent": [partial(optax.optimistic_gradient_descent, 0.1)],
    "partition": [lambda: optax.partition(GROUPED, _groups)],
    "polyak_sgd": [optax.polyak_sgd],
    "radam": [partial(optax.radam, 0.1)],
    "rmsprop": [
        partial(
            optax.rmsprop, 0.1, eps=0.0, centered=centered, momentum=momentum, bias_correction=corrected
        )
        for centered in (False, True) for momentum in (None, 0.9) for corrected in (False, True)
        if not (centered and momentum and corrected)
    ] + [partial(optax.rmsprop, 0.1, initial_scale=0.5)],
    "rprop": [partial(optax.rprop, 0.1)],
    "scale": [lambda: optax.chain(optax.scale(0.5), ADAM)],
    "scale_by_adadelta": [partial(optax.scale_by_adadelta, eps=1e-60)],
    "scale_by_adam": [optax.scale_by_adam],
    "scale_by_adamax": [partial(optax.scale_by_adamax, eps=0.0)],
    "scale_by_adan": [optax.scale_by_adan],
    "scale_by_amsgrad": [optax.scale_by_amsgrad],
    "scale_by_belief": [optax.scale_by_belief],
    "scale_by_factored_rms": [
        partial(optax.scale_by_factored_rms, min_dim_size_to_factor=2),
        lambda: optax.chain(
            optax.scale_by_sign(), optax.scale_by_factored_rms(min_dim_size_to_factor=2)
        ),
    ],
    "scale_by_learning_rate": [lambda: optax.chain(optax.scale_by_learning_rate(SCHEDULE), MOMENTUM)],
    "scale_by_lion": [optax.scale_by_lion, lambda: optax.chain(optax.scale_by_lion(), optax.trace(0.9))],
    "scale_by_optimistic_gradient": [optax.scale_by_optimistic_gradient],
    "scale_by_param_block_norm": [optax.scale_by_param_block_norm],
    "scale_by_param_block_rms": [optax.scale_by_param_block_rms],
    "scale_by_polyak": [optax.scale_by_polyak],
    "scale_by_radam": [optax.scale_by_radam],
    "scale_by_rms": [optax.scale_by_rms, lambda: optax.chain(SCALE_BY_RMS, optax.trace(0.9))],
    "scale_by_rprop": [partial(optax.scale_by_rprop, 0.1)],
    "scale_by_rss": [optax.scale_by_rss],
    "scale_by_schedule": [lambda: optax.chain(optax.scale_by_schedule(SCHEDULE), MOMENTUM)],
    "scale_by_sign": [lambda: optax.chain(optax.scale_by_sign(), MOMENTUM)],
    "scale_by_stddev": [optax.scale_by_stddev],
    "scale_by_trust_ratio": [optax.scale_by_trust_ratio],
    "scale_by_yogi": [partial(optax.scale_by_yogi, initial_accumulator_value=0.0)],
    "selective_transform": [lambda: optax.selective_transform(ADAM, freeze_mask=FROZEN)],
    "set_to_zero": [lambda: optax.chain(optax.set_to_zero(), MOMENTUM)],
    "sgd": [partial(optax.sgd, 0.1), partial(optax.sgd, 0.1, 0.9), partial(optax.sgd, 0.1, 0.9, True)],
    "sign_sgd": [partial(optax.sign_sgd, 0.1)],
    "signum": [partial(optax.signum, 0.1)],
    "stateless": [lambda: optax.chain(ADAM, optax.stateless(lambda updates, params: updates))],
    "stateless_with_tree_map": [
        lambda: optax.chain(ADAM, optax.stateless_with_tree_map(lambda update, param: update))
    ],
    "trace": [partial(optax.trace, 0.9)],
    "with_extra_args_support": [lambda: optax.with_extra_args_support(ADAM)],
    "yogi": [partial(optax.yogi, 0.1)],
    "zero_nans": [lambda: optax.chain(optax.zero_nans(), ADAM)],
    "MultiSteps": [
        partial(MULTI_STEPS, ADAM, 2),
        partial(MULTI_STEPS, ADAM, 2, should_skip_update_fn=optax.skip_not_finite),
        lambda: optax.chain(MULTI_STEPS(ADAM, 2).gradient_transformation(), optax.trace(0.9)),
    ],
    "contrib.acprop": [partial(contrib.acprop, 0.1)],
    "contrib.ademamix": [partial(contrib.ademamix, 0.1)],
    "contrib.adopt": [
        partial(contrib.adopt, 0.1), partial(contrib.adopt, 0.1, use_clipping=False, nesterov=True),
    ],
    "contrib.differentially_private_aggregate": [
        partial(contrib.differentially_private_aggregate, 1e9, 0.0, 3)
    ],
    "contrib.dpsgd": [partial(contrib.dpsgd, 0.1, 1e9, 0.0, 3)],
    "contrib.hutchinson_estimator_diag_hessian": [contrib.hutchinson_estimator_diag_hessian],
    "contrib.madgrad": [partial(contrib.madgrad, 0.1)],
    "contrib.muon": [partial(contrib.muon, 0.1)],
    "contrib.normalize": [contrib.normalize],
    "contrib.reduce_on_plateau": [lambda: optax.chain(contrib.reduce_on_plateau(), MOMENTUM)],
    "contrib.sam": [lambda: contrib.sam(MOMENTUM, optax.chain(contrib.normalize(), optax.sgd(0.1)))],
    "contrib.scale_by_acprop": [contrib.scale_by_acprop],
    "contrib.scale_by_ademamix": [contrib.scale_by_ademamix],
    "contrib.scale_by_adopt": [lambda: optax.chain(contrib.scale_by_adopt(), optax.trace(0.9))],
    "contrib.scale_by_madgrad": [partial(contrib.scale_by_madgrad, 0.1)],
    "contrib.scale_by_muon": [
        lambda: optax.masked(contrib.scale_by_muon(weight_dimension_numbers=_dimensions), _matrices)
    ],
    "contrib.scale_by_simplified_ademamix": [contrib.scale_by_simplified_ademamix],
    "contrib.schedule_free": [lambda: contrib.schedule_free(MOMENTUM, 0.1)],
    "contrib.schedule_free_adamw": [contrib.schedule_free_adamw],
    "contrib.schedule_free_sgd": [contrib.schedule_free_sgd],
    "contrib.simplified_ademamix": [partial(contrib.simplified_ademamix, 0.1)],
    "contrib.split_real_and_imaginary": [lambda: contrib.split_real_and_imaginary(ADAM)],
}  # fmt: skip


def _dimensions(updates) -> Any:
    is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(
        lambda leaf: leaf if is_masked(leaf) else contrib.MuonDimensionNumbers(),
        updates,
        is_leaf=is_masked,
    )


# By public name: an optimizer with it, and what its refusal says.
REFUSED: dict[str, tuple[Any, str]] = {
    "flatten": (lambda: optax.flatten(ADAM), "flatten"),
    "lars": (partial(optax.lars, 0.1), "scale_by_trust_ratio, before it, scales by norms"),
    "lbfgs": (optax.lbfgs, "scale_by_lbfgs"),
    "measure_with_ema": (lambda: optax.measure_with_ema(_reducing, 0.9), "stateless, before it"),
    "monitor": (lambda: optax.monitor({"x": optax.measure_with_ema(_reducing, 0.9)}), "monitor"),
    "novograd": (partial(optax.novograd, 0.1), "scale_by_novograd"),
    "scale_by_backtracking_linesearch": (
        lambda: optax.scale_by_backtracking_linesearch(3), "scale_by_backtracking_linesearch"
    ),
    "scale_by_distance_over_gradients": (
        optax.scale_by_distance_over_gradients, "scale_by_distance_over_gradients"
    ),
    "scale_by_lbfgs": (optax.scale_by_lbfgs, "scale_by_lbfgs"),
    "scale_by_novograd": (optax.scale_by_novograd, "scale_by_novograd"),
    "scale_by_sm3": (optax.scale_by_sm3, "scale_by_sm3"),
    "scale_by_zoom_linesearch": (
        lambda: optax.scale_by_zoom_linesearch(3), "scale_by_zoom_linesearch"
    ),
    "sm3": (partial(optax.sm3, 0.1), "scale_by_sm3"),
    "snapshot": (lambda: optax.snapshot("norm", _reducing), "snapshot"),
    "contrib.cocob": (contrib.cocob, "scale_by_cocob"),
    "contrib.dadapt_adamw": (contrib.dadapt_adamw, "dadapt_adamw"),
    "contrib.dog": (contrib.dog, "scale_by_dog"),
    "contrib.dowg": (contrib.dowg, "scale_by_dowg"),
    "contrib.galore": (partial(contrib.galore, 0.1), "scale_by_galore"),
    "contrib.mechanize": (lambda: contrib.mechanize(MOMENTUM), "mechanize"),
    "contrib.momo": (contrib.momo, "momo"),
    "contrib.momo_adam": (contrib.momo_adam, "momo_adam"),
    "contrib.prodigy": (contrib.prodigy, "prodigy"),
    "contrib.scale_by_cocob": (contrib.scale_by_cocob, "scale_by_cocob"),
    "contrib.scale_by_galore": (contrib.scale_by_galore, "scale_by_galore"),
    "contrib.sophia": (partial(contrib.sophia, 0.1), "scale_by_sophia"),
}  # fmt: skip

# Supported transforms where they must be refused: by what comes before.
OUT_OF_PLACE: dict[str, tuple[Any, str]] = {
    "trace after weight decay": (
        lambda: optax.chain(optax.add_decayed_weights(0.1), MOMENTUM), "add_decayed_weights, before it"
    ),
    "adadelta with weight decay": (partial(optax.adadelta, 0.1, weight_decay=0.1), "adds weights"),
    "weight decay that may change": (
        lambda: optax.inject_hyperparams(optax.adadelta)(0.1, weight_decay=0.0), "adds weights"
    ),
    "trace after acprop": (
        lambda: optax.chain(contrib.scale_by_acprop(), optax.trace(0.9)), "all gradients but the first"
    ),
    "trace after noise": (lambda: optax.chain(optax.add_noise(0.1, 0.5, 7), MOMENTUM), "adds noise"),
    "centered rmsprop, corrected, with momentum": (
        partial(optax.rmsprop, 0.1, centered=True, bias_correction=True, momentum=0.9),
        "scale_by_stddev, before it, divides its first gradient by epsilon",
    ),
    "trace after radam": (lambda: optax.chain(optax.scale_by_radam(), MOMENTUM), "scale_by_radam"),
    "trace after muon": (
        lambda: optax.chain(
            optax.masked(contrib.scale_by_muon(weight_dimension_numbers=_dimensions), _matrices),
            MOMENTUM,
        ),
        "mixes a matrix's entries",
    ),
    "trace after smooth lion": (
        lambda: optax.chain(optax.scale_by_lion(mode="smooth"), MOMENTUM), "scale_by_lion, before it"
    ),
    "adafactor's momentum of scaled updates": (
        partial(optax.adafactor, 0.1, momentum=0.9), "scale_by_param_block_rms, before it"
    ),
    "trace after groups": (
        lambda: optax.chain(optax.partition(GROUPED, _groups), optax.trace(0.9)),
        "in different parameters",
    ),
    "trace after a mask": (
        lambda: optax.chain(optax.masked(ADAM, _matrices), optax.trace(0.9)), "in different parameters"
    ),
    "dpsgd with momentum": (partial(contrib.dpsgd, 0.1, 1.0, 0.0, 3, 0.9), "adds noise"),
    "a function of the user's own": (
        lambda: optax.chain(optax.stateless(lambda updates, _: updates), MOMENTUM),
        "stateless, before it",
    ),
}  # fmt: skip

CALLS = {
    **dict.fromkeys(("polyak_sgd", "scale_by_polyak", "contrib.reduce_on_plateau"), _with_value),
    **dict.fromkeys(("contrib.dpsgd", "contrib.differentially_private_aggregate"), _per_example),
    "contrib.hutchinson_estimator_diag_hessian": _with_objective,
    "lookahead": _as_pair,
}
# Whose accumulators begin at a size of their own, which decays; it scales along, as epsilons do.
BEGINNING_ANYWHERE = ("yogi", "rmsprop")
VARIANTS = [(name, k) for name, makers in SUPPORTED.items() for k in range(len(makers))]


def _made(make: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make()


def _run(
    name: str, optimizer: Any, state: Any, params: Any, source: np.ndarray | None = None
) -> Any:
    call = CALLS.get(name, _plainly)
    for seed in range(1, STEPS + 1):
        gradient = _tree(seed) if source is None else _mapped(_tree(seed), source)
        state = call(optimizer, gradient, state, params)
    return state


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_moved_state_is_that_of_mapped_gradients_from_step_0(name, variant):
    factored = name in ("adafactor", "scale_by_factored_rms")  # exact if all copies share alike
    source = DOUBLED if factored else UNEVEN
    with jax.enable_x64(True):
        optimizer, params = _made(SUPPORTED[name][variant]), _tree(0)
        wide = _mapped(params, source, weights=True)
        change = [morphs.duplicate("hidden", 6, len(source))]
        begun, start = optimizer.init(params), optimizer.init(wide)
        if name in BEGINNING_ANYWHERE:
            start = apply(change, TABLE, params, begun, optimizer)[1]
        state = _run(name, optimizer, begun, params)
        _, moved, _ = apply(change, TABLE, params, state, optimizer)
        expected = _run(name, optimizer, start, wide, source)
        if "schedule_free" in name:  # weights in the state move as weights
            expected = expected._replace(z=_mapped(state.z, source, weights=True))
        assert jax.tree.structure(moved) == jax.tree.structure(expected)
        for (path, got), wanted in zip(
            jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(expected), strict=True
        ):
            _assert_close(jax.tree_util.keystr(path), got, wanted)


def _assert_close(path: str, got: Any, wanted: Any) -> None:
    if jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):
        got, wanted = jax.random.key_data(got), jax.random.key_data(wanted)
    wanted = np.asarray(wanted)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), path
    size = np.abs(wanted).max(initial=0) if wanted.dtype != bool else 0
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12 * size, err_msg=path)


@pytest.mark.parametrize("name", [*REFUSED, *OUT_OF_PLACE])
def test_what_cannot_be_moved_is_refused_by_name(name):
    make, words = (REFUSED | OUT_OF_PLACE)[name]
    params, optimizer = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _tree(0)), _made(make)
    state = optimizer.init(params)
    with pytest.raises(InputError) as error:
        apply([morphs.duplicate("hidden", 6, 12)], TABLE, params, state, optimizer)
    assert words in str(error.value)
    assert "pass fields={" in str(error.value)


def test_every_public_transform_of_optax_is_proven_or_refused():
    """A transform that a later optax adds must be put into one of the tables here."""
    names = {"MultiSteps"}
    for prefix, module in (("", optax), ("contrib.", contrib)):
        for name, value in vars(module).items():
            function = value.func if isinstance(value, partial) else value
            if inspect.isfunction(function) and not name.startswith("_"):
                names |= {prefix + name} if _makes_transforms(function) else set()
    assert names == set(SUPPORTED) | set(REFUSED)


def test_the_readme_lists_what_is_supported():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    listed = text.partition("Supported are, in `optax`, `")[2].partition(
        "Anything else is refused"
    )[0]
    plain, _, rest = listed.partition("`, and in `optax.contrib`")
    ours = re.findall(r"\w+", rest.partition("inside")[0])
    named = {*plain.split(), *(f"contrib.{name}" for name in ours)}
    optimizers = {
        name for name in SUPPORTED if not re.search("scale_by|scale$|_learning_rate$", name)
    }
    rates = ("learning_rate", "max_learning_rate")
    made = {name for name in optimizers if name != "MultiSteps" and _takes(name, rates)}
    assert named == made - {"contrib.schedule_free"}


def _takes(name: str, parameters: tuple[str, ...]) -> bool:
    module = contrib if name.startswith("contrib.") else optax
    function = getattr(module, name.removeprefix("contrib."))
    return bool(set(parameters) & set(inspect.signature(function).parameters))


def _makes_transforms(function: Any) -> bool:
    returns = str(inspect.signature(function).return_annotation)
    if returns != str(inspect.Signature.empty):
        return "GradientTransformation" in returns
    source = inspect.getsource(function)
    return "GradientTransformation" in source or "chain(" in source


def test_a_transform_that_is_not_optax_s_is_not_taken_for_one_by_its_name():
    def scale_by_adam() -> Any:
        inner: Any = optax.scale_by_adam()
        wrapped: Any = lambda *given: inner.update(*given)  # noqa: E731
        return optax.GradientTransformation(inner.init, wrapped)

    params, optimizer = (
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _tree(0)),
        scale_by_adam(),
    )
    state = optimizer.init(params)
    with pytest.raises(InputError, match=r"test_transforms\.\S* is not a known transform"):
        apply([morphs.duplicate("hidden", 6, 12)], TABLE, params, state, optimizer)
    _, moved, _ = apply(
        [morphs.duplicate("hidden", 6, 12)], TABLE, params, state, optimizer, fields={"mu": 1, "nu": 2}
    )  # fmt: skip
    assert moved.mu["gain"].shape == (12,)


def test_a_function_that_bears_optax_s_names_by_wraps_is_not_taken_for_optax_s():
    inner: Any = optax.scale_by_adam()

    @functools.wraps(inner.update)
    def signed(gradients, state, params=None):
        return inner.update(jax.tree.map(jnp.sign, gradients), state, params)

    update: Any = signed
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _tree(0))
    state, change = inner.init(params), [morphs.duplicate("hidden", 6, 12)]
    with pytest.raises(InputError, match=r"test_transforms\.\S* is not a known transform"):
        apply(change, TABLE, params, state, optax.GradientTransformation(inner.init, update))
    compiled = optax.GradientTransformation(inner.init, jax.jit(inner.update))
    assert apply(change, TABLE, params, state, compiled)[1].mu["gain"].shape == (12,)


def test_the_fields_that_a_refusal_asks_for_are_of_the_refused_transform_alone():
    """By name they would also be those of adamax, whose `nu` is linear."""
    inner: Any = optax.scale_by_adam()
    update: Any = lambda *given: inner.update(*given)  # noqa: E731 - typed
    own = optax.GradientTransformation(inner.init, update)
    optimizer = optax.partition({"matrix": own, "vector": optax.scale_by_adamax()}, _groups)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _tree(0))
    state, change = optimizer.init(params), [morphs.duplicate("hidden", 6, 12)]
    state: Any = optimizer.update(params, state, params)[1]
    with pytest.raises(InputError) as error:
        apply(change, TABLE, params, state, optimizer)
    asked = re.findall(r'"([^"]+)": \.\.\.', str(error.value))
    fields = dict(zip(asked, (1, 2), strict=True))
    _, moved, _ = apply(change, TABLE, params, state, optimizer, fields=fields)
    before, after = (each.inner_states["vector"].inner_state.nu["gain"] for each in (state, moved))
    np.testing.assert_allclose(after[:6], before / 2)
