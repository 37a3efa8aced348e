"""The state of a run: everything that training changes, as one pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import Settings
from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_axis_sizes
from jaxmorph.model.blocks import Gates, Params
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.model.precision import parameter_dtype
from jaxmorph.step.optimizer import plateau_transform

OPEN_LOGIT = 3.0  # of the gate of a head that the controller leaves alone
_SCALAR = NamedAxes()
_PER_LAYER = NamedAxes("layer")
_HEADS_AT_ONE = NamedAxes("layer head", fresh=1)
_HEADS_CLOSED = NamedAxes("layer head", fresh=-1)
_HEADS_RESTING = NamedAxes("layer head")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The input and output of a training step, and the content of a checkpoint.

    Args:
      params: nested dict of parameters.
      opt_state: the optimizer's state of the trained parameters.
      variables: every other leaf by name, as declared by a table of `Variable`.
    """

    params: Params
    opt_state: optax.OptState
    variables: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Return a variable."""
        return self.variables[name]

    def with_variables(self, **changed: Any) -> TrainState:
        """Return the state with other values of some variables."""
        assert changed.keys() <= self.variables.keys(), changed.keys() - self.variables.keys()
        return dataclasses.replace(self, variables=self.variables | changed)


@dataclass(frozen=True)
class Start:
    """What a run starts with: determines the initial values of its variables."""

    settings: Settings
    shape: RunShape
    total_steps: int


@dataclass(frozen=True)
class Variable:
    """A leaf of a run's state that is neither a parameter nor a moment.

    Changes of shape, checkpoints and sharding follow from the declaration.

    Args:
      axes: its axes, and the value of entries of a fresh layer or head.
      dtype: "float" for the parameters' dtype.
      first: the initial value: one number for all entries, or arrays with their own shapes and
        dtypes, which are over `axes` if it names any; None: `axes.fresh`.
      since: the checkpoint format that first has it; read from an older one, it has its first value.
    """

    axes: NamedAxes = _SCALAR
    dtype: str = "float"
    first: Callable[[Start], Any] | None = None
    since: int = 1

    def begin(self, start: Start, sizes: Mapping[str, int]) -> Any:
        """Return the initial value of the variable for these axis sizes."""
        value = self.axes.fresh if self.first is None else self.first(start)
        shape = tuple(sizes[axis] for axis in self.axes.names)
        if not isinstance(value, (int, float)):
            assert not shape or value.shape == shape, (self.axes, value.shape)
            return value
        dtype = parameter_dtype(start.shape.model) if self.dtype == "float" else self.dtype
        return jnp.full(shape, value, dtype)


def _dropout_stream(start: Start) -> jax.Array:
    """Return uint32 key data; dropout at a step depends only on it and the step."""
    return jax.random.key_data(jax.random.fold_in(jax.random.key(start.settings.run.seed), 1))


def _no_plateau_yet(start: Start) -> Any:
    """Return optax's ReduceLROnPlateauState; its `scale` multiplies the learning rate."""
    dtype = parameter_dtype(start.shape.model)
    return plateau_transform(start.settings.optimizer).init({"": jnp.zeros((), dtype)})


# One line per leaf. Leaves set by a hyperparameter operation are named after the field of `RunShape`
# that they follow, and are scalars, so that changing them recompiles nothing.
VARIABLES: Mapping[str, Variable] = {
    "step": Variable(dtype="int32"),  # updates, including skipped ones
    "skipped": Variable(dtype="int32"),  # updates whose loss or gradient was not finite
    "skipped_in_a_row": Variable(dtype="int32"),
    "rng": Variable(dtype="uint32", first=_dropout_stream),
    "layer_gate": Variable(NamedAxes("layer", fresh=1)),  # scales what a block adds
    "head_gate": Variable(_HEADS_AT_ONE),  # scales a head's output
    # Of `heads.judged`; a fresh head is yet to open.
    "head_status": Variable(_HEADS_CLOSED, dtype="int32", first=lambda start: 0, since=4),
    "head_boost": Variable(_HEADS_AT_ONE, since=4),  # scales the boost of a head's rate
    "head_logit": Variable(NamedAxes("layer head", fresh=OPEN_LOGIT), since=4),
    "head_course": Variable(_HEADS_RESTING, dtype="int32", since=4),  # the controller's, -1 to 1
    "controller_updates": Variable(dtype="int32", since=4),
    "controller_plateau": Variable(dtype="int32", since=4),  # updates in a row that changed little
    "controller_stopped": Variable(dtype="int32", since=4),  # 0, or 1 + the operations before it
    "newly_activated_heads": Variable(dtype="int32", since=4),  # since the log's last full line
    "newly_pruned_heads": Variable(dtype="int32", since=4),
    "fade_start": Variable(_PER_LAYER, dtype="int32"),  # the step at which a gate began to open
    "fade_steps": Variable(_PER_LAYER, dtype="int32"),  # steps it takes; 0: it does not change
    "lora_alpha": Variable(first=lambda start: start.shape.lora_alpha),
    "lr_multiplier": Variable(first=lambda start: start.shape.lr_multiplier),
    "warmup_steps": Variable(dtype="int32", first=lambda start: start.shape.warmup_steps),
    "schedule_start": Variable(dtype="int32"),  # the step at which the schedule (re)started
    "total_steps": Variable(dtype="int32", first=lambda start: start.total_steps),
    "plateau": Variable(first=_no_plateau_yet),
}

GATES = {"layer": "layer_gate", "head": "head_gate", "lora_alpha": "lora_alpha"}  # their variables


def new_state(
    start: Start,
    optimizer: optax.GradientTransformationExtraArgs,
    variables: Mapping[str, Variable] = VARIABLES,
) -> TrainState:
    """Return the state before the first step.

    Args:
      start: what the run starts with.
      optimizer: initialises its state from all parameters.
      variables: the declared leaves.
    """
    config = start.shape.model
    params = gpt.init(config, jax.random.fold_in(jax.random.key(start.settings.run.seed), 0))
    sizes = gpt_axis_sizes(config)
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        variables={name: each.begin(start, sizes) for name, each in variables.items()},
    )


def gates_of(variables: Mapping[str, Any]) -> Gates:
    """Return the run-time factors of the forward pass from the variables that hold them."""
    return {gate: variables[name] for gate, name in GATES.items()}


def with_fading_layers(state: TrainState) -> TrainState:
    """Return the state with the gates of fading layers set for its step."""
    gate, steps = state["layer_gate"], state["fade_steps"]
    passed = (state["step"] - state["fade_start"]).astype(gate.dtype)
    part = jnp.clip(passed / jnp.maximum(steps, 1).astype(gate.dtype), 0, 1)
    return state.with_variables(layer_gate=jnp.where(steps > 0, part, gate))
