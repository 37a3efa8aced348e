"""Every operation with a value, options and what the documentation says becomes of the moments."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from jaxmorph.model.architecture import RANK_AXES
from jaxmorph.model.signatures import Role, Signature

VOCABULARY, LAYERS, WIDTH, HEADS, HIDDEN, CONTEXT, RANK, BATCH = 12, 2, 8, 2, 16, 8, 4, 4
_SMALL = [
    *("--n_layers", str(LAYERS), "--d_model", str(WIDTH), "--n_heads", str(HEADS)),
    *("--d_ff", str(HIDDEN), "--seq_len", str(CONTEXT), "--batch_size", str(BATCH)),
    *("--scan_layers", "scan", "--attn_lora_rank_divisor", str(WIDTH // RANK)),
    *("--vocab_lora_rank_divisor", str(WIDTH // RANK), "--max_steps", "100"),
    # A clipped gradient depends on the norm of all of it, which duplicates change.
    *("--learning_rate", "1e-2", "--warmup_steps", "2", "--grad_clip", "0"),
]
BASES = {
    "trained": [*_SMALL, "--lora_base", "trained"],
    "frozen": [
        *(*_SMALL, "--lora_base", "frozen", "--positions", "rotary", "--norm", "rmsnorm"),
        *("--activation", "swiglu", "--no_biases", "--no_tied_head"),
    ],
}
Policy = Literal[
    "shared", "mean share", "copied", "begun", "silent", "masked", "renewed", "regrown"
]  # fmt: skip
# Layer and head of the one that is closed in every base, before an operation.
CLOSED = (1, 1)


@dataclass(frozen=True)
class Tuning:
    """A hyperparameter operation.

    Args:
      name: of the operation.
      value: it takes.
      leaves: what it sets, leaf of the state -> value; every other leaf stays as it is.
      fields: what it sets in the run's shape.
      options: of the operation.
      gate: what it sets the gates of heads to, and the logit of that gate.
      heads: those heads, layer and head; None: as the operation says.
    """

    name: str
    value: float | int | None
    leaves: dict[str, float] = field(default_factory=dict)
    fields: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    gate: tuple[float, float] | None = None
    heads: list[tuple[int, int]] | None = None

    @property
    def label(self) -> str:
        """A name for it that no other case has."""
        return " ".join([self.name, *map(str, self.options.values())])


@dataclass(frozen=True)
class Morph:
    """A morph, with what becomes of the moments of a leaf that has the axis.

    Args:
      name: of the operation.
      value: it takes.
      axis: it changes.
      source: where each entry of the axis comes from; -1: nowhere.
      policy: `shared`: all moments are those of the new net's own gradients; `mean share`: of what
        consumes the axis they are, what produces it has those it copies times their mean share;
        `copied`: those it copies, times their share where it produces the axis, and other leaves
        have what they had; `begun`: fresh ones where there is no source, gradients' elsewhere;
        `silent`: of new layers copied, but fresh of what adds to the residual stream; `masked`: of
        new layers copied; `renewed`: all fresh; `regrown`: fresh ones of the closed head, gradients'
        elsewhere.
      fresh_nu: second moments of fresh entries in means of their leaf's, of what produces the axis
        and of what consumes it.
      options: of the operation.
      base: of BASES.
      mesh: two devices, where it is done on them too.
      closing: heads, layer and head, that are closed right before it.
    """

    name: str
    value: Any
    axis: str
    source: list[int]
    policy: Policy
    fresh_nu: tuple[float, float] = (1.0, 1.0)
    options: dict[str, Any] = field(default_factory=dict)
    base: str = "trained"
    mesh: str = ""
    closing: list[tuple[int, int]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """A name for it that no other case has."""
        words = [self.name, *map(str, self.options.values())]
        words += [] if self.value is None else [str(self.value)]
        return " ".join(words + ([] if self.base == "trained" else [self.base]))


STEPS_BEFORE = 6  # of training, before an operation
TUNINGS = [
    Tuning("change_lr", 0.5, {"variables/lr_multiplier": 0.5}, {"lr_multiplier": 0.5}),
    Tuning("set_lr", 2.5e-3, {"variables/lr_multiplier": 0.25}, {"lr_multiplier": 0.25}),
    Tuning("change_batch_size", 2, {}, {"batch_size": 2 * BATCH}),
    Tuning("set_batch_size", 2 * BATCH, {}, {"batch_size": 2 * BATCH}),
    Tuning("change_grad_accum", 3, {}, {"grad_accum_steps": 3}),
    Tuning("set_grad_accum", 2, {}, {"grad_accum_steps": 2}),
    Tuning("reset_lr_schedule", None, {"variables/schedule_start": STEPS_BEFORE}, {}),
    Tuning("change_warmup_iters", 4, {"variables/warmup_steps": 8}, {"warmup_steps": 8}),
    Tuning("set_warmup_iters", 9, {"variables/warmup_steps": 9}, {"warmup_steps": 9}),
    Tuning("change_eval_iters", 0.25, {}, {"eval_iters": 5}),
    Tuning("set_eval_iters", 3, {}, {"eval_iters": 3}),
    Tuning("change_eval_interval", 0.5, {}, {"eval_interval": 125}),
    Tuning("set_eval_interval", 10, {}, {"eval_interval": 10}),
    Tuning("change_lora_alpha", 0.5, {"variables/lora_alpha": 8.0}, {"lora_alpha": 8.0}),
    Tuning("set_lora_alpha", 4.0, {"variables/lora_alpha": 4.0}, {"lora_alpha": 4.0}),
    Tuning("set_gates", 0.5, gate=(0.5, 0.0), heads=[(0, 0), (0, 1), (1, 0), (1, 1)]),
    Tuning("set_gates", 0.1, options={"heads": [[0, 1], [1, 1]]}, gate=(0.1, np.log(1 / 9)),
           heads=[(0, 1), (1, 1)]),
    Tuning("prune_heads", 1, options={"by": "listed", "heads": [[1, 1], [0, 1]]}, gate=(0, -3),
           heads=[(0, 1)]),
    Tuning("prune_heads", 0.5, options={"by": "random"}, gate=(0, -3)),
    Tuning("prune_heads", 0.5, options={"by": "importance"}, gate=(0, -3)),
]  # fmt: skip


def _begun(old: int, new: int) -> list[int]:
    return [*range(old), *[-1] * (new - old)]


def _again(old: int, new: int) -> list[int]:
    return [entry % old for entry in range(new)]


_HERE = [*range(HEADS)]
_DEEP, _WIDE, _SPREAD = _again(LAYERS, 4), _again(HIDDEN, 24), _again(HEADS, 3)
_LARGER, _SMALLER = _begun(RANK, 6), [-1] * 2
# The gradient of B falls and rises with alpha / rank; where the rank shrinks, A is as long as it was
# and B has the other half of the factor.
_LARGER_NU, _SMALLER_NU = (1.0, (4 / 6) ** 2), (2.0, 4.0)
_ATTN, _VOCAB = "decrease_attn_lora_scaling", "decrease_vocab_lora_scaling"
MORPHS = [
    Morph("stack_layers", 2, "layer", _DEEP, "copied", mesh="tensor=2"),
    Morph("stack_layers", 2, "layer", _DEEP, "silent", options={"recipe": "identity"}),
    Morph("stack_layers", 2, "layer", [0, 0, 1, 1], "masked",
          options={"recipe": "masked", "order": "interleave", "anneal_steps": 4}),
    Morph("stack_layers", [0, 1, 1], "layer", [0, 1, 1], "copied"),
    Morph("set_n_layers", 3, "layer", _again(LAYERS, 3), "silent", mesh="fsdp=2",
          options={"recipe": "identity"}),
    Morph("widen_mlp", 1.5, "mlp", _WIDE, "mean share", mesh="tensor=2"),
    Morph("set_d_ff", 24, "mlp", _WIDE, "shared", options={"recipe": "even"}, mesh="tensor=2"),
    Morph("widen_mlp", 1.5, "mlp", _WIDE, "shared", options={"recipe": "even"}),
    Morph("widen_mlp", 1.5, "mlp", _WIDE, "copied", options={"recipe": "noise", "noise": 0.5}),
    Morph("widen_mlp", 1.5, "mlp", _begun(HIDDEN, 24), "begun", options={"recipe": "fresh"}),
    Morph("widen_heads", 1.5, "head", _SPREAD, "mean share", mesh="tensor=2"),
    Morph("widen_heads", 1.5, "head", _SPREAD, "shared", options={"recipe": "even"}),
    Morph("widen_heads", 1.5, "head", _SPREAD, "copied",
          options={"recipe": "noise", "noise": 0.5}),
    Morph("widen_heads", 1.5, "head", _begun(HEADS, 3), "begun", options={"recipe": "fresh"}),
    Morph("regrow_heads", 1, "head", _HERE, "regrown", options={"by": "random"}, mesh="tensor=2"),
    Morph("regrow_heads", 0.5, "head", _HERE, "regrown", options={"by": "importance"},
          base="frozen"),
    Morph("regrow_heads", 1, "head", _HERE, "regrown", mesh="fsdp=2",
          options={"by": "listed", "heads": [[0, 0], [1, 1]], "weights": "kept"}),
    Morph("remove_heads", None, "head", [0], "copied", mesh="fsdp=2", closing=[(0, 1), (1, 0)]),
    Morph("set_n_heads", 3, "head", _SPREAD, "shared", options={"recipe": "even"}, mesh="fsdp=2"),
    Morph("widen_embed", 2, "embed", _again(WIDTH, 16), "mean share", mesh="fsdp=2"),
    Morph("set_d_model", 16, "embed", _again(WIDTH, 16), "shared", options={"recipe": "even"},
          mesh="tensor=2"),
    Morph("change_seq_len", 0.5, "position", [*range(4)], "copied", mesh="data=2"),
    Morph("set_seq_len", 4, "position", [*range(4)], "copied", mesh="fsdp=2"),
    Morph("set_seq_len", 12, "position", [], "shared", base="frozen"),
    Morph(_ATTN, 1.5, "attn_rank", _LARGER, "begun", _LARGER_NU, mesh="tensor=2"),
    Morph(_ATTN, 0.5, "attn_rank", _SMALLER, "renewed", _SMALLER_NU, base="frozen"),
    Morph(_VOCAB, 1.5, "vocab_rank", _LARGER, "begun", _LARGER_NU, base="frozen"),
    Morph(_VOCAB, 0.5, "vocab_rank", _SMALLER, "renewed", _SMALLER_NU, mesh="tensor=2"),
    Morph("set_attn_lora_rank", 2, "attn_rank", _SMALLER, "renewed", (0.0, 0.0),
          {"merge_first": True}, mesh="tensor=2"),
    Morph("set_vocab_lora_rank", 6, "vocab_rank", _LARGER, "begun", _LARGER_NU, mesh="fsdp=2"),
    Morph("merge_lora_weights", None, "", [-1] * RANK, "renewed", (0.0, 0.0), mesh="fsdp=2"),
    Morph("merge_lora_weights", None, "", [-1] * RANK, "renewed", (0.0, 0.0), base="frozen"),
]  # fmt: skip


def documented_moments(
    case: Morph, signature: Signature, old: np.ndarray, power: int
) -> list[tuple[str, Any, np.ndarray]]:
    """How each part of a leaf's moments came to be: (how, its index, what it holds if not gradients)."""
    everything = (slice(None),)
    axis = next(
        (a for a in signature.axes if a == case.axis or (not case.axis and a in RANK_AXES)), ""
    )
    if not axis or not case.source:
        how = "copied" if case.policy == "copied" or _loses(case) else "gradient"
        return [(how, everything, old)]
    at, role, parts = signature.axes.index(axis), signature.role(axis), []
    source = np.asarray(case.source)
    if case.policy == "regrown":
        return _regrown(old, power, signature, exact="kept" not in case.options.values())
    for entry, origin in enumerate(source):
        part = (slice(None),) * at + (entry,)
        repeats = (source == origin).sum()
        copied = old[(slice(None),) * at + (max(origin, 0),)]
        share = 1 / repeats if role is Role.PRODUCED else 1.0
        how = _how(case, signature, origin, entry in np.unique(source, return_index=True)[1])
        if how == "fresh":
            start = _start(case, signature, old, at, origin, power)
            parts.append((how, part, np.broadcast_to(start, copied.shape)))
        else:
            parts.append((how, part, copied * share**power))
    return parts


def _regrown(
    old: np.ndarray, power: int, signature: Signature, exact: bool
) -> list[tuple[str, Any, np.ndarray]]:
    """The moments of a leaf with a head axis, where the only closed head of layer 1 opens."""
    layer, closed = CLOSED
    at, parts = signature.axes.index("head"), []
    for place in np.ndindex(LAYERS, HEADS):
        part = (place[0], *(slice(None),) * (at - 1), place[1])
        neighbour = (layer, *(slice(None),) * (at - 1), 1 - closed)
        mean = old[neighbour].mean() if power == 2 else 0.0
        fresh = ("fresh", part, np.full(old[part].shape, mean))
        parts.append(
            fresh if place == CLOSED else ("gradient" if exact else "copied", part, old[part])
        )
    return parts


def heads_after(
    case: Tuning | Morph, gates: np.ndarray, status: np.ndarray, acted_on: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The gates and the status [layer, head] right after an operation, as the documentation says."""
    gates, status = gates.copy(), status.copy()
    if isinstance(case, Tuning):
        if case.gate is not None:
            for head in acted_on:
                gates[head] = case.gate[0]
        return gates, status
    if case.axis in ("layer", "head"):
        at, source = ("layer", "head").index(case.axis), np.asarray(case.source)
        fresh = [slice(None)] * at + [source < 0]
        gates, status = (np.take(array, source, at) for array in (gates, status))
        gates[tuple(fresh)], status[tuple(fresh)] = 1, -1
    if case.policy == "silent":  # new layers whose output begins at zero: what was open opens anew
        opens = np.zeros(gates.shape, bool)
        opens[LAYERS:] = gates[LAYERS:] >= 0.2
        status[opens] = -1
    if case.policy == "regrown":
        gates[CLOSED], status[CLOSED] = 1, -1
    return gates, status


def closed_before(case: Tuning | Morph, gates: np.ndarray) -> np.ndarray:
    """Which heads after an operation, bool [layer, head], are or copy one that was closed before it."""
    closed = gates <= 0.1
    if isinstance(case, Morph) and case.axis in ("layer", "head"):
        at, source = ("layer", "head").index(case.axis), np.asarray(case.source)
        closed = np.take(closed, source, at)
        closed[tuple([slice(None)] * at + [source < 0])] = False
    return np.zeros_like(closed) if opens_heads(case) else closed


def opens_heads(case: Tuning | Morph) -> bool:
    """Whether it opens the closed head of its base."""
    gate = case.gate[0] if isinstance(case, Tuning) and case.gate else 0
    return case.name == "regrow_heads" or gate > 0.1


def _loses(case: Morph) -> bool:
    """Whether it is a smaller rank, which cannot keep the function."""
    merged = case.value is None or case.options.get("merge_first")
    return case.policy == "renewed" and not merged


def _how(case: Morph, signature: Signature, origin: int, first: bool) -> str:
    match case.policy:
        case "shared":
            return "gradient"
        case "mean share":
            produced = signature.role(case.axis) is Role.PRODUCED
            return "copied" if produced else "gradient"
        case "copied":
            return "copied"
        case "begun" | "renewed":
            return "fresh" if origin < 0 else "gradient"
        case "silent":
            fresh = signature.adds_to_residual
            return "gradient" if first else "fresh" if fresh else "copied"
        case "masked" | "regrown":
            return "gradient" if first else "copied"


def _start(
    case: Morph, signature: Signature, old: np.ndarray, at: int, origin: int, power: int
) -> np.ndarray:
    """What the fresh moments of one entry of the axis begin with."""
    if power == 1:
        return np.zeros(())
    if signature.stacked and at == 0:
        return old[origin].mean() * case.fresh_nu[0]
    consumed = signature.role(signature.axes[at]) is Role.CONSUMED
    inner = tuple(range(len(signature.stacked), old.ndim))
    mean = old.mean(inner, keepdims=True).squeeze(at) * case.fresh_nu[consumed]
    return mean
