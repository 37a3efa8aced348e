"""The shape a run starts with: the integer sizes and counts that its settings resolve to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from jaxmorph.config.closed_heads import ClosedHeads
from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.run_shape import OperationError, RunShape, divided, scaled_count, scaled_number
from jaxmorph.config.settings import LARGEST_COUNT, Settings

DEFAULT_MAX_STEPS = 2000
_MANY_PASSES = 20  # over a corpus; more is a warning
Number = TypeVar("Number", int, float)


def start_shape(settings: Settings, vocab_size: int | None, total: int | None) -> RunShape:
    """Return the shape a run starts with, divisors and multipliers applied.

    Args:
      settings: all of them.
      vocab_size: of the tokenizer; None if not known before the corpus is read: then 0 in the model.
      total: steps of the run, of which the default warmup is a fraction; None if not known before
        the corpus is read: the default warmup is then 0.

    Raises:
      OperationError: a divisor does not give an integer, or a multiplier gives one that is too
        large; its `field` is the flag.
    """
    growth, counts = settings.growth, _counts(settings)

    def count(name: str) -> int:
        return _scaled(scaled_count, *counts[name], settings)

    return RunShape(
        model=model_config(settings, vocab_size or 0),
        batch_size=count("batch_size"),
        grad_accum_steps=count("grad_accum_steps"),
        eval_iters=count("eval_iters"),
        eval_interval=count("eval_interval"),
        warmup_steps=warmup_steps(settings, total or 0),
        learning_rate=settings.optimizer.learning_rate,
        lr_multiplier=growth.lr_multiplier,
        lora_alpha=_scaled(
            scaled_number, settings.model.lora_alpha, "lora_alpha_multiplier", settings
        ),
        closed=ClosedHeads(
            controlled=settings.heads.enable_controller,
            least_open=settings.heads.min_heads_per_layer,
        ),
    )


def model_config(settings: Settings, vocab_size: int) -> ModelConfig:
    """Return the architecture the settings start with, for a tokenizer of `vocab_size` ids.

    Raises:
      OperationError: see `start_shape`.
    """
    model, growth = settings.model, settings.growth
    multiple, divisors = model.vocab_multiple, (growth.n_layer_divisor, growth.n_hidden_divisor)
    d_ff = model.d_ff or _default_d_ff(model.d_model, model.activation)
    if d_ff > LARGEST_COUNT:
        wanted = f"a width whose d_ff is at most {LARGEST_COUNT}, not {d_ff}, or another d_ff"
        raise OperationError(model.d_model, wanted, "d_model")
    return ModelConfig(
        n_layers=divided("n_layers", model.n_layers, divisors[0], "n_layer_divisor"),
        d_model=model.d_model,
        n_heads=model.n_heads,
        head_dim=model.d_model // model.n_heads,
        d_ff=divided("d_ff", d_ff, divisors[1], "n_hidden_divisor"),
        vocab_size=-(-vocab_size // multiple) * multiple,
        seq_len=settings.data.seq_len,
        dropout=model.dropout,
        positions=model.positions,
        norm=model.norm,
        activation=model.activation,
        tied_head=model.tied_head,
        biases=model.biases,
        init_std=model.init_std,
        scan_layers=model.scan_layers,
        dtype=model.dtype,
        remat=model.remat,
        attention=model.attention,
        loss_chunk=model.loss_chunk,
        attn_lora_rank=_rank(settings, "attn_lora_rank_divisor"),
        vocab_lora_rank=_rank(settings, "vocab_lora_rank_divisor"),
        lora_base=model.lora_base,
    )


def total_steps(settings: Settings, examples_per_epoch: int | None) -> int | None:
    """Return the number of optimizer steps; None while the length of an epoch is unknown.

    Epochs are converted with the batch size at the start, whatever it grows to.

    Raises:
      OperationError: more than 32 bits can count; its `field` is the flag.
    """
    if settings.run.num_epochs is None:
        return settings.run.max_steps or DEFAULT_MAX_STEPS
    if examples_per_epoch is None:
        return None
    start = start_shape(settings, None, None)
    per_step = start.batch_size * start.grad_accum_steps
    steps = settings.run.num_epochs * examples_per_epoch / per_step
    if steps > LARGEST_COUNT:
        wanted = f"a number that gives at most {LARGEST_COUNT} steps, not {steps:.3g}"
        raise OperationError(settings.run.num_epochs, wanted, "num_epochs")
    return max(1, int(steps))


def warmup_steps(settings: Settings, total: int) -> int:
    """Return the steps of warmup at the start: as given, or 5 % of the total, floored."""
    given = settings.optimizer.warmup_steps
    steps = total * 5 // 100 if given is None else given
    return steps and _scaled(scaled_count, steps, "warmup_iters_multiplier", settings)


def start_warnings(settings: Settings, start: RunShape) -> list[str]:
    """Return a sentence for each count that was rounded at the start, and for many epochs."""
    counts = _counts(settings)
    if settings.optimizer.warmup_steps:
        counts["warmup_steps"] = settings.optimizer.warmup_steps, "warmup_iters_multiplier"
    warnings = []
    for name, (count, multiplier) in counts.items():
        factor, got = getattr(settings.growth, multiplier), getattr(start, name)
        if abs(count * factor - got) > 1e-9 * got:
            warnings.append(f"{name}: {count} × {factor:g} = {count * factor:g}, rounded to {got}")
    return warnings + passes_warnings(settings.run.num_epochs or 0)


def passes_warnings(passes: float) -> list[str]:
    """Return a sentence if a run reads its training text very often."""
    if passes <= _MANY_PASSES:
        return []
    return [
        f"the run reads its training text {passes:.3g} times; after more than {_MANY_PASSES} a model "
        "often learns it by heart, and the validation loss rises: more text or fewer steps help"
    ]


def known_vocab_size(settings: Settings) -> int | None:
    """Return the tokenizer's vocabulary size; None if it depends on the corpus or a file."""
    sizes = {"byte": 256, "bpe": settings.data.bpe_vocab_size, "gpt2": 50257}
    return sizes.get(settings.data.tokenizer)


def _default_d_ff(d_model: int, activation: str) -> int:
    # SwiGLU has three matrices, GELU two: 8/3 keeps the parameter count.
    return 4 * d_model if activation == "gelu" else -(-8 * d_model // 3 // 8) * 8


def _rank(settings: Settings, flag: str) -> int:
    divisor, width = getattr(settings.model, flag), settings.model.d_model
    if not divisor:
        return 0
    rank = divided("rank", width, divisor, flag)
    if rank > width:
        raise OperationError(divisor, f"a rank of at most d_model ({width}), not {rank}", flag)
    return rank


def _counts(settings: Settings) -> dict[str, tuple[int, str]]:
    """Return the counts of a run that have a multiplier: (value set, flag of the multiplier)."""
    return {
        "batch_size": (settings.data.batch_size, "batch_size_multiplier"),
        "grad_accum_steps": (settings.data.grad_accum_steps, "grad_accum_multiplier"),
        "eval_iters": (settings.run.eval_iters, "eval_iters_multiplier"),
        "eval_interval": (settings.run.eval_interval, "eval_interval_multiplier"),
    }


def _scaled(
    rule: Callable[[Number, float], Number], value: Number, multiplier: str, settings: Settings
) -> Number:
    """Return a value scaled by a rule of `run_shape`; errors name the multiplier's flag."""
    try:
        return rule(value, getattr(settings.growth, multiplier))
    except OperationError as error:
        raise OperationError(error.got, error.expected, multiplier) from None
