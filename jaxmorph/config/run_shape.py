"""What a scaling operation can change, as sizes and numbers without an array, and how it changes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from jaxmorph.cli.wording import repeatable
from jaxmorph.config.settings import ModelConfig, Within

LARGEST_COUNT = 2**31 - 1  # sizes and counts become int32 arrays
_SMALLEST, _LARGEST = 1e-30, 1e30  # of numbers that become float32 arrays, with room to multiply


@dataclass(frozen=True)
class RunShape:
    """A run at one moment of its schedule.

    Args:
      model: the architecture; its `seq_len` is the context length.
      batch_size: sequences per forward pass, over all devices.
      grad_accum_steps: forward passes per update.
      eval_iters: validation batches per evaluation.
      eval_interval: steps between evaluations.
      warmup_steps: steps of linear warmup.
      learning_rate: peak learning rate where the multiplier is one; no operation changes it.
      lr_multiplier: multiplies the learning rate.
      lora_alpha: numerator of the adapters' scale alpha / rank.
    """

    model: ModelConfig
    batch_size: int
    grad_accum_steps: int
    eval_iters: int
    eval_interval: int
    warmup_steps: int
    learning_rate: float
    lr_multiplier: float
    lora_alpha: float

    def with_model(self, **sizes: int) -> RunShape:
        """Return the run with another architecture."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **sizes))


class OperationError(ValueError):
    """A value or an option that an operation cannot use.

    Args:
      got: what came, as the user wrote it.
      expected: what would have been accepted.
      field: the field of the entry it stands in.
    """

    def __init__(self, got: object, expected: str, field: str = "value"):
        self.got, self.expected, self.field = got, expected, field
        super().__init__(f"{field}: got {got!r}, expected {expected}")


def check_number(got: object, kind: type, within: Within, field: str = "value") -> None:
    """Check that `got` is a number of that kind and in that range.

    Args:
      got: the value, as JSON or YAML gave it.
      kind: int, or float, for which a whole number will do.
      within: the range.
      field: where it stands.

    Raises:
      OperationError: it is not; true and false are no numbers.
    """
    wanted = "a whole number" if kind is int else "a number"
    limits = str(within)
    if not isinstance(got, int if kind is int else (int, float)) or isinstance(got, bool):
        raise OperationError("null" if got is None else got, f"{wanted} {limits}".strip(), field)
    if isinstance(got, float) and not math.isfinite(got):
        raise OperationError(got, f"a finite number {limits}".strip(), field)
    if not within.holds(got):
        raise OperationError(got, f"{wanted} {limits}", field)


def whole_product(size: int, factor: float) -> int | None:
    """Return size × factor where that is a whole number, else None.

    A factor is the decimal that was written or the float nearest to a ratio of whole numbers, not
    the binary fraction it became: 10 × 1.1 is 11, and 96 × 0.3333333333333333 is 32.
    """
    nearest = round(size * factor)
    return nearest if size and nearest / size == factor else None


def scaled_size(noun: str, size: int, factor: float, least: int, most: int) -> int:
    """Return size × factor, an axis's new size.

    Args:
      noun: what the size is of, for the message.
      size: its size now.
      factor: what multiplies it.
      least: the smallest size it may get.
      most: the largest.

    Raises:
      OperationError: the product is not whole or out of range; names the nearest factors that work.
    """
    product = whole_product(size, factor)
    if product is not None and least <= product <= most:
        return product
    exact = size * factor
    near = {min(max(n, least), most) for n in (math.floor(exact), math.ceil(exact))}
    works = ", ".join(f"{repeatable(n / size)} gives {n}" for n in sorted(near) if n != size)
    span = f"from {least} to {most}" if most < LARGEST_COUNT else f"of at least {least}"
    wanted = f"a factor that gives a whole {noun} {span} ({size} × {factor:g} = {exact:g})"
    raise OperationError(factor, f"{wanted}; {works}" if works else wanted)


def divided(noun: str, size: int, divisor: float, field: str) -> int:
    """Return size / divisor, the size an axis starts with.

    Args:
      noun: what the size is of, for the message.
      size: what is divided.
      divisor: by what; the decimal that was written counts, as in `whole_product`.
      field: the divisor's own name.

    Raises:
      OperationError: the quotient is not whole; names the nearest divisors that work.
    """
    exact = size / divisor
    quotient = round(exact) if exact <= LARGEST_COUNT else 0
    if size == 0 or (quotient and (quotient * divisor == size or size / quotient == divisor)):
        return quotient
    near = {min(max(n, 1), LARGEST_COUNT) for n in (int(min(exact, LARGEST_COUNT)), quotient + 1)}
    works = ", ".join(f"{repeatable(size / n)} gives {n}" for n in sorted(near))
    wanted = f"a divisor that gives a whole {noun} ({size} / {divisor:g} = {exact:g}); {works}"
    raise OperationError(divisor, wanted, field)


def scaled_count(count: int, factor: float) -> int:
    """Return count × factor rounded down, at least 1.

    Raises:
      OperationError: it does not fit 32 bits.
    """
    product = whole_product(count, factor)
    scaled = max(1, math.floor(count * factor) if product is None else product)
    if scaled > LARGEST_COUNT:
        raise OperationError(factor, f"a product of at most {LARGEST_COUNT} ({count} × {factor:g})")
    return scaled


def scaled_number(number: float, factor: float) -> float:
    """Return number × factor.

    Raises:
      OperationError: it is too large or too small for a float32.
    """
    if not _SMALLEST <= number * factor <= _LARGEST:
        raise OperationError(
            factor, f"a product from {_SMALLEST:g} to {_LARGEST:g} ({number:g} × {factor:g})"
        )
    return number * factor


def scaled_rank_size(config: ModelConfig, field: str, factor: float) -> int:
    """Return a LoRA rank × factor, up to d_model.

    Args:
      config: the architecture.
      field: which rank, of ModelConfig.
      factor: what multiplies it.

    Raises:
      OperationError: no such adapters, or a product that is not whole or out of range.
    """
    rank = getattr(config, field)
    if not rank:
        raise OperationError(factor, f"adapters: {field} is 0")
    return scaled_size(field, rank, factor, least=1, most=max(rank, config.d_model))


def check_seq_len(config: ModelConfig, seq_len: int, value: float) -> None:
    """Check that the model has positions for a context of `seq_len` tokens.

    Args:
      config: the architecture before.
      seq_len: the context length after.
      value: of the operation that asks for it, for the message.

    Raises:
      OperationError: more than its learned positions.
    """
    if config.positions == "learned" and seq_len > config.seq_len:
        wanted = (
            f"at most the {config.seq_len} learned positions (positions rotary has no such limit)"
        )
        raise OperationError(value, f"a seq_len, here {seq_len}, of {wanted}")
