"""The tables that define a run, as one value that code outside the package can extend.

Nothing registers itself: to add an operation, metric or leaf of the state, pass a table with one more
line, for example

    Tables(operations={**OPERATIONS, "shuffle_heads": Operation(...)}, morphs={**MORPHS, ...})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxmorph.growth.operations import OPERATIONS, Operation
from jaxmorph.morphs.gpt import MORPHS, Morph
from jaxmorph.step.parts import Parts
from jaxmorph.training.adjustments import ADJUSTMENTS, Adjustment


@dataclass(frozen=True)
class Tables:
    """The tables that define a run.

    Args:
      step: the components of a training step: task, variables, metrics, optimizer.
      operations: the operations available to a schedule.
      morphs: what each morph among the operations does to the arrays, by name.
      adjustments: what a hyperparameter operation sets besides the variables named like the fields of
        the run's shape that it changes: (entry, state) -> values by variable.
    """

    step: Parts = field(default_factory=Parts)
    operations: Mapping[str, Operation] = field(default_factory=lambda: OPERATIONS)
    morphs: Mapping[str, Morph] = field(default_factory=lambda: MORPHS)
    adjustments: Mapping[str, Adjustment] = field(default_factory=lambda: ADJUSTMENTS)

    def __post_init__(self) -> None:
        morphs = {o.name for o in self.operations.values() if o.kind == "morph"}
        if missing := morphs - self.morphs.keys():
            raise ValueError(f"morphs without a function: {', '.join(sorted(missing))}")
        if unknown := self.adjustments.keys() - (self.operations.keys() - morphs):
            raise ValueError(f"adjustments of no operation: {', '.join(sorted(unknown))}")
