"""The memory of parameters, gradients and optimizer state, computed without arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.model.architecture import INDEX_AXES, gpt_axis_sizes, parameter_count
from jaxmorph.model.signatures import Signature, count_parameters
from jaxmorph.model.trainable import trainable_of

_FACTORED_FROM = 128  # optax's adafactor factors leaves whose two largest dimensions reach this


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds independently of its batch, over all devices."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.parameters + self.gradients + self.optimizer


def memory(shape: RunShape, optimizer: OptimizerSettings) -> Memory:
    """Return the memory of parameters, gradients and optimizer state, without activations.

    Frozen parameters have neither gradients nor optimizer state.
    """
    width, trainable = 8 if shape.model.dtype == "float64" else 4, trainable_of(shape)
    sizes = trainable.sizes(gpt_axis_sizes(shape.model))
    trained = trainable.trained.values()
    held = sum(_state_entries(s, s.shape(sizes), optimizer) for s in trained)
    return Memory(
        width * parameter_count(shape.model),
        width * count_parameters(trained, sizes),
        width * held,
    )


def _state_entries(
    signature: Signature, shape: tuple[int, ...], optimizer: OptimizerSettings
) -> int:
    """Return the number of optimizer state entries that mirror a parameter."""
    size = math.prod(shape)
    match optimizer.optimizer:
        case "adamw":
            return 2 * size
        case "muon":
            hidden = signature.is_matrix and not INDEX_AXES & set(signature.axes)
            return size if hidden else 2 * size
        case "lion":
            return size
        case "sgd":
            return size if optimizer.beta1 else 0
        case "adafactor":
            *_, second, largest = (1, 1, *sorted(shape))
            return size // largest + size // second if second >= _FACTORED_FROM else size
