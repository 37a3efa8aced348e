"""The memory of a run on each device, computed without arrays or JAX.

What parameters, gradients and optimizer state take is exact. What activations take is an estimate:
only the compiler knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.model.architecture import INDEX_AXES, gpt_axis_sizes, loss_chunk
from jaxmorph.model.signatures import Signature
from jaxmorph.model.trainable import trainable_of

_FACTORED_FROM = 128  # optax's adafactor factors leaves whose two largest dimensions reach this

# Elements per token and layer that the backward pass needs, fitted to what XLA allocates on the CPU for
# nine float32 models of other widths, contexts and vocabularies. In bfloat16 on the CPU, which
# makes copies in float32, it is up to twice as much. Nothing is refused because of it.
_PER_WIDTH, _PER_HIDDEN, _PER_GATE, _PER_LOGIT = 9.0, 2.25, 2.0, 2.0
_PER_SCORE = {"xla": 2.0, "blocked": 1.0, "auto": 1.0, "cudnn": 0.0}


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds on each device throughout a stage, independently of its batch."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def state(self) -> int:
        """Return the bytes of what a change of shape reads, or writes."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.parameters + self.gradients + self.optimizer


def memory(
    shape: RunShape,
    optimizer: OptimizerSettings,
    mesh: MeshShape = MeshShape(),  # noqa: B008 -- frozen
) -> Memory:
    """Return the memory of parameters, gradients and optimizer state on each device.

    Frozen parameters have neither gradients nor optimizer state.

    Args:
      shape: of the run.
      optimizer: its state counts.
      mesh: what parameters are sharded over.
    """
    width, trainable = 8 if shape.model.dtype == "float64" else 4, trainable_of(shape)
    sizes = gpt_axis_sizes(shape.model)

    def entries(signature: Signature, sizes: Mapping[str, int]) -> int:
        return math.prod(mesh.part(signature.axes, signature.shape(sizes)))

    view, trained = trainable.sizes(sizes), trainable.trained.values()
    return Memory(
        width * sum(entries(s, sizes) for s in trainable.signatures.values()),
        width * sum(entries(s, view) for s in trained),
        width * sum(_state_entries(s, s.shape(view), entries(s, view), optimizer) for s in trained),
    )


def activations(shape: RunShape, mesh: MeshShape = MeshShape()) -> int:  # noqa: B008 -- frozen
    """Return an estimate of the bytes of activations on each device during a step.

    Args:
      shape: of the run.
      mesh: what batches are sharded over; `tensor` is taken to divide all of it.
    """
    model = shape.model
    tokens = shape.batch_size // mesh.batch_parts * model.seq_len
    chunk = loss_chunk(model, shape.batch_size * model.seq_len) or tokens
    logits = _PER_LOGIT * 4 * model.vocab_size * min(tokens, chunk)
    width = {"float64": 8, "float32": 4, "bfloat16": 2}[model.dtype]
    layer = _per_token(model) * width * tokens
    residuals = model.n_layers * model.d_model * width * tokens
    layers = residuals + layer if model.remat else model.n_layers * layer
    return round((layers + logits) / mesh.tensor)


def _per_token(model: ModelConfig) -> float:
    """Return the elements per token that a layer's backward pass needs."""
    hidden = _PER_HIDDEN + (_PER_GATE if model.activation == "swiglu" else 0)
    scores = _PER_SCORE[model.attention] * model.n_heads * model.seq_len
    return _PER_WIDTH * model.d_model + hidden * model.d_ff + scores


def _state_entries(
    signature: Signature, shape: tuple[int, ...], size: int, optimizer: OptimizerSettings
) -> int:
    """Return the number of optimizer state entries of a parameter on each device.

    Args:
      signature: of the parameter.
      shape: of it, or of its trained part, over all devices.
      size: entries on each device.
      optimizer: which.
    """
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
        case "adafactor":  # its factors have fewer dimensions than the parameter, so they are whole
            whole = math.prod(shape)
            *_, second, largest = (1, 1, *sorted(shape))
            return whole // largest + whole // second if second >= _FACTORED_FROM else size
