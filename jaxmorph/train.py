"""Train: `python -m jaxmorph.train [--config FILE.yaml] [--flag value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxmorph.cli.command_line import run_door
from jaxmorph.config.resolve import parse_mesh, resolve
from jaxmorph.config.settings import Settings
from jaxmorph.config.start import known_vocab_size, total_steps
from jaxmorph.growth.dry_run import read_curve, simulate, simulation_report, walk_report
from jaxmorph.growth.operations import describe_operations
from jaxmorph.growth.plan import Plan, make_plan
from jaxmorph.growth.summary import describe
from jaxmorph.system.host_memory import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door and return its exit status (see `--help`)."""
    return run_door(lambda: _train(sys.argv[1:] if argv is None else argv))


def _train(argv: Sequence[str]) -> int:
    if any(word.replace("-", "_") == "__help_operations" for word in argv):
        print(describe_operations())
        return 0
    settings, sources = resolve(argv)
    vocab_size, total = known_vocab_size(settings), total_steps(settings, None)
    mesh = parse_mesh(settings.scale.mesh)
    plan = make_plan(settings, mesh, vocab_size=vocab_size, total=total)
    if settings.run.dry_run:
        print(_dry_run(settings, plan, total))
        return 0
    keep_freed_memory()
    from jaxmorph.training.loop import (
        train,  # JAX is imported only once the settings are known to be good
    )

    return train(settings, sources)


def _dry_run(settings: Settings, plan: Plan, total: int | None) -> str:
    parts = [describe(settings, plan.start, total=total)]
    parts += [f"warning: {warning}" for warning in plan.stages[0].warnings]
    if plan.entries:
        parts.append(walk_report(plan.stages, settings.optimizer))
        if not plan.start.model.vocab_size:
            parts.append(
                "The vocabulary, known once the corpus is read, comes on top of each model."
            )
    if settings.growth.simulate_loss:
        curve = read_curve(Path(settings.growth.simulate_loss))
        end = curve[-1][0] if total is None else total
        firings = simulate(plan.entries, curve, end)
        parts.append(simulation_report(plan.entries, firings, end))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
