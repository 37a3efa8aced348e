"""The table of scaling operations: the name, value, effect, exactness and cost of each.

An operation is data: a name and a value. Its effect on the sizes of a run is here
(`Operation.next_shape`), so that a whole schedule can be checked without arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxmorph.cli.errors import nearest
from jaxmorph.cli.wording import aligned
from jaxmorph.config.run_shape import OperationError, RunShape
from jaxmorph.config.settings import LARGEST_COUNT, Within
from jaxmorph.growth import changes, heads
from jaxmorph.growth.changes import Change, MultipliedCount, Options
from jaxmorph.growth.decisions import (
    Decided,
    Decision,
    bounds_of_heads,
    fewest_heads,
    kept_heads,
    with_kept_heads,
)
from jaxmorph.growth.values import Option, Value

_MOST = 1e6  # the largest factor allowed


def _kept(before: RunShape, after: RunShape, options: Options) -> bool:
    return True


def _never(before: RunShape, after: RunShape, options: Options) -> bool:
    return False


def _kept_unless_changed(before: RunShape, after: RunShape, options: Options) -> bool:
    return before == after


@dataclass(frozen=True)
class Operation:
    """One operation.

    Args:
      name: its name in a schedule.
      kind: a hyperparameter changes numbers, a morph changes arrays.
      value: the values it accepts.
      effect: what it does, in a sentence.
      change: returns the shape after it, given a checked value and all options.
      keeps: in words, whether it preserves the function, up to rounding.
      exact: the same, for the shapes before and after, and all options.
      loss: what is lost where it does not, and the way to keep it, for a warning; "": no warning.
      recompiles: whether it may need new step and evaluation programs.
      options: by name.
      ranks: names of adapter ranks in ModelConfig; at least one of them must not be 0.
      heads: which attention heads it acts on, chosen when it fires; "": on none in particular.
      decision: what it decides when it fires; before that, `change` is the largest case.
    """

    name: str
    kind: Literal["hyperparameter", "morph"]
    value: Value
    effect: str
    change: Change
    keeps: str = "yes"
    exact: Callable[[RunShape, RunShape, Options], bool] = _kept
    loss: str = ""
    recompiles: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)
    ranks: tuple[str, ...] = ()
    heads: Literal["", "any", "open", "closed"] = ""
    decision: Decision | None = None

    @property
    def count(self) -> str:
        """Return the field of the shape that is multiplied and rounded down; "" for none."""
        return self.change.field if isinstance(self.change, MultipliedCount) else ""

    def check(self, value: Any, options: Options) -> None:
        """Check a value and options, independently of the run's shape.

        Raises:
          OperationError: wrong type, out of range, or an option the operation does not have.
        """
        self.value.check(value, self.name)
        for name, given in options.items():
            if name not in self.options:
                listed = f"one of {', '.join(self.options)}" if self.options else "no options"
                near = nearest(name, self.options)
                raise OperationError(name, f"{listed} of {self.name}{near}", "options")
            self.options[name].check(given, f"options: {name}")
        for name in options:
            self.options[name].check_place(name, value, self.with_defaults(options))

    def with_defaults(self, options: Options) -> dict[str, Any]:
        """Return the value of every option."""
        return {name: options.get(name, known.default) for name, known in self.options.items()}

    def next_shape(
        self, shape: RunShape, value: Any, options: Options, decided: Decided | None = None
    ) -> RunShape:
        """Return the shape of the run after the operation.

        Args:
          shape: the run's before it.
          value: the operation's.
          options: as given.
          decided: what it has decided; None: nothing yet, or it decides nothing.

        Raises:
          OperationError: the operation cannot be applied to this shape with this value.
        """
        self.check(value, options)
        if self.ranks and not any(getattr(shape.model, rank) for rank in self.ranks):
            flags = " or ".join(f"{rank}_divisor" for rank in self.ranks)
            raise OperationError(self.name, f"a model with LoRA adapters ({flags} > 0)", "name")
        if self.decision is not None and decided is not None:
            return self.decision.after(shape, decided)
        return self.change(shape, value, self.with_defaults(options))


_FACTOR = Value("factor", float, Within(above=0, high=_MOST))
_GROWTH = Value("factor", float, Within(above=1, high=_MOST))
_COUNT = Value("whole number", int, Within(low=1, high=LARGEST_COUNT))
_NUMBER = Value("number", float, Within(above=0, high=_MOST))
_NULL = Value("null", None)
_GATE = Value("number", float, Within(low=0, high=1))
_FRACTION = Value("fraction", float, Within(above=0, high=1))

_MOMENTS = Option(
    "provenance", "where the moments of copied weights come from", ("provenance", "fresh")
)
_FRESH_NU = Option(
    1.0,
    "second moment of fresh weights, as a multiple of their leaf's mean",
    within=Within(low=0, high=_MOST),
)
_NO_NU = Option(
    0.0,
    "second moment of new adapters, as a multiple of the old ones' mean",
    within=Within(low=0, high=_MOST),
)
_STACK_OPTIONS = {
    "order": Option(
        "stack",
        "where the copies go: 0 1 0 1, 0 0 1 1, or the middle layers repeated",
        ("stack", "interleave", "middle"), with_layers=False,
    ),
    "recipe": Option(
        "copy",
        "new layers as copied, with zeroed output projections, or faded in",
        ("copy", "identity", "masked"),
    ),
    "anneal_steps": Option(
        500, "steps to fade in over", within=Within(low=1, high=LARGEST_COUNT),
        only=("recipe", "masked"),
    ),
    "moments": _MOMENTS,
    "fresh_nu": _FRESH_NU,
}  # fmt: skip
_WIDEN_OPTIONS = {
    "recipe": Option(
        "split",
        "copies with random shares, even shares, noise on even shares, or fresh units at zero",
        ("split", "even", "noise", "fresh"),
    ),
    "spread": Option(
        1.0, "half-width of the random shares around an even one", within=Within(above=0, high=10),
        only=("recipe", "split"),
    ),
    "noise": Option(
        0.01, "noise, in standard deviations of the copied weights", within=Within(above=0, high=1),
        only=("recipe", "noise"),
    ),
    "moments": _MOMENTS,
    "fresh_nu": _FRESH_NU,
}  # fmt: skip
_RANK_OPTIONS = {
    "merge_first": Option(
        False, "merge these adapters into their weights before the rank changes, and begin new ones"
    ),
    "fresh_nu": dataclasses.replace(_FRESH_NU, only=("merge_first", False)),
}
_EMBED_OPTIONS = {
    "recipe": Option("split", "copies with random shares, or even ones", ("split", "even")),
    "spread": _WIDEN_OPTIONS["spread"],
}


def _kept_without(recipe: str) -> Callable[[RunShape, RunShape, Options], bool]:
    return lambda before, after, options: options["recipe"] != recipe or before == after


def _count(
    name: str, size: str, words: str, lowest: int = 1, recompiles: bool = False
) -> list[Operation]:
    """Return the operations that multiply and that set a count."""
    value = Value("whole number", int, Within(low=lowest, high=LARGEST_COUNT))
    return [
        Operation(
            f"change_{name}", "hyperparameter", _FACTOR, f"Multiply {words}.",
            MultipliedCount(size), recompiles=recompiles,
        ),
        Operation(
            f"set_{name}", "hyperparameter", value, f"Set {words}.", changes.replaced(size),
            recompiles=recompiles,
        ),
    ]  # fmt: skip


def _ranks(rank: str, words: str) -> list[Operation]:
    """Return the operations that multiply and that set a LoRA rank."""
    shared: dict[str, Any] = {
        "keeps": "yes, except where the rank shrinks (by SVD) without merge_first",
        "exact": lambda before, after, options: (
            options["merge_first"] or getattr(after.model, rank) >= getattr(before.model, rank)
        ),
        "loss": f"a smaller {rank} approximates the adapters, in one case by 0.78 of the logits' RMS "
        "(options: {merge_first: true} is exact)",
        "recompiles": True,
        "options": _RANK_OPTIONS,
        "ranks": (rank,),
    }
    kind = rank.removesuffix("_lora_rank")
    return [
        Operation(
            f"decrease_{kind}_lora_scaling", "morph", _FACTOR,
            f"Divide the divisor of the {words} LoRA rank: the rank is multiplied.",
            changes.scaled_rank(rank), **shared,
        ),
        Operation(
            f"set_{rank}", "morph", _COUNT, f"Set the {words} LoRA rank.",
            changes.set_rank(rank), **shared,
        ),
    ]  # fmt: skip


_ALL_RANKS = ("attn_lora_rank", "vocab_lora_rank")
_AT_POSITIONS = "yes, at the positions both have"
_HYPERPARAMETERS = [
    Operation(
        "change_lr", "hyperparameter", _FACTOR, "Multiply the learning rate.",
        changes.multiplied_number("lr_multiplier"),
    ),
    Operation(
        "set_lr", "hyperparameter", _NUMBER, "Set the peak learning rate.",
        changes.set_learning_rate,
    ),
    *_count(
        "batch_size", "batch_size", "the sequences per forward pass", recompiles=True
    ),
    *_count("grad_accum", "grad_accum_steps", "the forward passes per update"),
    Operation(
        "reset_lr_schedule", "hyperparameter", _NULL,
        "Restart the learning-rate schedule over the steps that remain.", changes.unchanged,
    ),
    *_count("warmup_iters", "warmup_steps", "the steps of warmup", lowest=0),
    *_count("eval_iters", "eval_iters", "the validation batches per evaluation"),
    *_count("eval_interval", "eval_interval", "the steps between evaluations"),
    Operation(
        "change_lora_alpha", "hyperparameter", _FACTOR,
        "Multiply LoRA's alpha, and with it what the adapters add.",
        changes.multiplied_number("lora_alpha"),
        keeps="no, on purpose", exact=_kept_unless_changed, ranks=_ALL_RANKS,
    ),
    Operation(
        "set_lora_alpha", "hyperparameter", _NUMBER, "Set LoRA's alpha.",
        changes.replaced("lora_alpha"),
        keeps="no, on purpose", exact=_kept_unless_changed, ranks=_ALL_RANKS,
    ),
    Operation(
        "set_gates", "hyperparameter", _GATE,
        "Set the gates of attention heads, which scale their output; 0.1 or less closes them.",
        heads.set_gates, keeps="no, on purpose", exact=_never, options=heads.SET_OPTIONS,
        heads="any",
    ),
    Operation(
        "prune_heads", "hyperparameter", _FRACTION,
        "Close a fraction of the open attention heads, at least one.", heads.prune_heads,
        keeps="no, on purpose", exact=_never, options=heads.PRUNE_OPTIONS, heads="open",
    ),
]  # fmt: skip
_DEEPENED: dict[str, Any] = {
    "keeps": "recipe identity and masked yes, copy no",
    "exact": _kept_without("copy"),
    "recompiles": True,
}
_WIDENED: dict[str, Any] = {
    "keeps": "yes, except with recipe noise",
    "exact": _kept_without("noise"),
    "recompiles": True,
    "options": _WIDEN_OPTIONS,
}
_MORPHS = [
    Operation(
        "stack_layers", "morph", Value("factor", float, Within(low=1, high=_MOST), or_layers=True),
        "Multiply the number of layers, or list the source of each; from 0, make fresh ones.",
        changes.stacked_layers, options=_STACK_OPTIONS, **_DEEPENED,
    ),
    Operation(
        "set_n_layers", "morph", _COUNT, "Set the number of layers, as stack_layers does.",
        changes.set_layers, options=_STACK_OPTIONS, **_DEEPENED,
    ),
    Operation(
        "widen_mlp", "morph", _GROWTH, "Multiply d_ff, the hidden width of every MLP.",
        changes.grown("d_ff"), **_WIDENED,
    ),
    Operation(
        "set_d_ff", "morph", _COUNT, "Set d_ff, as widen_mlp does.",
        changes.set_size("d_ff"), **_WIDENED,
    ),
    Operation(
        "widen_heads", "morph", _GROWTH,
        "Multiply n_heads in every layer; head_dim is unchanged.",
        changes.grown("n_heads"), **_WIDENED,
    ),
    Operation(
        "set_n_heads", "morph", _COUNT, "Set n_heads, as widen_heads does.",
        changes.set_size("n_heads"), **_WIDENED,
    ),
    Operation(
        "regrow_heads", "morph", _FRACTION,
        "Open a fraction of the closed attention heads again, at least one.", heads.regrow_heads,
        keeps="yes, except with weights kept or gates above 0",
        exact=lambda before, after, options: (
            options["weights"] == "fresh" and not before.closed.faint
        ),
        loss="heads add at once what they added when they closed, or no longer the little that gates "
        "above 0 let through (exact: options {weights: fresh}, and closed with gate 0)",
        options=heads.REGROW_OPTIONS, heads="closed",
    ),
    Operation(
        "remove_heads", "morph", _NULL,
        "Drop closed heads; each layer keeps the largest number still open in any.",
        heads.remove_heads, recompiles=True,
        decision=Decision(
            ("head_gate",), kept_heads, with_kept_heads, fewest_heads, bounds_of_heads
        ),
    ),
    Operation(
        "widen_embed", "morph", Value("whole factor", float, Within(low=2, high=_MOST)),
        "Multiply d_model, the width of the residual stream.", changes.widened_embed,
        recompiles=True, options=_EMBED_OPTIONS,
    ),
    Operation(
        "set_d_model", "morph", _COUNT, "Set d_model to a multiple of it, as widen_embed does.",
        changes.set_embed, recompiles=True, options=_EMBED_OPTIONS,
    ),
    Operation(
        "change_seq_len", "morph", _FACTOR, "Multiply the context length.",
        changes.scaled_seq_len, keeps=_AT_POSITIONS, recompiles=True,
    ),
    Operation(
        "set_seq_len", "morph", _COUNT, "Set the context length.",
        changes.set_seq_len, keeps=_AT_POSITIONS, recompiles=True,
    ),
    *_ranks("attn_lora_rank", "attention's"),
    *_ranks("vocab_lora_rank", "embedding's"),
    Operation(
        "merge_lora_weights", "morph", _NULL,
        "Add the adapters to the weights they adapt, and re-initialise them.",
        changes.unchanged, ranks=_ALL_RANKS, options={"fresh_nu": _NO_NU},
    ),
]  # fmt: skip
OPERATIONS: Mapping[str, Operation] = {
    operation.name: operation for operation in (*_HYPERPARAMETERS, *_MORPHS)
}


def describe_operations(operations: Mapping[str, Operation] = OPERATIONS) -> str:
    """Return a table of operations as text, for `--help_operations`."""
    rows = [("operation", "kind", "value", "recompiles", "keeps the function")]
    rows += [
        (o.name, o.kind, str(o.value), "yes" if o.recompiles else "no", o.keeps)
        for o in operations.values()
    ]
    head, *lines = aligned(rows, indent=0)
    found = [head]
    for line, operation in zip(lines, operations.values(), strict=True):
        found += [line, f"    {operation.effect}"]
        found += [f"    - {name}: {option}" for name, option in operation.options.items()]
    return "\n".join(found)
