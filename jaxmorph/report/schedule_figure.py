"""The figure of learning-rate schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxmorph.cli.wording import short
from jaxmorph.report.drawing import COLOURS, INK, new_figure, tick_by
from jaxmorph.step.schedules import KeyPoint, ScheduleShape, factors_at, key_points, shape_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVE_POINTS = 2000
_DASHES: tuple[Any, ...] = ("-", (0, (7, 3)), (0, (3, 2)))  # curves may coincide


def schedule_figure(
    shapes: Sequence[ScheduleShape], peak: float, warmup: int, total: int
) -> Figure:
    """Draw learning rates over a run; for a single schedule, mark its key points."""
    figure, (axes,) = new_figure(8, 4.5)
    steps = sorted(
        {*range(0, total + 1, max(1, total // _CURVE_POINTS)), min(warmup, total), total}
    )
    axes.axvspan(0, min(warmup, total), color=INK, alpha=0.05, linewidth=0, label="warmup")
    for index, shape in enumerate(shapes):
        rates = [peak * factor for factor in factors_at(shape, steps, warmup, total)]
        axes.plot(
            steps,
            rates,
            color=COLOURS[index % len(COLOURS)],
            linewidth=2,
            linestyle=_DASHES[index % len(_DASHES)],
            label=shape_in_words(shape, warmup) if len(shapes) == 1 else shape.scheduler,
        )
    if len(shapes) == 1:
        _mark(axes, key_points(shapes[0], peak, warmup, total))
    axes.set_xlim(-0.015 * total, 1.015 * total)
    axes.set_ylim(0, 1.06 * peak)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    tick_by(axes.xaxis, short)
    tick_by(axes.yaxis, lambda y: f"{y:.4g}")
    figure.legend(loc="outside upper left", ncols=5, frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _mark(axes: Axes, points: Sequence[KeyPoint]) -> None:
    axes.plot(
        [point.step for point in points],
        [point.learning_rate for point in points],
        linestyle="",
        marker="o",
        markersize=5.5,
        markerfacecolor="white",
        markeredgewidth=1.6,
        color=COLOURS[0],
        clip_on=False,
        zorder=5,
    )
