"""What a run still has to do: the steps of each stage ahead, and what a step and an evaluation cost.

When an operation will fire is not known if the loss decides. One with a longest wait is taken to use
all of it; one without is taken to fire after an equal share of the steps that are left: half of
them if it is the last entry, a third if one more follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxmorph.config.run_shape import RunShape
from jaxmorph.growth.plan import Stage
from jaxmorph.model.architecture import flops_per_token


class Span(NamedTuple):
    """The steps expected in a stage: those after `begin`, up to and with `end`."""

    stage: Stage
    begin: int
    end: int


def stages_ahead(
    stages: Sequence[Stage],
    total: int,
    *,
    stage: int = 0,
    step: int = 0,
    last_operation_step: int = 0,
) -> Iterator[Span]:
    """Yield what is left of the present stage, then every stage expected before the run ends.

    Args:
      stages: of the plan.
      total: the step the run ends at.
      stage: the number of the present stage.
      step: steps taken.
      last_operation_step: the step of the last operation; 0 before the first.
    """
    begin, last = step, last_operation_step
    for number in range(stage, len(stages) - 1):
        entry = stages[number + 1].entry
        assert entry is not None
        if entry.max_wait_iters is not None:
            fires = max(begin, last + entry.max_wait_iters)
        else:
            fires = begin + (total - begin) // (len(stages) - number)
        if fires >= total:
            yield Span(stages[number], begin, total)
            return
        yield Span(stages[number], begin, fires)
        begin = last = fires
    yield Span(stages[-1], begin, total)


def tokens_per_step(shape: RunShape) -> int:
    """Return the tokens that an update trains on."""
    return shape.batch_size * shape.grad_accum_steps * shape.model.seq_len


def step_flops(shape: RunShape) -> int:
    """Return the floating-point operations of an update."""
    return tokens_per_step(shape) * flops_per_token(shape.model, shape.frozen_layers)


def evaluation_flops(shape: RunShape, batch_size: int) -> int:
    """Return the floating-point operations of an evaluation: a third of training's on its tokens.

    Args:
      shape: the run's shape.
      batch_size: sequences in a validation batch.
    """
    tokens = shape.eval_iters * batch_size * shape.model.seq_len
    return tokens * flops_per_token(shape.model) // 3
