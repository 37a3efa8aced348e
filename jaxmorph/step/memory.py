"""The memory that parameters, gradients and optimizer state take, without an array."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxmorph.config.settings import ModelConfig, OptimizerSettings
from jaxmorph.model.architecture import (
    INDEX_AXES,
    frozen_parameters,
    gpt_axis_sizes,
    gpt_signatures,
    parameter_count,
)
from jaxmorph.model.signatures import Signature

_FACTORED_FROM = 128  # optax's adafactor factors a leaf whose two largest dimensions reach this


@dataclass(frozen=True)
class Memory:
    """Bytes a run holds whatever its batch, over all devices."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.parameters + self.gradients + self.optimizer


def memory(config: ModelConfig, optimizer: OptimizerSettings) -> Memory:
    """Return what parameters, gradients and optimizer state take; activations come on top.

    Frozen parameters have no optimizer state; their gradients, all zeros, are held all the same.
    """
    width = 8 if config.dtype == "float64" else 4
    sizes, frozen = gpt_axis_sizes(config), frozen_parameters(config)
    trained = [s for path, s in gpt_signatures(config).items() if path not in frozen]
    parameters = width * parameter_count(config)
    held = sum(_state_entries(s, s.shape(sizes), optimizer) for s in trained)
    return Memory(parameters, parameters, width * held)


def _state_entries(
    signature: Signature, shape: tuple[int, ...], optimizer: OptimizerSettings
) -> int:
    """Return the entries of optimizer state that mirror a parameter."""
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
