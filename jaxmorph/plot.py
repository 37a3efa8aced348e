"""Figures: `python -m jaxmorph.plot {schedule,run,heads,report}`.

`schedule` draws learning-rate schedules without training and prints their key points; `run` draws
the losses of several runs in one figure; `heads` draws the gates and rates of a run's heads over time;
`report` rewrites a run's report.html.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxmorph.cli.command_line import parse_command, program, run_command
from jaxmorph.cli.errors import InputError
from jaxmorph.cli.paths import is_file, is_folder, is_nothing, reason
from jaxmorph.cli.printing import named, say
from jaxmorph.cli.wording import aligned
from jaxmorph.config.checks import check_warmup
from jaxmorph.config.fields import check_flags
from jaxmorph.config.settings import (
    OptimizerSettings,
    Positive,
    PositiveFloat,
    Ratio,
    Scheduler,
    Settings,
    Within,
)
from jaxmorph.config.sources import Sources
from jaxmorph.config.start import warmup_steps
from jaxmorph.step.schedules import (
    KeyPoint,
    key_points,
    schedule_shape,
    shape_in_words,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxmorph.report.head_record import HeadRecord
    from jaxmorph.report.run_record import RunRecord

_KINDS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Schedule:
    """Draw learning-rate schedules and print their key points."""

    total_steps: Positive
    """Steps of the run."""
    max_lr: PositiveFloat = OptimizerSettings.learning_rate
    """Peak learning rate."""
    warmup_steps: Annotated[int | None, Within(low=0, high=2**31 - 1)] = None
    """Steps of warmup. Default: 5 % of the total."""
    min_lr_ratio: Ratio = OptimizerSettings.min_lr_ratio
    """Learning rate at the end, as a fraction of the peak."""
    scheduler: tuple[Scheduler, ...] = (OptimizerSettings.scheduler,)
    """Shapes to draw, several in one figure."""
    save: str | None = None
    """File for the figure (.png, .svg, .pdf). Default: lr_schedule.png."""
    allow_warmup_past_end: bool = False
    """Accept a warmup that does not end before the run does."""
    onecycle_anneal: Literal["cosine", "linear"] = OptimizerSettings.onecycle_anneal
    """Interpolation of the one-cycle schedule."""
    onecycle_start_ratio: Ratio = OptimizerSettings.onecycle_start_ratio
    """Where the one-cycle schedule starts, as a fraction of the peak."""
    wsd_decay_fraction: Annotated[float, Within(above=0, high=1)] = (
        OptimizerSettings.wsd_decay_fraction
    )
    """Fraction of the run that warmup-stable-decay spends decaying."""
    lr_stairs: Annotated[int, Within(low=2, high=10_000)] = OptimizerSettings.lr_stairs
    """Number of equal stairs of the step schedule."""
    lr_power: PositiveFloat = OptimizerSettings.lr_power
    """Power of the polynomial schedule."""


@dataclass(frozen=True)
class Run:
    """Draw the losses of runs against steps, tokens and FLOPs, in one figure."""

    run_dirs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_DIR [RUN_DIR ...]")
    ]
    """Run folders."""
    save: str | None = None
    """File for the figure (.png, .svg, .pdf). Default: runs.png."""


@dataclass(frozen=True)
class Heads:
    """Draw the gate, learning rate and status of each attention head over a run's steps."""

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_DIR")]
    """The run folder."""
    save: str | None = None
    """File for the figure (.png, .svg, .pdf). Default: heads.png in the run folder."""


@dataclass(frozen=True)
class Report:
    """Rewrite a run's report.html and its figures."""

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_DIR")]
    """The run folder."""


COMMANDS = {"schedule": Schedule, "run": Run, "heads": Heads, "report": Report}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for bad input."""
    return run_command(lambda: _plot(sys.argv[1:] if argv is None else argv))


def _plot(argv: Sequence[str]) -> int:
    command = parse_command(
        COMMANDS, argv, program("plot"), "Draw learning-rate schedules and runs."
    )
    {Schedule: _schedule, Run: _run, Heads: _heads, Report: _report}[type(command)](command)
    return 0


def _schedule(command: Schedule) -> None:
    check_flags(command)
    if not command.scheduler:
        raise InputError("--scheduler", "", None, "at least one shape")
    path = _figure_path(command.save, "lr_schedule.png")
    settings = [_settings(command, scheduler) for scheduler in dict.fromkeys(command.scheduler)]
    total = command.total_steps
    check_warmup(settings[0], Sources("", frozenset(), frozenset({"warmup_steps"})), total)
    warmup = warmup_steps(settings[0], total)
    shapes = [schedule_shape(one.optimizer) for one in settings]
    for shape in shapes:
        say(shape_in_words(shape, warmup))
        say(_key_table(key_points(shape, command.max_lr, warmup, total)), end="\n\n")
    from jaxmorph.report.schedule_figure import schedule_figure

    _save(schedule_figure(shapes, command.max_lr, warmup, total), path)


def _settings(command: Schedule, scheduler: Scheduler) -> Settings:
    """Return the settings of a training run with the same schedule."""
    names = {f.name for f in dataclasses.fields(OptimizerSettings)}
    shared = {n: value for n, value in vars(command).items() if n in names}
    shared |= {"scheduler": scheduler, "learning_rate": command.max_lr}
    return Settings(optimizer=OptimizerSettings(**shared))


def _run(command: Run) -> None:
    if not command.run_dirs:
        raise InputError(f"{program('plot')} run", "", None, "at least one run folder")
    path = _figure_path(command.save, "runs.png")

    from jaxmorph.report.figures import loss_figure
    from jaxmorph.report.run_record import read_run

    runs = [read_run(Path(run_dir)) for run_dir in command.run_dirs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(Path(run_dir)) for run_dir in command.run_dirs]
    say(_run_table(names, runs), end="\n\n")
    _save(loss_figure(runs, names), path)


def _run_table(names: Sequence[str], runs: Sequence[RunRecord]) -> str:
    """Return each run's steps, its final and best objective, and its running totals."""
    judged = [metric for metric in runs[0].metrics if metric.best]
    totals = runs[0].of_kind("total")
    words = [named(metric.name.replace("/", " ")) for metric in judged]
    header = ["run", "steps", *(f"{which} {word}" for word in words for which in ("final", "best"))]
    rows = [[*header, *(named(total.brief or total.label) for total in totals)]]
    for name, run in zip(names, runs, strict=True):
        rows.append([named(name), f"{run.last_step:,}"])
        for metric in judged:
            if best := run.best(metric):
                final = metric.written(run.series[metric.name].values[-1])
                rows[-1] += [final, f"{metric.written(best[1])} at {best[0]:,}"]
            else:
                rows[-1] += ["–", "–"]
        for metric in totals:
            values = run.series[metric.name].values
            rows[-1].append(metric.written(values[-1]) if len(values) else "–")
    return "\n".join(aligned(rows, gap=3))


def _heads(command: Heads) -> None:
    from jaxmorph.report.head_figure import head_figure
    from jaxmorph.report.head_record import HEADS, read_heads
    from jaxmorph.report.run_record import read_run

    folder = Path(command.run_dir)
    run, heads = read_run(folder), read_heads(folder)
    if heads is None:
        expected = f"the folder of a run that recorded its heads, with {HEADS} in it"
        raise InputError(command.run_dir, "", None, expected)
    path = _figure_path(command.save, str(folder / "heads.png"))
    say(_head_table(heads), end="\n\n")
    _save(head_figure(run, heads), path)


def _head_table(heads: HeadRecord) -> str:
    """Return each layer's heads at the end, and the controller's last update."""
    last = heads.lines[-1]
    rows = [["layer", "heads", "open", "closed", "with a rate of their own"]]
    for layer, status in enumerate(last.status):
        counts = (status.size, (status >= 0).sum(), (status < 0).sum(), (status > 0).sum())
        rows.append([str(layer), *(f"{count}" for count in counts)])
    closed, of_all = int((last.status < 0).sum()), last.status.size
    words = [f"After step {last.step:,} {closed} of {of_all} heads are closed."]
    if (update := heads.last_update) is not None:
        words.append(
            f"Last update of the controller: step {update.step:,}, {update.outcome}, rate "
            f"{update.rate:.3g}, mean change of the gates {update.mean_change:.3g}, "
            f"{update.unchanged} in a row that changed little"
            f"{'; it has stopped' if update.has_stopped else ''}."
        )
    return "\n".join([*aligned(rows, gap=3), "", *words])


def _report(command: Report) -> None:
    from jaxmorph.report.page import write_report

    say(f"Report: {write_report(Path(command.run_dir))}")


def _figure_path(save: str | None, otherwise: str) -> Path:
    """Return the path of a figure; refuse folders and file types that cannot be written."""
    try:
        path = Path(otherwise if save is None else save).expanduser()
        fits = is_folder(path.parent) and (is_nothing(path) or is_file(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError("--save", "", save, f"a path that can be used ({reason(error)})") from None
    if path.suffix.lower() not in _KINDS:
        raise InputError("--save", "", save, f"a file name ending in {', '.join(_KINDS)}")
    if not fits:
        raise InputError("--save", "", str(path), "a file in an existing folder")
    return path


def _save(figure: Figure, path: Path) -> None:
    from jaxmorph.report.drawing import rendered
    from jaxmorph.report.page import write_file

    write_file(path, rendered(figure, path.suffix.lower()[1:]))
    say(f"Figure: {path}")


def _key_table(points: Sequence[KeyPoint]) -> str:
    header = ("point", "step", "learning rate", "ratio")
    rows = [(p.name, f"{p.step:,}", f"{p.learning_rate:.6g}", f"{p.ratio:.4f}") for p in points]
    return "\n".join(aligned([header, *rows], gap=3))


if __name__ == "__main__":
    sys.exit(main())
