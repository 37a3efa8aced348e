"""The compiled programs of a stage: one gradient, one update, one evaluation.

A training step is `accumulate` once per micro-batch, then `update`. The number of micro-batches is a
loop on the host, so that changing it compiles nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmorph.model.measures import Measures
from jaxmorph.model.trainable import trainable_of
from jaxmorph.step.head_measures import HeadMeasures
from jaxmorph.step.heads import head_profile
from jaxmorph.step.parts import Parts
from jaxmorph.step.sharding import (
    batch_sharding,
    replicated,
    shardings_like_parameters,
    state_shardings,
)
from jaxmorph.step.state import Start, TrainState, new_state
from jaxmorph.step.task import Batch
from jaxmorph.step.training_step import Metrics, Sums, TrainingStep

Scalar = jax.Array | np.ndarray | np.generic

_XLA_CHOOSES_WELL = tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 12)  # on CPU


@dataclass(frozen=True)
class Programs:
    """The programs of a stage. Each is jitted with its shardings; the first call compiles it."""

    init: Callable[[], TrainState]
    """() -> state before the first step."""
    zero_sums: Callable[[], Sums]
    """() -> zero sums."""
    accumulate: Callable[[TrainState, Sums, Batch, Scalar], Sums]
    """(state, sums, batch, index of the micro-batch) -> sums; consumes the old sums."""
    update: Callable[[TrainState, Sums], tuple[TrainState, Sums, Metrics]]
    """(state, sums) -> state, zero sums, metrics; consumes both."""
    evaluate: Callable[[TrainState, Batch], Measures]
    """(state, batch) -> what the task measures, as sums with counts."""
    observe: Callable[[TrainState, Scalar], TrainState]
    """(state, validation loss) -> state with reduce_on_plateau advanced; consumes the state."""
    measure_heads: Callable[[TrainState, Batch], HeadMeasures]
    """(state, batch) -> measures of every head; see `head_measures.measure_heads`. Few runs need it, so
    `compiled` leaves it as it is."""
    optimizer: optax.GradientTransformationExtraArgs
    state_shardings: TrainState
    abstract_state: TrainState

    def compiled(self, batch: Batch, validation: Sequence[Batch]) -> Programs:
        """Return the same programs, compiled ahead of time for batches of these shapes.

        Args:
          batch: shapes and dtypes of a training batch, over all devices.
          validation: shapes and dtypes of each distinct validation batch.
        """
        state, sums = self.abstract_state, jax.eval_shape(self.zero_sums)
        loss = jax.ShapeDtypeStruct((), state["plateau"].avg_value.dtype)
        arguments = {
            "zero_sums": (),
            "accumulate": (state, sums, batch, np.int32(0)),
            "update": (state, sums),
            "observe": (state, loss),
        }
        programs: dict[str, Any] = {name: getattr(self, name) for name in arguments}
        made = {name: p.lower(*arguments[name]).compile() for name, p in programs.items()}
        jitted: Any = self.evaluate
        evaluate = _EvaluateByShape(lambda spec: jitted.lower(state, spec).compile(), validation)
        return dataclasses.replace(self, **made, evaluate=evaluate)

    def compiled_for_heads(self, batch: Batch) -> Programs:
        """Return the same programs, with those that measure heads compiled for a batch of this shape.

        Args:
          batch: shapes and dtypes of a batch that heads are measured on, over all devices.
        """
        state = self.abstract_state
        programs: dict[str, Any] = {n: getattr(self, n) for n in ("measure_heads", "evaluate")}
        made = {name: p.lower(state, batch).compile() for name, p in programs.items()}
        return dataclasses.replace(self, **made)


def make_programs(start: Start, mesh: Mesh, parts: Parts) -> Programs:
    """Return the programs that train and evaluate a stage.

    Args:
      start: the settings, the stage's shape and the run's length.
      mesh: the device mesh.
      parts: the components of the step.
    """
    trainable, batches = trainable_of(start.shape), batch_sharding(mesh)
    optimizer = parts.make_optimizer(start.settings.optimizer, trainable)

    def init() -> TrainState:
        return new_state(start, optimizer, parts.variables)

    def constrain(x_BTD: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x_BTD, batches)

    abstract = jax.eval_shape(init)
    step = TrainingStep(
        start.shape,
        start.settings.optimizer,
        parts,
        trainable,
        optimizer,
        constrain,
        head_profile(start.settings.heads),
        start.settings.run.log_interval,
    )
    shardings = state_shardings(mesh, abstract, trainable.signatures, parts)
    return Programs(
        init=jax.jit(init, out_shardings=shardings),
        **_compilable(step, mesh, shardings),
        optimizer=optimizer,
        state_shardings=shardings,
        abstract_state=abstract,
    )


def _compilable(step: TrainingStep, mesh: Mesh, state: TrainState) -> dict[str, Any]:
    """Return the functions of a training step, jitted; `state` holds the shardings of the state."""
    batches, everywhere = batch_sharding(mesh), replicated(mesh)
    options = _compiler_options(mesh.devices.flat[0].platform)
    abstract = jax.eval_shape(step.zero_sums)
    sums = shardings_like_parameters(mesh, abstract, step.trainable.signatures)
    return {
        "zero_sums": jax.jit(step.zero_sums, out_shardings=sums),
        "accumulate": jax.jit(
            step.accumulate,
            in_shardings=(state, sums, batches, None),
            out_shardings=sums,
            donate_argnums=1,
            compiler_options=options,
        ),
        "update": jax.jit(
            step.update,
            in_shardings=(state, sums),
            out_shardings=(state, sums, everywhere),
            donate_argnums=(0, 1),
        ),
        "evaluate": jax.jit(
            step.evaluate,
            in_shardings=(state, batches),
            out_shardings=everywhere,
            compiler_options=options,
        ),
        "measure_heads": jax.jit(
            step.measure_heads,
            in_shardings=(state, batches),
            out_shardings=everywhere,
            compiler_options=options,
        ),
        "observe": jax.jit(
            step.observe, in_shardings=(state, None), out_shardings=state, donate_argnums=0
        ),
    }


def batch_spec(batch: Batch) -> Batch:
    """Return the shapes and dtypes of a batch."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)


def distinct_specs(batches: Sequence[Batch]) -> list[Batch]:
    """Return the distinct shapes and dtypes of batches."""
    return list({_key(batch): batch_spec(batch) for batch in batches}.values())


def _key(batch: Batch) -> tuple:
    return tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))


class _EvaluateByShape:
    """An evaluation compiled for each batch shape: known ones now, others on first use."""

    def __init__(self, compile_for: Callable[[Batch], Any], known: Sequence[Batch]):
        self._compile_for = compile_for
        self._compiled = {_key(spec): compile_for(spec) for spec in known}

    def __call__(self, state: TrainState, batch: Batch) -> Measures:
        key = _key(batch)
        if key not in self._compiled:
            self._compiled[key] = self._compile_for(batch_spec(batch))
        return self._compiled[key](state, batch)


def _compiler_options(platform: str) -> dict[str, Any]:
    """Return XLA's options for the programs that run the model.

    Before jaxlib 0.12 XLA runs most matmuls on CPU with Eigen. With YNNPACK the forward and backward
    pass takes 6 to 8 % less time in float32 and 14 % less in bfloat16. Later ones choose well by
    themselves, and the option would keep them from multiplying bfloat16 as such
    (`benchmarks/results/step_time.md`). Its setting in `XLA_FLAGS` takes precedence.
    """
    flag = "xla_cpu_experimental_ynn_fusion_type"
    if platform != "cpu" or _XLA_CHOOSES_WELL or flag in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {flag: "LIBRARY_FUSION_TYPE_DOT"}
