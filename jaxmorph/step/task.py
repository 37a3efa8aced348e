"""What a run learns: the contents of a batch, the loss and other measures, and their names.

Programs, loop, metrics and report take the names from here. The first task is `LANGUAGE_MODELLING`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmorph.data.examples import ExampleStream, validation_batches
from jaxmorph.data.token_files import Tokens
from jaxmorph.model import gpt
from jaxmorph.model.measures import Mean, Measures
from jaxmorph.step.metrics import LM_METRICS, Metric

Batch = Any  # a pytree of arrays whose first axis is the examples


class Stream(Protocol):
    """An endless stream of training examples."""

    examples_per_epoch: int

    def batches(self, position: int, batch_size: int) -> Generator[Batch, None, None]:
        """Return an endless iterator over batches, starting at example `position`."""
        ...


class MakeStream(Protocol):
    """Make the stream of training examples from tokens [tokens], an array or a file of ids."""

    def __call__(self, tokens: Tokens, *, seq_len: int, seed: int) -> Stream:
        """Return the stream."""
        ...


class MakeValidation(Protocol):
    """Make the validation batches, the same ones each time, from tokens [tokens] as `MakeStream`.

    The first has as many examples as any; the last may have fewer.
    """

    def __call__(
        self, tokens: Tokens, *, seq_len: int, batch_size: int, n_batches: int
    ) -> list[Batch]:
        """Return the batches."""
        ...


@dataclass(frozen=True)
class Task:
    """What a run learns.

    Args:
      name: of the task.
      weights: the weights of the loss's terms, by name. The first is the loss: triggers and figures
        use it. All terms are means over its count, so that they do not depend on how a batch is cut
        into micro-batches; a term that is no sum over examples is given times that count.
      measure: (config, params, batch, gates=, dropout_key=, constrain=) -> sums with counts by name:
        the terms of the loss, and further measures of an evaluation. See `gpt.measure`.
      metrics: describes the names: "train/NAME" for terms, "val/NAME" for all measures.
      stream: makes the training examples from the corpus.
      validation: makes the validation batches.
      spec: (rows, seq_len) -> shapes and dtypes of a training batch.
      inputs: returns the input token ids [rows, T] of a batch.
    """

    name: str
    weights: Mapping[str, float]
    measure: Callable[..., Measures]
    metrics: tuple[Metric, ...]
    stream: MakeStream
    validation: MakeValidation
    spec: Callable[[int, int], Batch]
    inputs: Callable[[Batch], Any]

    def __post_init__(self) -> None:
        named = {metric.name for metric in self.metrics}
        if missing := {f"train/{self.loss}", f"val/{self.loss}"} - named:
            raise ValueError(f"task {self.name!r}: no metric named {', '.join(sorted(missing))}")

    @property
    def loss(self) -> str:
        """Return the name of the loss."""
        return next(iter(self.weights))

    def metric(self, name: str) -> Metric:
        """Return the metric with that name."""
        return next(metric for metric in self.metrics if metric.name == name)

    def objective(self, measures: Measures) -> jax.Array:
        """Return the objective to differentiate on a micro-batch: the weighted totals of its terms.

        Its sum over micro-batches, divided by the sum of the loss's counts, is the weighted sum of
        `means`, however the batch is cut.
        """
        total = jnp.zeros((), measures[self.loss].total.dtype)
        for name, weight in self.weights.items():
            term = measures[name].total
            total = total + (term if weight == 1 else term * jnp.asarray(weight, term.dtype))
        return total

    def means(self, measures: Measures) -> dict[str, Any]:
        """Return the mean of each measure; those of the loss's terms are all over the loss's count."""
        count = measures[self.loss].count
        return {
            name: each.total / (count if name in self.weights else each.count)
            for name, each in measures.items()
        }


def added(first: Measures, second: Measures) -> Measures:
    """Return the combined sums and counts of two parts."""
    return {name: Mean(*map(jnp.add, first[name], second[name])) for name in first}


LANGUAGE_MODELLING = Task(
    name="lm",
    weights={"loss": 1.0},
    measure=gpt.measure,
    metrics=LM_METRICS,
    stream=ExampleStream,
    validation=validation_batches,
    spec=lambda rows, seq_len: jax.ShapeDtypeStruct((rows, seq_len + 1), jnp.int32),
    inputs=lambda tokens_BT: tokens_BT[:, :-1],
)
