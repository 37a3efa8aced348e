"""Figures of runs' metrics: curves against steps and running totals."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmorph.cli.wording import short
from jaxmorph.report.drawing import (
    COLOURS,
    FAINT,
    INK,
    Position,
    mark_operations,
    new_figure,
    plain,
    say,
    smoothed,
    tick_by,
)
from jaxmorph.report.run_record import RunRecord
from jaxmorph.step.metrics import Metric, Style, by_figure, objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW_POINTS = 40  # curves with at most this many points are not smoothed

_HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 1.4}
_LINE = {"linewidth": 1.7}
_STYLES: dict[Style, dict[str, Any]] = {  # how each is drawn, from back to front
    "line": _LINE,
    "smooth": _LINE,
    "marked": {"linestyle": "--", "linewidth": 1, "marker": "o", "markersize": 4.5} | _HOLLOW,
    "points": {"linestyle": "", "marker": "D", "markersize": 5.5} | _HOLLOW,
}


def run_figures(run: RunRecord) -> dict[str, Figure]:
    """Return the figures of a run's metrics, by file name, without those it did not use."""
    return {
        name: _step_figure(run, metrics)
        if objective(metrics) is None
        else _objective_figure([run], [run.name], metrics)
        for name, metrics in by_figure(run.metrics).items()
        if not all(_is_idle(run, metric) for metric in metrics)
    }


def _is_idle(run: RunRecord, metric: Metric) -> bool:
    """Return whether a metric never had another value than in a run that does not use it."""
    return metric.idle is not None and bool((run.series[metric.name].values == metric.idle).all())


def loss_figure(runs: Sequence[RunRecord], labels: Sequence[str]) -> Figure:
    """Draw the runs' objective, their loss, against steps and running totals: tokens, FLOPs.

    Args:
      runs: read with the same metrics.
      labels: their names.
    """
    judged = objective(runs[0].metrics)
    assert judged is not None, "no metric says which value is best"
    return _objective_figure(runs, labels, by_figure(runs[0].metrics)[judged.figure])


def _objective_figure(
    runs: Sequence[RunRecord], labels: Sequence[str], metrics: Sequence[Metric]
) -> Figure:
    """Draw metrics, including the objective; for several runs one curve of each style."""
    totals = [None, *runs[0].of_kind("total")]
    figure, panels = new_figure(max(12, 4 * len(totals)), 4.2, panels=len(totals))
    curves = [(metric, n) for metric, n in _by_style(metrics) if len(runs) == 1 or n == 0]
    for axes, total in zip(panels, totals, strict=True):
        _draw_against(axes, total, runs, curves)
    panels[0].set_ylabel(_axis_label(metrics))
    _tick_as(panels[0], metrics[0])
    if not any(len(run.curve(metric).steps) for run in runs for metric in metrics):
        say(panels[0], f"no {_subject(metrics)} logged yet")
    elif (limits := _limits(runs, metrics)) is not None:
        panels[0].set_ylim(*limits)
    _add_legend(figure, runs, labels, curves)
    return figure


def _draw_against(
    axes: Axes,
    total: Metric | None,
    runs: Sequence[RunRecord],
    curves: Sequence[tuple[Metric, int]],
) -> None:
    """Draw curves against a running total, for runs that have it; None: all, against steps."""
    label = "step" if total is None else total.label
    axes.set_xlabel(label)
    tick_by(axes.xaxis, short if total is None else total.written)
    shown = [
        (i, run, _same if total is None else functools.partial(run.total_at, total.name))
        for i, run in enumerate(runs)
        if total is None or len(run.series[total.name].steps)
    ]
    for i, run, position in shown:
        for metric, n in curves:
            steps, values = run.curve(metric)
            _draw_curve(axes, position(steps), values, _colour(i + n), metric.style)
    for i, run, position in shown:
        _mark_one_of(len(runs), i, axes, run, position)
    if not shown:
        say(axes, f"{label} not logged")


def _step_figure(run: RunRecord, metrics: Sequence[Metric]) -> Figure:
    """Draw metrics of one run against steps."""
    figure, (axes,) = new_figure(6.4, 3.4)
    axes.set_xlabel("step")
    axes.set_ylabel(_axis_label(metrics))
    tick_by(axes.xaxis, short)
    curves = _by_style(metrics)
    values = np.concatenate([run.curve(metric).values for metric in metrics])
    if not len(values):
        say(axes, f"{_subject(metrics)} not logged")
        return figure
    for metric, n in curves:
        _draw_curve(axes, *run.curve(metric), _colour(n), metric.style)
    if values.min() > 0 and values.max() > 30 * np.median(values):
        axes.set_yscale("log")
    elif values.min() >= 0:
        headroom = 1.4 if run.operations else 1.08  # for the operations' names
        axes.set_ylim(0, headroom * values.max() or 1)
    _tick_as(axes, metrics[0])
    mark_operations(axes, run)
    if len(metrics) > 1:
        _add_legend(figure, [run], [run.name], curves)
    return figure


def _same(steps: np.ndarray) -> np.ndarray:
    return steps


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _by_style(metrics: Sequence[Metric]) -> list[tuple[Metric, int]]:
    """Return metrics in drawing order, each with the number of earlier ones of the same style."""
    order = list(_STYLES)
    drawn = sorted(metrics, key=lambda metric: order.index(metric.style))
    looks = [_STYLES[metric.style] for metric in drawn]
    return [(metric, looks[:i].count(looks[i])) for i, metric in enumerate(drawn)]


def _subject(metrics: Sequence[Metric]) -> str:
    """Return the subject of a figure: its only metric's label, or the figure's own name."""
    return metrics[0].curve_label if len(metrics) == 1 else figure_title(metrics[0].figure).lower()


def figure_title(name: str) -> str:
    """Return a figure's file name in words: "gradient_norm" as "Gradient norm"."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _axis_label(metrics: Sequence[Metric]) -> str:
    (unit, *others) = {metric.unit for metric in metrics}
    return f"{_subject(metrics)} ({unit})" if unit and not others else _subject(metrics)


def _tick_as(axes: Axes, metric: Metric) -> None:
    """Format the y axis like the metric, but leave the number of decimals to matplotlib."""
    if not (isinstance(metric.form, str) and metric.form.endswith(("e", "f"))):
        tick_by(axes.yaxis, metric.written)


def _mark_one_of(n: int, index: int, axes: Axes, run: RunRecord, position: Position) -> None:
    """Mark the operations of one of `n` runs: with names if it is the only one, else in its colour."""
    if n == 1:
        return mark_operations(axes, run, position)
    sets = min(n, 4)
    interleaved = (index % sets, sets)
    mark_operations(axes, run, position, colour=_colour(index), interleaved=interleaved, named=0)


def _draw_curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, style: Style) -> None:
    look = _STYLES[style]
    if not len(y):
        return
    if style == "points":
        axes.plot(x, y, color=colour, zorder=5, **look)
    elif style == "marked":
        axes.plot(x, y, color=colour, zorder=4, markevery=max(1, len(y) // 25), **look)
    else:
        smooth = style == "smooth" and len(y) > _FEW_POINTS
        if smooth:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
        marker = "o" if len(y) == 1 else ""
        axes.plot(x, smoothed(y) if smooth else y, color=colour, marker=marker, **look)


def _limits(runs: Sequence[RunRecord], metrics: Sequence[Metric]) -> tuple[float, float] | None:
    """Return the y range of falling metrics: at most half above the first value, clipping spikes.

    None: the full range.
    """
    lines = [
        run.curve(metric).values for run in runs for metric in metrics if metric.style != "points"
    ]
    present = [values for values in lines if len(values)]
    if not present or any(metric.best == "highest" for metric in metrics):
        return None
    low = min(float(values.min()) for values in present)
    tops = [1.5 * float(abs(values[0])) for values in present]
    high = max(min(float(v.max()), top) for v, top in zip(present, tops, strict=True))
    for run in runs:
        for metric in metrics:
            if metric.style == "points" and len(points := run.curve(metric).values):
                low = min(low, float(points.min()))
                high = max(high, min(float(points.max()), max(tops)))
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _add_legend(
    figure: Figure,
    runs: Sequence[RunRecord],
    labels: Sequence[str],
    curves: Sequence[tuple[Metric, int]],
) -> None:
    """Add a legend above the figure: the runs if there are several, and the metrics."""
    from matplotlib.lines import Line2D

    one = len(runs) == 1
    entries = [
        Line2D([], [], color=_colour(i), linewidth=4, label=plain(label))
        for i, label in enumerate([] if one else labels)
    ]
    units = {metric.unit for metric, _ in curves}
    for metric, n in curves:
        if metric.style == "points" and not any(len(run.curve(metric).steps) for run in runs):
            continue
        label = metric.brief or metric.curve_label
        if metric.unit and len(units) > 1:
            label += f" ({metric.unit})"
        colour = _colour(n) if one else INK
        entries.append(Line2D([], [], color=colour, label=plain(label), **_STYLES[metric.style]))
    if any(run.operations for run in runs):
        upright: dict[str, Any] = {"linestyle": "", "marker": "|", "markersize": 11}
        entries.append(Line2D([], [], color=FAINT if one else INK, label="operation", **upright))
    figure.legend(
        handles=entries,
        loc="outside upper left",
        ncols=_columns([str(entry.get_label()) for entry in entries], figure),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )


def _columns(labels: Sequence[str], figure: Figure) -> int:
    """Return the columns of a legend: one per label if they fit, else as many of the widest as fit."""
    widths = [45 + 5.2 * len(label) for label in labels]  # points, at 9 points a letter
    room = 72 * figure.get_size_inches()[0]
    return len(labels) if sum(widths) < room else max(1, int(room / max(widths)))
