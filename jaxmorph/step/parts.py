"""The tables that define a training step, as one value that other code can extend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import optax

from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.model.named_axes import NamedAxes
from jaxmorph.model.trainable import Trainable
from jaxmorph.step.metrics import RUN_METRICS, Metric
from jaxmorph.step.optimizer import make_optimizer
from jaxmorph.step.state import VARIABLES, Variable
from jaxmorph.step.task import LANGUAGE_MODELLING, Task

MakeOptimizer = Callable[[OptimizerSettings, Trainable], optax.GradientTransformationExtraArgs]


@dataclass(frozen=True)
class Parts:
    """The components of a training step.

    Args:
      task: what is learned.
      variables: the leaves of the state that are neither parameters nor moments.
      run_metrics: the metrics of any run; the task has its own.
      make_optimizer: see `optimizer.make_optimizer`.
      optimizer_fields: how fields of the optimizer's state move that the package does not know: the
        axes of one that mirrors no parameter, else as `fields` of `morphs.apply`.
    """

    task: Task = LANGUAGE_MODELLING
    variables: Mapping[str, Variable] = field(default_factory=lambda: VARIABLES)
    run_metrics: tuple[Metric, ...] = RUN_METRICS
    make_optimizer: MakeOptimizer = make_optimizer
    optimizer_fields: Mapping[str, float | str | NamedAxes] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Return the metrics of the task and of any run."""
        return (*self.task.metrics, *self.run_metrics)

    @property
    def train_loss(self) -> Metric:
        """Return the metric of the loss of a step."""
        return self.task.metric(f"train/{self.task.loss}")
