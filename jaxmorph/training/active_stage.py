"""The objects that the loop uses between two operations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxmorph.growth.forecast import step_flops, tokens_per_step
from jaxmorph.growth.plan import Stage
from jaxmorph.model.architecture import parameter_count
from jaxmorph.step.programs import Programs
from jaxmorph.step.task import Batch, Stream
from jaxmorph.training.head_meter import HeadMeter
from jaxmorph.training.position import Position


@dataclass(frozen=True)
class ActiveStage:
    """The objects that the loop uses between two operations.

    Args:
      stage: of the plan.
      programs: step and evaluation, compiled.
      stream: training examples of the stage's context length.
      validation: the validation batches.
      heads: measures the model's heads.
    """

    stage: Stage
    programs: Programs
    stream: Stream
    validation: list[Batch]
    heads: HeadMeter

    @property
    def examples_per_step(self) -> int:
        """Return the number of examples per update."""
        return self.stage.shape.batch_size * self.stage.shape.grad_accum_steps

    def after_step(self, position: Position) -> Position:
        """Return the position after one more update."""
        shape = self.stage.shape
        return dataclasses.replace(
            position,
            step=position.step + 1,
            examples=position.examples + self.examples_per_step,
            tokens=position.tokens + tokens_per_step(shape),
            flops=position.flops + step_flops(shape),
        )

    def moved_from(self, before: ActiveStage, position: Position) -> Position:
        """Convert a position of the previous stage to this one's stream of examples.

        It does not depend on the batch. With another context length the text is cut into other windows
        in another order; the run continues at the same fraction of the epoch.
        """
        if self.stage.shape.model.seq_len == before.stage.shape.model.seq_len:
            return position
        per_epoch = before.stream.examples_per_epoch, self.stream.examples_per_epoch
        examples = position.examples * per_epoch[1] // per_epoch[0]
        return dataclasses.replace(position, examples=examples)

    def totals(self, position: Position) -> dict[str, int]:
        """Return the fields of a full line of metrics.jsonl for a position."""
        shape = self.stage.shape
        return {
            "step": position.step,
            "stage": self.stage.number,
            "tokens": position.tokens,
            "flops": position.flops,
            "params": parameter_count(shape.model),
            "batch_size": shape.batch_size,
            "grad_accum_steps": shape.grad_accum_steps,
        }
