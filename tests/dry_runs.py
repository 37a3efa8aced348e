"""A dry run without the command line's own work, for tests of very many files."""

from pathlib import Path
from typing import Any

from jaxmorph.config.fields import fields_of, with_values
from jaxmorph.config.mesh import parse_mesh
from jaxmorph.config.resolve import checked
from jaxmorph.config.settings import Settings
from jaxmorph.config.settings_file import read_settings
from jaxmorph.config.sources import Sources
from jaxmorph.growth.dry_run import read_curve, simulate, simulation_report, walk_report
from jaxmorph.growth.plan import Plan, make_plan
from jaxmorph.growth.summary import describe


def planned(config: Path | None, **flags: Any) -> Plan:
    """The plan of a settings file and flags; raises InputError as the command would refuse them."""
    values = read_settings(config, fields_of(Settings)) if config else {}
    sources = Sources(str(config), frozenset(values), frozenset(flags))
    settings = checked(with_values(Settings(), {**values, **flags}), sources, config)
    return make_plan(settings, parse_mesh(settings.scale.mesh))


def told(plan: Plan, curve: Path | None = None) -> str:
    """What the dry run of a plan prints."""
    optimizer, total = plan.settings.optimizer, plan.total_steps
    parts = [describe(plan.settings, plan.start, total=total), walk_report(plan.stages, optimizer)]
    if curve:
        points = read_curve(curve)
        firings = simulate(plan.entries, points, min_change=0.001, total=total)
        parts.append(simulation_report(plan.entries, firings, total or points[-1][0]))
    return "\n".join(parts)
