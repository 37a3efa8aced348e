"""The compiled programs of a stage: one gradient, one update, one evaluation.

A training step is `accumulate` once per micro-batch, then `update`. The number of micro-batches is a
loop on the host and reaches `update` as an array, so that changing it compiles nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmorph.config.settings import ModelConfig, OptimizerSettings
from jaxmorph.model import gpt
from jaxmorph.model.architecture import frozen_parameters, gpt_signatures
from jaxmorph.model.blocks import Gates, Params
from jaxmorph.model.precision import parameter_dtype
from jaxmorph.step.optimizer import global_norm, make_optimizer, plateau_transform
from jaxmorph.step.schedules import lr_multiplier_at, schedule_shape
from jaxmorph.step.sharding import batch_sharding, replicated, state_shardings
from jaxmorph.step.state import TrainState, opened

Sums = dict[str, Any]  # "gradients" like the parameters, "loss" a scalar: sums over micro-batches
Metrics = dict[str, jax.Array]  # scalars
Scalar = jax.Array | np.ndarray | np.generic
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Programs:
    """What a stage runs. Each is jitted with its shardings; the first call compiles it."""

    init: Callable[[], TrainState]
    """() -> state before the first step."""
    zero_sums: Callable[[], Sums]
    """() -> sums over no micro-batch."""
    accumulate: Callable[[TrainState, Sums, jax.Array, Scalar], Sums]
    """(state, sums, batch [B, T + 1], index of the micro-batch) -> sums; consumes the old sums."""
    update: Callable[[TrainState, Sums, Scalar], tuple[TrainState, Sums, Metrics]]
    """(state, sums, number of micro-batches) -> state, zero sums, metrics; consumes both."""
    evaluate: Callable[[Params, Gates, jax.Array], Metrics]
    """(parameters, gates, batch [B, T + 1]) -> mean loss and accuracy."""
    observe: Callable[[TrainState, Scalar], TrainState]
    """(state, validation loss) -> state with reduce_on_plateau advanced; consumes the state."""
    optimizer: optax.GradientTransformationExtraArgs
    state_shardings: TrainState
    abstract_state: TrainState

    def compiled(self, batch: Shape, validation: Shape) -> Programs:
        """Return the same programs, compiled now for batches of these shapes rather than when called.

        Args:
          batch: (B, T + 1) of a training batch, over all devices.
          validation: (B, T + 1) of a validation batch.
        """
        state, sums = self.abstract_state, jax.eval_shape(self.zero_sums)
        count, tokens = np.int32(0), jnp.int32
        loss = jax.ShapeDtypeStruct((), state.plateau.avg_value.dtype)
        arguments = {
            "zero_sums": (),
            "accumulate": (state, sums, jax.ShapeDtypeStruct(batch, tokens), count),
            "update": (state, sums, count),
            "evaluate": (state.params, state.gates, jax.ShapeDtypeStruct(validation, tokens)),
            "observe": (state, loss),
        }
        programs: dict[str, Any] = {name: getattr(self, name) for name in arguments}
        return dataclasses.replace(
            self, **{n: p.lower(*arguments[n]).compile() for n, p in programs.items()}
        )


def make_programs(
    config: ModelConfig,
    settings: OptimizerSettings,
    mesh: Mesh,
    build_state: Callable[[optax.GradientTransformationExtraArgs], TrainState],
) -> Programs:
    """Return the programs that train and evaluate `config` on `mesh`.

    Args:
      config: the architecture of the stage.
      settings: the update rule and the schedule.
      mesh: where arrays lie.
      build_state: makes the initial state, given the optimizer (see `state.new_state`).
    """
    signatures = gpt_signatures(config)
    optimizer = make_optimizer(settings, signatures, frozen_parameters(config))
    abstract = jax.eval_shape(lambda: build_state(optimizer))
    shardings = state_shardings(mesh, abstract, signatures)
    batches, everywhere = batch_sharding(mesh), replicated(mesh)
    sums_shardings = {"gradients": shardings.params, "loss": everywhere}
    options = _compiler_options(mesh.devices.flat[0].platform)
    learning_rate = learning_rate_of(settings)

    def constrain(x_BTD: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x_BTD, batches)

    def zero_sums() -> Sums:
        gradients = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), abstract.params)
        return {"gradients": gradients, "loss": jnp.zeros((), parameter_dtype(config))}

    def accumulate(state: TrainState, sums: Sums, tokens_BT: jax.Array, index: jax.Array) -> Sums:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        key = jax.random.fold_in(key, index) if config.dropout else None

        def mean_loss(params: Params) -> tuple[jax.Array, jax.Array]:
            return gpt.loss(
                config, params, tokens_BT, gates=state.gates, dropout_key=key, constrain=constrain
            )

        (loss, _), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        return jax.tree.map(jnp.add, sums, {"gradients": gradients, "loss": loss})

    def update(state: TrainState, sums: Sums, count: jax.Array) -> tuple:
        mean = jax.tree.map(lambda total: total / count.astype(total.dtype), sums)
        state, metrics = apply_gradients(optimizer, learning_rate, state, mean)
        return opened(state), jax.tree.map(jnp.zeros_like, sums), metrics

    def evaluate(params: Params, gates: Gates, tokens_BT: jax.Array) -> Metrics:
        loss, accuracy = gpt.loss(config, params, tokens_BT, gates=gates, constrain=constrain)
        return {"loss": loss, "accuracy": accuracy}

    def observe(state: TrainState, loss: jax.Array) -> TrainState:
        if settings.scheduler != "reduce_on_plateau":
            return state
        value = loss.astype(state.plateau.avg_value.dtype)
        _, plateau = plateau_transform(settings).update({}, state.plateau, value=value)
        return dataclasses.replace(state, plateau=plateau)

    return Programs(
        init=jax.jit(lambda: build_state(optimizer), out_shardings=shardings),
        zero_sums=jax.jit(zero_sums, out_shardings=sums_shardings),
        accumulate=jax.jit(
            accumulate,
            in_shardings=(shardings, sums_shardings, batches, None),
            out_shardings=sums_shardings,
            donate_argnums=1,
            compiler_options=options,
        ),
        update=jax.jit(
            update,
            in_shardings=(shardings, sums_shardings, None),
            out_shardings=(shardings, sums_shardings, everywhere),
            donate_argnums=(0, 1),
        ),
        evaluate=jax.jit(
            evaluate,
            in_shardings=(shardings.params, shardings.gates, batches),
            out_shardings=everywhere,
            compiler_options=options,
        ),
        observe=jax.jit(
            observe, in_shardings=(shardings, None), out_shardings=shardings, donate_argnums=0
        ),
        optimizer=optimizer,
        state_shardings=shardings,
        abstract_state=abstract,
    )


def _compiler_options(platform: str) -> dict[str, Any]:
    """Return XLA's options for the programs that run the model.

    On CPU XLA hands most products of matrices to Eigen. With YNNPACK, of which it makes little use by
    itself, the pass forward and back takes 6 to 8 % less time in float32 and 14 % less in bfloat16
    (`benchmarks/results/step_time.md`). What `XLA_FLAGS` says of it stands.
    """
    flag = "xla_cpu_experimental_ynn_fusion_type"
    if platform != "cpu" or flag in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {flag: "LIBRARY_FUSION_TYPE_DOT"}


def learning_rate_of(settings: OptimizerSettings) -> Callable[[TrainState], jax.Array]:
    """Return the function giving the learning rate of a state's next update."""
    factor = lr_multiplier_at(schedule_shape(settings))

    def learning_rate(state: TrainState) -> jax.Array:
        knobs = state.knobs
        peak = settings.learning_rate * knobs.lr_multiplier
        scheduled = factor(state.step, knobs.schedule_start, knobs.warmup_steps, knobs.total_steps)
        return peak * scheduled.astype(peak.dtype) * state.plateau.scale.astype(peak.dtype)

    return learning_rate


def apply_gradients(
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: Callable[[TrainState], jax.Array],
    state: TrainState,
    mean: Sums,
) -> tuple[TrainState, Metrics]:
    """Return the state after one update, and the metrics of the step.

    Where the loss or the gradient is not finite the update is skipped: the step advances, the
    parameters and the optimizer's state stay as they were, and the counters say so.

    Args:
      optimizer: see `optimizer.make_optimizer`.
      learning_rate: see `learning_rate_of`.
      state: the state before the update.
      mean: mean "gradients" and "loss" over the step's micro-batches.
    """
    norm, rate = global_norm(mean["gradients"]), learning_rate(state)
    finite = jnp.isfinite(norm) & jnp.isfinite(mean["loss"])
    updates, opt_state = optimizer.update(
        mean["gradients"], state.opt_state, state.params, learning_rate=rate
    )
    new = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(
        lambda a, b: jnp.where(finite, a, b), new, (state.params, state.opt_state)
    )
    skip = 1 - finite.astype(jnp.int32)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + skip,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skip,
    )
    metrics = {
        "loss": mean["loss"],
        "grad_norm": norm,
        "learning_rate": rate,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    return state, metrics
