"""What a scaling operation can change: sizes and numbers, without arrays, and their arithmetic."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from jaxmorph.cli.printing import quoted
from jaxmorph.cli.wording import repeatable
from jaxmorph.config.closed_heads import NONE_CLOSED, ClosedHeads
from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.settings import LARGEST_COUNT, Within

_SMALLEST, _LARGEST = 1e-30, 1e30  # for float32 arrays, with room to multiply
_LARGEST_ARRAY = 2**60 - 1  # entries, of 8 bytes at most: bytes are counted in 64 bits
_ARRAYS = (  # the sizes of the largest arrays of a model
    ("n_layers", "d_model", "d_ff"),
    ("n_layers", "d_model", "n_heads", "head_dim"),
    ("vocab_size", "d_model"),
    ("seq_len", "d_model"),
)


@dataclass(frozen=True)
class RunShape:
    """A run at one point of its schedule.

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
      frozen_layers: layers that are not trained. (Entirely frozen parameters follow from the
        architecture: the adapted ones if `lora_base` is frozen.)
      closed: how many heads are closed, as far as that is known.
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
    frozen_layers: tuple[int, ...] = ()
    closed: ClosedHeads = NONE_CLOSED

    @property
    def n_heads(self) -> int:
        """Return the number of heads, over all layers."""
        return self.model.n_layers * self.model.n_heads

    @property
    def program_key(self) -> tuple[ModelConfig, int, tuple[int, ...]]:
        """Return the key of the run's compiled programs; shapes with the same key share them."""
        return self.model, self.batch_size, self.frozen_layers

    def with_model(self, **sizes: int) -> RunShape:
        """Return the run with another architecture."""
        after = dataclasses.replace(self, model=dataclasses.replace(self.model, **sizes))
        closed = self.closed.resized(self.n_heads, after.n_heads)
        return dataclasses.replace(after, closed=closed)


class OperationError(ValueError):
    """A value or an option that an operation cannot use.

    Args:
      got: the value as the user wrote it.
      expected: what would have been accepted.
      field: the field of the entry that contains it.
    """

    def __init__(self, got: object, expected: str, field: str = "value"):
        self.got, self.expected, self.field = got, expected, field
        super().__init__(f"{field}: got {quoted(got)}, expected {expected}")


def check_number(got: object, kind: type, within: Within, field: str = "value") -> None:
    """Check that `got` is a number of this kind in this range.

    Args:
      got: the value, as parsed from JSON or YAML.
      kind: int, or float, which also accepts an integer.
      within: the range.
      field: the field that contains it.

    Raises:
      OperationError: it is not; true and false are not numbers.
    """
    noun = "a whole number" if kind is int else "a number"
    if not isinstance(got, int if kind is int else (int, float)) or isinstance(got, bool):
        raise OperationError("null" if got is None else got, f"{noun} {within}".strip(), field)
    if wanted := within.problem(got, kind, noun):
        raise OperationError(got, wanted, field)


def overflow(shape: RunShape) -> tuple[str, object, str] | None:
    """Return a size or a rate that is too large with the others: (name, value, what is expected)."""
    model, peak = shape.model, shape.learning_rate * shape.lr_multiplier
    if not _SMALLEST <= peak <= _LARGEST:
        wanted = f"a product with lr_multiplier from {_SMALLEST:g} to {_LARGEST:g}, not {peak:g}"
        return "learning_rate", shape.learning_rate, wanted
    if (tokens := shape.batch_size * (model.seq_len + 1)) > LARGEST_COUNT:
        wanted = f"a product with seq_len of at most {LARGEST_COUNT:,} tokens, not {tokens:,}"
        return "batch_size", shape.batch_size, wanted
    for names in _ARRAYS:
        sizes = {name: getattr(model, name) for name in names}
        if (entries := math.prod(sizes.values())) > _LARGEST_ARRAY:
            product = " × ".join(f"{name} {size:,}" for name, size in sizes.items())
            wanted = f"a product of at most {_LARGEST_ARRAY:.2g} ({product} = {entries:.2g})"
            return "d_model", model.d_model, wanted
    return None


def whole_product(size: int, factor: float) -> int | None:
    """Return size × factor if it is an integer, else None.

    A factor means the decimal that was written or the float nearest to a ratio of integers, not its
    exact binary value: 10 × 1.1 is 11, and 96 × 0.3333333333333333 is 32.
    """
    nearest = round(size * factor)
    return nearest if size and nearest / size == factor else None


def divided(noun: str, size: int, divisor: float, field: str) -> int:
    """Return size / divisor, the size an axis starts with.

    Args:
      noun: the name of the size, for the message.
      size: the dividend.
      divisor: the divisor; the decimal that was written counts, as in `whole_product`.
      field: the divisor's own name.

    Raises:
      OperationError: the quotient is not an integer; names the nearest divisors that work.
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
