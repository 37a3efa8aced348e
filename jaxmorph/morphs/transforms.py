"""What each optax transform keeps in its state, and what it makes of the gradients it is given.

If a change of shape preserves the function and scales an entry's gradient g to c·g, statistics linear
in gradients are scaled by c and quadratic ones by c² (after Shen et al. 2022, arXiv 2203.06211, who
grow moments along with weights). Which is which does not follow from a field's name: adamax's `nu` is
linear, adopt's `mu` holds updates, and a trace holds whatever comes before it in the chain. So a
transform is known by its name, with the state it is expected to have, and its input by its place.

Absolute sizes count as gradients of their own unit: epsilons, clipping thresholds and, but for
adagrad's, initial accumulators. A moved state is that of an optimizer whose sizes scale along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KEEP = "keep"  # unchanged by any change of shape
PARAMETER = "parameter"  # holds weights, and changes as they do


@dataclass(frozen=True)
class Power:
    """A field that holds a power of the gradients, entry by entry.

    Args:
      of_gradient: the power; in TRANSFORMS a multiple of that of the transform's input.
      mean: fresh entries start at their leaf's mean instead of zero.
      added: it began at a value that stays in it, rather than at one that decays.
    """

    of_gradient: float
    mean: bool = False
    added: bool = False


Rule = Power | str  # or KEEP, or PARAMETER


@dataclass(frozen=True)
class Transform:
    """A known transform.

    Args:
      states: names of the types its state may have.
      fields: how each field of its state moves; fields that are left out cannot be moved.
      output: the power of the gradient in its output, as a multiple of its input's; or why the
        output is no power of it, entry by entry.
      refused: why its state cannot be moved, "" if it can.
    """

    states: tuple[str, ...]
    fields: Mapping[str, Rule]
    output: float | str
    refused: str = ""


@dataclass(frozen=True)
class Wrapper:
    """A transform around others.

    Args:
      inner: the state of each inner transform, as a field of its own or "" for the same state, by the
        name under which its update knows the transform.
      fields: how the other fields of its state move.
      output: `INNER`, the inner one's; `EITHER`, that or its input; or why it is neither.
    """

    inner: Mapping[str, str]
    fields: Mapping[str, Rule] = field(default_factory=dict)
    output: str = "inner"


INNER, EITHER = "inner", "either"
FIRST, SECOND, SIZE = Power(1), Power(2, mean=True), Power(1, mean=True)
UPDATE, STEP = Power(0), Power(0, mean=True)
_NORMS = "scales by norms of whole arrays"
_WEIGHTS = "adds weights to gradients"
_GLOBAL = "its state sums over all parameters"


def _kept(*names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, KEEP)


def _stateless(output: float | str) -> Transform:
    return Transform(("EmptyState",), {}, output)


def _refused(why: str, output: float | str = "has a state that cannot be moved") -> Transform:
    return Transform((), {}, output, why)


_ADAM: dict[str, Rule] = {"count": KEEP, "mu": FIRST, "nu": SECOND}

TRANSFORMS: dict[str, Transform] = {
    # Stateless, or without a state per parameter.
    **dict.fromkeys(("identity", "scale", "set_to_zero"), _stateless(1)),
    **dict.fromkeys(("clip", "clip_by_global_norm", "clip_by_block_rms"), _stateless(1)),
    "adaptive_grad_clip": _stateless(1),
    "jaxmorph.step.optimizer.scale_by_learning_rate_argument": _stateless(1),
    "scale_by_sign": _stateless(0),
    "scale_by_schedule": Transform(("ScaleByScheduleState",), _kept("count"), 1),
    "zero_nans": Transform(("ZeroNansState",), _kept("found_nan"), 1),
    "reduce_on_plateau": Transform(
        ("ReduceLROnPlateauState",),
        _kept("scale", "best_value", "plateau_count", "cooldown_count", "count", "avg_value"),
        1,
    ),
    "add_decayed_weights": Transform(
        ("EmptyState", "WeightDecaySchedule"), _kept("count"), _WEIGHTS
    ),
    "add_noise": Transform(("AddNoiseState",), _kept("count", "rng_key"), "adds noise"),
    "differentially_private_aggregate": Transform(
        ("DifferentiallyPrivateAggregateState",), _kept("rng_key"), "adds noise"
    ),
    "hutchinson_estimator_diag_hessian": Transform(
        ("HutchinsonState",), _kept("key"), "returns second derivatives"
    ),
    "keep_params_nonnegative": _stateless(_WEIGHTS),
    "centralize": _stateless("subtracts means over an array"),
    "scale_by_shape": _stateless("scales by an array's size"),
    **dict.fromkeys(
        ("scale_by_trust_ratio", "scale_by_param_block_norm", "scale_by_param_block_rms"),
        _stateless(_NORMS),
    ),
    **dict.fromkeys(
        ("normalize", "normalize_by_update_norm", "scale_by_polyak"), _stateless(_NORMS)
    ),
    **dict.fromkeys(
        ("stateless", "stateless_with_tree_map"), _stateless("applies a function of its own")
    ),
    # Momentum.
    "trace": Transform(("TraceState",), {"trace": FIRST}, 1),
    "ema": Transform(("EmaState",), {"count": KEEP, "ema": FIRST}, 1),
    "apply_every": Transform(("ApplyEvery",), {"count": KEEP, "grad_acc": FIRST}, 1),
    "scale_by_optimistic_gradient": Transform(
        ("ScaleByOptimisticGradientState",),
        {"is_initial_step": KEEP, "previous_gradient": FIRST},
        1,
    ),
    # Normalised by their own moments.
    "scale_by_adam": Transform(("ScaleByAdamState",), _ADAM, 0),
    "scale_by_yogi": Transform(("ScaleByAdamState",), _ADAM, 0),
    "scale_by_radam": Transform(("ScaleByAdamState",), _ADAM, "normalises some steps, others not"),
    "scale_by_adamax": Transform(("ScaleByAdamState",), {**_ADAM, "nu": SIZE}, 0),
    "scale_by_adopt": Transform(("ScaleByAdamState",), {**_ADAM, "mu": UPDATE}, 0),
    "scale_by_belief": Transform(("ScaleByBeliefState",), _ADAM, 0),
    "scale_by_acprop": Transform(
        ("ScaleByBeliefState",), _ADAM, "divides all gradients but the first by their size"
    ),
    "scale_by_amsgrad": Transform(("ScaleByAmsgradState",), {**_ADAM, "nu_max": SECOND}, 0),
    "scale_by_adan": Transform(
        ("ScaleByAdanState",), {"t": KEEP, "m": FIRST, "v": FIRST, "n": SECOND, "g": FIRST}, 0
    ),
    "scale_by_ademamix": Transform(
        ("ScaleByAdemamixState",),
        {**_kept("count", "count_m2"), "m1": FIRST, "m2": FIRST, "nu": SECOND},
        0,
    ),
    "scale_by_simplified_ademamix": Transform(
        ("ScaleBySimplifiedAdEMAMixState",), {"t": KEEP, "m": FIRST, "n": SECOND}, 0
    ),
    "scale_by_rms": Transform(
        ("ScaleByRmsState", "ScaleByRmsWithCountState"), {"count": KEEP, "nu": SECOND}, 0
    ),
    "scale_by_stddev": Transform(("ScaleByRStdDevState", "ScaleByRStdDevWithCountState"), _ADAM, 0),
    "scale_by_rss": Transform(
        ("ScaleByRssState",), {"sum_of_squares": Power(2, mean=True, added=True)}, 0
    ),
    "scale_by_adadelta": Transform(("ScaleByAdaDeltaState",), {"e_g": SECOND, "e_x": STEP}, 0),
    "scale_by_rprop": Transform(
        ("ScaleByRpropState",), {"step_sizes": STEP, "prev_updates": UPDATE}, 0
    ),
    "scale_by_factored_rms": Transform(
        ("FactoredState",), {"count": KEEP, **dict.fromkeys(("v_row", "v_col", "v"), SECOND)}, 0
    ),
    # Whose updates mix entries, or are a function of the gradient that is no power.
    "scale_by_lion": Transform(("ScaleByLionState",), {"count": KEEP, "mu": FIRST}, 0),
    "scale_by_muon": Transform(
        ("MuonState",), {**_kept("count", "ns_coeffs"), "mu": FIRST}, "mixes a matrix's entries"
    ),
    "scale_by_madgrad": Transform(
        ("MadgradState",),
        {"count": KEEP, "grad_sum_sq": SECOND, "s": FIRST, "x0": PARAMETER},
        _WEIGHTS,
    ),
    # Refused.
    "scale_by_novograd": _refused("it keeps one second moment per array, which cannot be split"),
    "scale_by_sm3": _refused("it keeps bounds per index of an array, not each entry's own"),
    "scale_by_galore": _refused("its moments are of a projection of the gradients"),
    "scale_by_sophia": _refused("its second derivatives are no power of the gradient"),
    "scale_by_cocob": _refused("its reward is a product of gradients and weights"),
    "scale_by_distance_over_gradients": _refused("it keeps norms of whole arrays"),
    **dict.fromkeys(("scale_by_dog", "scale_by_dowg", "dadapt_adamw"), _refused(_GLOBAL)),
    **dict.fromkeys(("prodigy", "momo", "momo_adam", "mechanize"), _refused(_GLOBAL)),
    **dict.fromkeys(("scale_by_lbfgs", "scale_by_backtracking_linesearch"), _refused(_GLOBAL)),
    "scale_by_zoom_linesearch": _refused(_GLOBAL),
    "flatten": _refused("it flattens all parameters into one array"),
    **dict.fromkeys(("snapshot", "monitor"), _refused("what it measures may have any shape", 1)),
}

_ANY_WEIGHTS = "returns changes of averaged weights"
WRAPPERS: dict[str, Wrapper] = {
    "with_extra_args_support": Wrapper({"tx": ""}),
    "jaxmorph.step.optimizer.of_trained_part": Wrapper({"inner": ""}),
    "masked": Wrapper({"inner": "inner_state"}, {}, EITHER),
    "apply_if_finite": Wrapper(
        {"inner": "inner_state"}, _kept("notfinite_count", "last_finite", "total_notfinite")
    ),
    "conditionally_transform": Wrapper({"inner": "inner_state"}, _kept("step"), EITHER),
    "conditionally_mask": Wrapper({"inner": "inner_state"}, _kept("step")),
    "split_real_and_imaginary": Wrapper({"inner": "inner_state"}),
    "inject_hyperparams": Wrapper(
        {"inner": "inner_state"}, _kept("count", "hyperparams", "hyperparams_states")
    ),
    "MultiSteps": Wrapper(
        {"inner": "inner_opt_state"},
        {**_kept("mini_step", "gradient_step", "skip_state"), "acc_grads": FIRST},
    ),
    "lookahead": Wrapper({"fast_optimizer": "fast_state"}, _kept("steps_since_sync"), _ANY_WEIGHTS),
    "schedule_free": Wrapper(
        {"base_optimizer": "base_optimizer_state"},
        {**_kept("b1", "weight_sum", "step_count", "max_lr"), "z": PARAMETER},
        _ANY_WEIGHTS,
    ),
    "sam": Wrapper(
        {"optimizer": "opt_state", "adv_optimizer": "adv_state"},
        {"steps_since_sync": KEEP, "cache": PARAMETER},
        _ANY_WEIGHTS,
    ),
}
