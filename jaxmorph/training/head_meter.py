"""Measure the heads of a run on a few training batches that are always the same.

They are cut from the training split as the run's are, in another order: reading them does not move the
run's position, and validation text stays unseen, so that it can judge what follows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.run_shape import RunShape
from jaxmorph.data.token_files import Tokens
from jaxmorph.step.heads import CLOSED_GATE
from jaxmorph.step.programs import Programs
from jaxmorph.step.sharding import place_batch
from jaxmorph.step.state import TrainState
from jaxmorph.step.task import Batch, Task

_PART = 8  # of a training batch's rows: what is measured between two updates must cost little
_OTHER_ORDER = 1 << 31  # added to the run's seed

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class HeadMeter:
    """Measures the heads of a stage's model. Nothing is read or compiled before the first measurement.

    Args:
      mesh: the device mesh.
      task: what is learned.
      get_programs: returns the stage's programs, compiled for the batches.
      get_batches: reads the batches.
    """

    mesh: Mesh
    task: Task
    get_programs: Callable[[], Programs]
    get_batches: Callable[[], list[Batch]]

    def measures(self, state: TrainState) -> dict[str, np.ndarray]:
        """Return the measures of each head, [layer, head] by name, as means over the batches.

        Args:
          state: a state of the stage.
        """
        found = [self._programs.measure_heads(state, batch) for batch in self._placed()]
        parts = jax.device_get(found)
        return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}

    def ablation(self, state: TrainState, heads: Iterable[Head]) -> np.ndarray:
        """Return by how much the loss on the batches rises if one head is closed, for each of `heads`.

        Args:
          state: a state of the stage.
          heads: (layer, head) of each head to close.

        Returns:
          [layer, head] float64; NaN for heads that were not asked for, or are closed anyway.
        """
        gates = np.asarray(state["head_gate"])
        rises = np.full(gates.shape, np.nan)
        chosen = [head for head in heads if gates[head] > CLOSED_GATE]
        if chosen:
            alternatives = [gates, *(_without(gates, head) for head in chosen)]
            before, *after = self.losses(state, alternatives)
            for head, loss in zip(chosen, after, strict=True):
                rises[head] = loss - before
        return rises

    def losses(self, state: TrainState, alternatives: Sequence[np.ndarray]) -> list[float]:
        """Return the loss on the batches under each of several gates [layer, head].

        Args:
          state: a state of the stage.
          alternatives: the gates of all heads, instead of the state's.
        """
        placed, where = list(self._placed()), self._programs.state_shardings["head_gate"]
        results = []
        for gates in alternatives:
            array = jax.device_put(gates.astype(state["head_gate"].dtype), where)
            other = state.with_variables(head_gate=array)
            results.append([self._programs.evaluate(other, batch) for batch in placed])
        return [self._loss(parts) for parts in jax.device_get(results)]

    def _loss(self, parts: Sequence[Any]) -> float:
        """Return the loss over batches, of what each of them measured."""
        name = self.task.loss
        total, count = (math.fsum(part[name][k] for part in parts) for k in (0, 1))
        return float(np.divide(total, count))

    def _placed(self) -> Iterable[Batch]:
        return (place_batch(self.mesh, batch) for batch in self._batches)

    @cached_property
    def _programs(self) -> Programs:
        return self.get_programs()

    @cached_property
    def _batches(self) -> list[Batch]:
        return self.get_batches()


def _without(gates: np.ndarray, head: Head) -> np.ndarray:
    """Return the gates with one head closed."""
    gates = gates.copy()
    gates[head] = 0
    return gates


def head_batch_rows(shape: RunShape, mesh: MeshShape) -> int:
    """Return the examples of a batch that heads are measured on: an eighth of a training batch.

    It is rounded down, then up to what divides over the devices.
    """
    parts = mesh.batch_parts
    return -(-max(1, shape.batch_size // _PART) // parts) * parts


def head_batches(
    task: Task, tokens: Tokens, *, seq_len: int, seed: int, rows: int, count: int
) -> list[Batch]:
    """Return the batches that heads are measured on, the same ones each time.

    Args:
      task: what is learned.
      tokens: the training split.
      seq_len: tokens read per example.
      seed: of the run.
      rows: examples of a batch.
      count: how many batches.
    """
    stream = task.stream(tokens, seq_len=seq_len, seed=(seed + _OTHER_ORDER) % (1 << 32))
    with contextlib.closing(stream.batches(0, rows)) as batches:
        return list(itertools.islice(batches, count))
