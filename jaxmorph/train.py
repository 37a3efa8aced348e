"""Train: `python -m jaxmorph.train [--config FILE.yaml] [--flag value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmorph.cli.command_line import run_command
from jaxmorph.cli.printing import say
from jaxmorph.config.mesh import parse_mesh
from jaxmorph.config.resolve import resolve
from jaxmorph.growth.dry_run import (
    memory_report,
    read_curve,
    simulate,
    simulation_report,
    walk_report,
)
from jaxmorph.growth.fitting import Room
from jaxmorph.growth.operations import OPERATIONS, describe_operations
from jaxmorph.growth.plan import Plan, make_plan
from jaxmorph.growth.summary import describe
from jaxmorph.system.host_memory import has_accelerator, keep_freed_memory, memory_limits

if TYPE_CHECKING:
    from jaxmorph.training.tables import Tables
    from jaxmorph.training.turns import Turn


def main(
    argv: Sequence[str] | None = None,
    tables: Tables | None = None,
    turns: Sequence[Turn] | None = None,
) -> int:
    """Run the command and return its exit status (see `--help`).

    Args:
      argv: the words after the program's name; None: the process's own.
      tables: the tables that define the run; None: the package's own.
      turns: what happens after each step; None: the package's own.
    """
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _train(words, tables, turns))


def _train(argv: Sequence[str], tables: Tables | None, turns: Sequence[Turn] | None) -> int:
    operations = OPERATIONS if tables is None else tables.operations
    if any(word.replace("-", "_") == "__help_operations" for word in argv):
        say(describe_operations(operations))
        return 0
    settings, sources = resolve(argv)
    plan = make_plan(settings, parse_mesh(settings.scale.mesh), operations)
    if settings.run.dry_run:
        say(_dry_run(plan))
        return 0
    keep_freed_memory()
    from jaxmorph.training.loop import train  # imports JAX, so only after the settings are checked

    return train(plan, sources, tables, turns)


def _dry_run(plan: Plan) -> str:
    settings, total = plan.settings, plan.total_steps
    parts = [describe(settings, plan.start, total=total)]
    parts += [f"warning: {warning}" for warning in plan.stages[0].warnings]
    report = walk_report if plan.entries else memory_report
    if plan.entries or plan.start.model.vocab_size:
        parts.append(report(plan.stages, settings.optimizer, plan.mesh, _host_room(plan)))
    if plan.entries and not plan.start.model.vocab_size:
        parts.append(
            "The vocabulary, known once the corpus is read, is not included in the models."
        )
    if settings.growth.simulate_loss:
        curve = read_curve(Path(settings.growth.simulate_loss))
        end = curve[-1][0] if total is None else total
        min_change = settings.growth.plateau_min_change
        firings = simulate(plan.entries, curve, min_change=min_change, total=end)
        parts.append(simulation_report(plan.entries, firings, end))
    return "\n".join(parts)


def _host_room(plan: Plan) -> Room:
    """Return the memory that is known without JAX: the host's, which a CPU's devices share."""
    if has_accelerator():
        return Room()
    return Room(memory_limits(), sharing=1 if plan.mesh is None else plan.mesh.size)


if __name__ == "__main__":
    sys.exit(main())
