"""The one table of scaling operations: what each is called, takes, does, keeps and costs.

An operation is data: a name and a value. What it does to the sizes of a run is here
(`Operation.next_shape`), so that a whole schedule can be checked without an array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxmorph.cli.errors import nearest
from jaxmorph.config.run_shape import LARGEST_COUNT, OperationError, RunShape, check_number
from jaxmorph.config.settings import Within
from jaxmorph.growth import changes
from jaxmorph.growth.changes import Change, Options

_ANY = Within()
_MOST = 1e6  # as large as a factor may be


def _always_kept(shape: RunShape, value: Any, options: Options) -> bool:
    return True


def _never_kept(shape: RunShape, value: Any, options: Options) -> bool:
    return False


@dataclass(frozen=True)
class Value:
    """What may stand as an operation's value: a `kind` of number within a range; None: null."""

    words: str
    kind: type | None
    within: Within = _ANY

    def __str__(self) -> str:
        return f"{self.words} {self.within}" if self.kind else "null"


@dataclass(frozen=True)
class Option:
    """A choice an operation leaves open, given under `options` of an entry.

    Args:
      default: what it is unless given.
      effect: what it says, in a few words.
      choices: the words it may be; empty for a number.
      within: the range of a number.
      only: another option and the value of it that this one belongs to; None: it always counts.
    """

    default: Any
    effect: str
    choices: tuple[str, ...] = ()
    within: Within = _ANY
    only: tuple[str, str] | None = None

    def __str__(self) -> str:
        kind = "whole number" if isinstance(self.default, int) else "number"
        takes = " | ".join(self.choices) if self.choices else f"{kind} {self.within}"
        default = f"{self.default:g}" if isinstance(self.default, float) else self.default
        where = f", with {self.only[0]} {self.only[1]}" if self.only else ""
        return f"{takes} (default {default}{where}): {self.effect}"


@dataclass(frozen=True)
class Operation:
    """One operation.

    Args:
      name: as a schedule writes it.
      kind: a hyperparameter changes numbers, a morph changes arrays.
      value: what it takes.
      effect: what it does, in a sentence.
      change: the shape it leads to, from a checked value and all options.
      keeps: in words, whether the function stays as it is, up to rounding.
      exact: the same, for a shape, a value and all options.
      recompiles: whether it may need new step and evaluation programs.
      options: by name.
      lora: the adapters it needs.
      count: the field of the shape that a factor is rounded down in; "" for none.
    """

    name: str
    kind: Literal["hyperparameter", "morph"]
    value: Value
    effect: str
    change: Change
    keeps: str = "yes"
    exact: Callable[[RunShape, Any, Options], bool] = _always_kept
    recompiles: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)
    lora: Literal["", "any", "attn", "vocab"] = ""
    count: str = ""

    def check(self, value: Any, options: Options) -> None:
        """Check a value and options by themselves, whatever the run's shape.

        Raises:
          OperationError: wrong type, out of range, or an option the operation does not have.
        """
        if self.value.kind is not None:
            check_number(value, self.value.kind, self.value.within)
        elif value is not None:
            raise OperationError(value, f"null: {self.name} takes no value")
        for name, given in options.items():
            self._check_option(name, given)
        chosen = self.with_defaults(options)
        for name in options:
            if (only := self.options[name].only) and chosen[only[0]] != only[1]:
                wanted = f"{only[0]} {only[1]} with it (it is {chosen[only[0]]})"
                raise OperationError(options[name], wanted, f"options: {name}")

    def with_defaults(self, options: Options) -> dict[str, Any]:
        """Return the value of every option."""
        return {name: options.get(name, known.default) for name, known in self.options.items()}

    def next_shape(self, shape: RunShape, value: Any, options: Options) -> RunShape:
        """Return the shape of the run after the operation.

        Raises:
          OperationError: the operation cannot be done to this shape with this value.
        """
        self.check(value, options)
        ranks = {"attn": shape.model.attn_lora_rank, "vocab": shape.model.vocab_lora_rank}
        if self.lora and not any(ranks[k] for k in ranks if self.lora in (k, "any")):
            flags = [f"{k}_lora_rank_divisor" for k in ranks if self.lora in (k, "any")]
            raise OperationError(
                self.name, f"a model with LoRA adapters ({' or '.join(flags)} > 0)", "name"
            )
        return self.change(shape, value, self.with_defaults(options))

    def _check_option(self, name: str, given: Any) -> None:
        option, place = self.options.get(name), f"options: {name}"
        if option is None:
            listed = f"one of {', '.join(self.options)}" if self.options else "no options"
            raise OperationError(
                name, f"{listed} of {self.name}{nearest(name, self.options)}", "options"
            )
        if not option.choices:
            check_number(given, type(option.default), option.within, place)
        elif given not in option.choices:
            near = nearest(given, option.choices) if isinstance(given, str) else ""
            got = "null" if given is None else given
            raise OperationError(got, f"one of {', '.join(option.choices)}{near}", place)


_FACTOR = Value("factor", float, Within(above=0, high=_MOST))
_GROWTH = Value("factor", float, Within(above=1, high=_MOST))
_COUNT = Value("whole number", int, Within(low=1, high=LARGEST_COUNT))
_NUMBER = Value("number", float, Within(above=0, high=_MOST))
_NULL = Value("null", None)

_MOMENTS = Option(
    "provenance", "where the moments of copied weights come from", ("provenance", "fresh")
)
_FRESH_NU = Option(
    1.0,
    "second moment of fresh weights, in means of their leaf's",
    within=Within(low=0, high=_MOST),
)
_NO_NU = Option(
    0.0,
    "second moment of new adapters, in means of the old ones'",
    within=Within(low=0, high=_MOST),
)
_STACK_OPTIONS = {
    "order": Option(
        "stack",
        "where the copies go: 0 1 0 1, 0 0 1 1, or the middle layers repeated",
        ("stack", "interleave", "middle"),
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
_EMBED_OPTIONS = {"recipe": Option("even", "copies with even shares", ("even",))}


def _kept_without_noise(shape: RunShape, value: Any, options: Options) -> bool:
    return options["recipe"] != "noise"


def _count(
    name: str, size: str, words: str, lowest: int = 1, recompiles: bool = False
) -> list[Operation]:
    """Return the operations that multiply and that set a count."""
    value = Value("whole number", int, Within(low=lowest, high=LARGEST_COUNT))
    return [
        Operation(
            f"change_{name}", "hyperparameter", _FACTOR, f"Multiply {words}.",
            changes.multiplied_count(size), recompiles=recompiles, count=size,
        ),
        Operation(
            f"set_{name}", "hyperparameter", value, f"Set {words}.", changes.replaced(size),
            recompiles=recompiles,
        ),
    ]  # fmt: skip


_AT_POSITIONS = "yes, at the positions both have"
_BY_RANK = "yes where the rank grows, no where it shrinks (by SVD)"
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
        keeps="no, on purpose", exact=_never_kept, lora="any",
    ),
    Operation(
        "set_lora_alpha", "hyperparameter", _NUMBER, "Set LoRA's alpha.",
        changes.replaced("lora_alpha"),
        keeps="no, on purpose", exact=_never_kept, lora="any",
    ),
]  # fmt: skip
_MORPHS = [
    Operation(
        "stack_layers", "morph", Value("factor", float, Within(low=1, high=_MOST)),
        "Multiply the number of layers; from 0, make as many fresh ones.",
        changes.stacked_layers,
        keeps="recipe identity and masked yes, copy no",
        exact=lambda shape, value, options: options["recipe"] != "copy",
        recompiles=True, options=_STACK_OPTIONS,
    ),
    Operation(
        "widen_mlp", "morph", _GROWTH, "Multiply d_ff, the hidden width of every MLP.",
        changes.grown("d_ff"),
        keeps="yes, but for recipe noise", exact=_kept_without_noise,
        recompiles=True, options=_WIDEN_OPTIONS,
    ),
    Operation(
        "widen_heads", "morph", _GROWTH,
        "Multiply n_heads in every layer; head_dim stays as it is.", changes.grown("n_heads"),
        keeps="yes, but for recipe noise", exact=_kept_without_noise,
        recompiles=True, options=_WIDEN_OPTIONS,
    ),
    Operation(
        "widen_embed", "morph", Value("whole factor", float, Within(low=2, high=_MOST)),
        "Multiply d_model, the width of the residual stream.", changes.widened_embed,
        recompiles=True, options=_EMBED_OPTIONS,
    ),
    Operation(
        "change_seq_len", "morph", _FACTOR, "Multiply the context length.",
        changes.scaled_seq_len, keeps=_AT_POSITIONS, recompiles=True,
    ),
    Operation(
        "set_seq_len", "morph", _COUNT, "Set the context length.",
        changes.set_seq_len, keeps=_AT_POSITIONS, recompiles=True,
    ),
    Operation(
        "decrease_attn_lora_scaling", "morph", _FACTOR,
        "Divide the divisor of the attention's LoRA rank: the rank is multiplied.",
        changes.scaled_rank("attn_lora_rank"),
        keeps=_BY_RANK,
        exact=lambda shape, value, options: value >= 1,
        recompiles=True, options={"fresh_nu": _FRESH_NU}, lora="attn",
    ),
    Operation(
        "decrease_vocab_lora_scaling", "morph", _FACTOR,
        "Divide the divisor of the embedding's LoRA rank: the rank is multiplied.",
        changes.scaled_rank("vocab_lora_rank"),
        keeps=_BY_RANK,
        exact=lambda shape, value, options: value >= 1,
        recompiles=True, options={"fresh_nu": _FRESH_NU}, lora="vocab",
    ),
    Operation(
        "merge_lora_weights", "morph", _NULL,
        "Add the adapters to the weights they adapt, and begin new ones.",
        changes.unchanged, lora="any", options={"fresh_nu": _NO_NU},
    ),
]  # fmt: skip
OPERATIONS: Mapping[str, Operation] = {
    operation.name: operation for operation in (*_HYPERPARAMETERS, *_MORPHS)
}


def describe_operations() -> str:
    """Return the table as text, for `--help-operations`."""
    rows = [("operation", "kind", "value", "recompiles", "keeps the function")]
    rows += [
        (o.name, o.kind, str(o.value), "yes" if o.recompiles else "no", o.keeps)
        for o in OPERATIONS.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row, operation in zip(rows, (None, *OPERATIONS.values()), strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)]
        lines.append("  ".join(cells).rstrip())
        if operation is not None:
            lines.append(f"    {operation.effect}")
            lines += [f"    - {name}: {option}" for name, option in operation.options.items()]
    return "\n".join(lines)
