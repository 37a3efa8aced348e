"""The functions of a training step, not yet compiled: gradient, update, evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.model.architecture import gpt_axis_sizes
from jaxmorph.model.blocks import Params
from jaxmorph.model.measures import Mean, Measures
from jaxmorph.model.precision import parameter_dtype
from jaxmorph.model.trainable import Trainable
from jaxmorph.step.head_measures import HeadMeasures, measure_heads
from jaxmorph.step.heads import CLOSED, HEAD_AXES, OPENED, HeadProfile, judged, without_closed
from jaxmorph.step.optimizer import global_norm, plateau_transform
from jaxmorph.step.parts import Parts
from jaxmorph.step.schedules import lr_multiplier_at, schedule_shape
from jaxmorph.step.state import TrainState, gates_of, with_fading_layers
from jaxmorph.step.task import Batch, added

Metrics = dict[str, jax.Array]  # scalars


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Sums over micro-batches.

    Args:
      gradients: of the task's objective, with the structure of the trained parameters.
      measures: sums with counts, of what a step records.
    """

    gradients: Params
    measures: Measures


@dataclass(frozen=True)
class Update:
    """The facts about an update that metrics are computed from (see `metrics.Metric`).

    Args:
      loss: the loss over the step's micro-batches.
      grad_norm: Euclidean norm of the gradient, before clipping.
      learning_rate: of the update.
      state: the state after it.
      measures: sums with counts over the step's micro-batches.
      head_multipliers: [layer, head], of the learning rate.
    """

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    state: TrainState
    measures: Measures
    head_multipliers: jax.Array

    @property
    def mean_head_multiplier(self) -> jax.Array:
        """Return the mean multiplier of the heads' rates, with 0 for closed ones; 0 without heads."""
        return self.head_multipliers.sum() / max(1, self.head_multipliers.size)

    @property
    def skipped(self) -> jax.Array:
        """Return how many updates of the run were skipped."""
        return self.state["skipped"]


@dataclass(frozen=True)
class TrainingStep:
    """The functions of a stage's programs.

    Args:
      shape: the run's shape.
      settings: the update rule and the schedule.
      parts: the components of the step.
      trainable: what is trained.
      optimizer: of the trained part; it takes all parameters.
      constrain: constrains the sharding of the residual stream.
      heads: the learning rate of a head after it opens.
      log_interval: steps between full lines of the log.
    """

    shape: RunShape
    settings: OptimizerSettings
    parts: Parts
    trainable: Trainable
    optimizer: optax.GradientTransformationExtraArgs
    constrain: Callable[[jax.Array], jax.Array]
    heads: HeadProfile
    log_interval: int

    @property
    def recorded(self) -> tuple[str, ...]:
        """Return the measures that a step records: the loss's terms, and others with a metric."""
        task = self.parts.task
        measured = [m.name for m in task.metrics if m.name.startswith("train/") and m.value is None]
        names = (name.removeprefix("train/") for name in measured)
        return (*task.weights, *(name for name in names if name not in task.weights))

    def zero_sums(self) -> Sums:
        """Return zero sums."""
        model, dtype = self.shape.model, parameter_dtype(self.shape.model)
        sizes = self.trainable.sizes(gpt_axis_sizes(model))
        gradients = {
            tuple(path.split("/")): jnp.zeros(signature.shape(sizes), dtype)
            for path, signature in self.trainable.trained.items()
        }
        zero = Mean(jnp.zeros((), dtype), jnp.zeros((), dtype))
        return Sums(traverse_util.unflatten_dict(gradients), dict.fromkeys(self.recorded, zero))

    def accumulate(self, state: TrainState, sums: Sums, batch: Batch, index: jax.Array) -> Sums:
        """Return the sums after one more micro-batch, the `index`-th of the step."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        key = jax.random.fold_in(key, index) if self.shape.model.dropout else None

        def objective(view: Params) -> tuple[jax.Array, Measures]:
            params = self.trainable.merged(state.params, view)
            measures = self._measure(state, params, batch, key)
            kept = {name: measures[name] for name in sums.measures}
            return self.parts.task.objective(measures), kept

        view = self.trainable.view(state.params)
        (_, measures), gradients = jax.value_and_grad(objective, has_aux=True)(view)
        return Sums(
            jax.tree.map(jnp.add, sums.gradients, gradients), added(sums.measures, measures)
        )

    def update(self, state: TrainState, sums: Sums) -> tuple[TrainState, Sums, Metrics]:
        """Return the state after one update, zero sums, and the metrics of the step.

        If the loss or the gradient is not finite, the update is skipped: the step advances, parameters
        and optimizer state are unchanged, and the counters record it.
        """
        loss = sums.measures[self.parts.task.loss]
        share = 1 / loss.count
        mean = jax.tree.map(lambda g: g * share.astype(g.dtype), sums.gradients)
        status = judged(state["head_status"], state["head_gate"], self.heads.cooldown)
        mean = self._without_closed(mean, status)
        norm, rate = global_norm(mean), learning_rate(self.settings, state)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss.value)
        params, opt_state, status = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b),
            (*self._updated(state, mean, rate, status), status),
            (self.trainable.view(state.params), state.opt_state, state["head_status"]),
        )
        skip = 1 - finite.astype(jnp.int32)
        counts = self._changed_heads(state, status)
        state = dataclasses.replace(
            state, params=self.trainable.merged(state.params, params), opt_state=opt_state
        ).with_variables(
            step=state["step"] + 1,
            skipped=state["skipped"] + skip,
            skipped_in_a_row=(state["skipped_in_a_row"] + 1) * skip,
            head_status=status,
            **counts,
        )
        state = with_fading_layers(state)
        multipliers = self.heads.multipliers(status, state["head_boost"])
        metrics = self._metrics(Update(loss.value, norm, rate, state, sums.measures, multipliers))
        return state, jax.tree.map(jnp.zeros_like, sums), metrics

    def evaluate(self, state: TrainState, batch: Batch) -> Measures:
        """Return what the task measures on a batch."""
        return self._measure(state, state.params, batch, None)

    def measure_heads(self, state: TrainState, batch: Batch) -> HeadMeasures:
        """Return what tells heads that matter from others, on a batch; see `measure_heads`."""
        return measure_heads(
            self.shape.model,
            state.params,
            batch,
            gates=gates_of(state.variables),
            task=self.parts.task,
            constrain=self.constrain,
        )

    def observe(self, state: TrainState, loss: jax.Array) -> TrainState:
        """Return the state with reduce_on_plateau advanced by a validation loss."""
        if self.settings.scheduler != "reduce_on_plateau":
            return state
        plateau = state["plateau"]
        value = loss.astype(plateau.avg_value.dtype)
        _, plateau = plateau_transform(self.settings).update({}, plateau, value=value)
        return state.with_variables(plateau=plateau)

    def _updated(
        self, state: TrainState, mean: Params, rate: jax.Array, status: jax.Array
    ) -> tuple[Params, Any]:
        multipliers = self.heads.multipliers(status, state["head_boost"])
        updates, opt_state = self.optimizer.update(
            mean,
            self._without_closed(state.opt_state, status),
            state.params,
            learning_rate=rate,
            multipliers={HEAD_AXES: self.trainable.layers_of(multipliers)},
        )
        params: Any = optax.apply_updates(self.trainable.view(state.params), updates)
        return params, opt_state

    def _without_closed(self, tree: Any, status: jax.Array) -> Any:
        """Return gradients or moments with those of closed heads at zero."""
        closed = self.trainable.layers_of(status == CLOSED)
        return without_closed(tree, self.trainable.trained, closed)

    def _changed_heads(self, state: TrainState, status: jax.Array) -> dict[str, jax.Array]:
        """Return how many heads have opened and closed since the last full line of the log."""
        before, step = state["head_status"], state["step"]
        full = (step % self.log_interval == 0) | (step == 1) | (step == state["total_steps"])
        now = {
            "newly_activated_heads": (status == OPENED) & (before == CLOSED),
            "newly_pruned_heads": (status == CLOSED) & (before != CLOSED),
        }
        return {
            name: jnp.where(full, 0, state[name]) + heads.sum(dtype=jnp.int32)
            for name, heads in now.items()
        }

    def _metrics(self, update: Update) -> Metrics:
        means = self.parts.task.means(update.measures)
        found = {f"train/{name}": mean for name, mean in means.items()}
        found |= {m.name: m.value(update) for m in self.parts.metrics if m.value is not None}
        return found | {"skipped_in_a_row": update.state["skipped_in_a_row"]}

    def _measure(
        self, state: TrainState, params: Params, batch: Batch, key: jax.Array | None
    ) -> Measures:
        return self.parts.task.measure(
            self.shape.model,
            params,
            batch,
            gates=gates_of(state.variables),
            dropout_key=key,
            constrain=self.constrain,
        )


def learning_rate(settings: OptimizerSettings, state: TrainState) -> jax.Array:
    """Return the learning rate of a state's next update."""
    peak = settings.learning_rate * state["lr_multiplier"]
    scheduled = lr_multiplier_at(schedule_shape(settings))(
        state["step"], state["schedule_start"], state["warmup_steps"], state["total_steps"]
    )
    return peak * scheduled.astype(peak.dtype) * state["plateau"].scale.astype(peak.dtype)
