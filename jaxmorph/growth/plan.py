"""A run's plan: the schedule's entries, and every stage they lead it through, known beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import Settings
from jaxmorph.config.start import start_shape, start_warnings
from jaxmorph.growth.schedule import Entry, Stage, load_schedule, walk


@dataclass(frozen=True)
class Plan:
    """What a run is going to do.

    Args:
      entries: the operations, in the order they fire.
      stages: stage k is the run after k of them.
    """

    entries: tuple[Entry, ...]
    stages: tuple[Stage, ...]

    @property
    def start(self) -> RunShape:
        """Return what the run starts with."""
        return self.stages[0].shape


def make_plan(
    settings: Settings, mesh: Mapping[str, int], *, vocab_size: int | None, total: int | None
) -> Plan:
    """Return the plan that the settings make, without a schedule one of a single stage.

    Args:
      settings: the checked settings.
      mesh: size of each mesh axis.
      vocab_size: of the tokenizer; None where it is not known yet.
      total: steps of the run; None where they are not known yet.

    Raises:
      InputError: a schedule that cannot be read, or an operation that cannot be done.
    """
    start = start_shape(settings, vocab_size, total)
    file = settings.growth.scaling_schedule_file
    entries = () if file is None else load_schedule(Path(file))
    limit = None if settings.optimizer.allow_warmup_past_end else total
    first, *later = walk(entries, start, mesh, str(file), limit)
    first = dataclasses.replace(first, warnings=tuple(start_warnings(settings, start)))
    return Plan(entries, (first, *later))
