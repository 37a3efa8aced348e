"""The pictures of runs and schedules, drawn on matplotlib's own objects: no pyplot, no state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmorph.run_record import RunRecord, Series, throughput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#2563eb", "#ea580c", "#059669", "#7c3aed", "#db2777", "#0891b2", "#ca8a04", "#475569",
    "#dc2626",
)  # fmt: skip
INK = "#334155"
_GRID, _FAINT = "#e2e8f0", "#94a3b8"
_LABELLED_OPERATIONS = 12  # more labels than this cannot be read side by side
_FEW_POINTS = 40  # up to this many, a curve is drawn as it is, without smoothing

Position = Callable[[np.ndarray], np.ndarray]


def short(number: float, units: str = "kMBT") -> str:
    """Return 12,345,678 as "12.3M"; `units` are the letters for 10^3, 10^6, …"""
    power = 0
    while abs(number) >= 999.5 and power < len(units):
        number, power = number / 1000, power + 1
    return f"{number:.3g}{units[power - 1] if power else ''}"


def short_flops(number: float) -> str:
    """Return a number of floating-point operations as "1.23P"."""
    return short(number, "kMGTPEZY")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return a moving mean of 1-d `values`, taken twice so that one spike leaves a bump, not a box.

    The window is centred. Towards the start, where a loss is steep, it narrows on both sides, so as
    not to lag; towards the end, where it is flat, on one, so as not to follow noise.
    """
    centre = np.arange(len(values))
    before = np.minimum(centre, max(1, len(values) // 80))
    after = np.minimum(before, centre[::-1])
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[centre + after + 1] - sums[centre - before]) / (before + after + 1)
    return values


def plain(text: str) -> str:
    """Return text that matplotlib draws as it is: no formulas, no hidden legend entries."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure, in inches, with `panels` styled axes side by side that share their y."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    grid = figure.subplots(1, panels, squeeze=False, sharey=panels > 1)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.grid(True, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=9, length=0)
        axes.tick_params(which="minor", length=0)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    return figure, list(grid.flat)


def rendered(figure: Figure, kind: str) -> bytes:
    """Return the figure as the bytes of a file of the given kind ("png", "svg", "pdf")."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def loss_figure(runs: Sequence[RunRecord], labels: Sequence[str]) -> Figure:
    """Draw loss against steps, tokens and FLOPs: training thin and smoothed, validation marked."""
    figure, panels = new_figure(12, 4.2, panels=len(_LOSS_AXES))
    for axes, against in zip(panels, _LOSS_AXES, strict=True):
        axes.set_xlabel(against.label)
        _tick_by(axes.xaxis, against.tick)
        shown = [
            (COLOURS[i % len(COLOURS)], run, against.position_in(run))
            for i, run in enumerate(runs)
            if against.total is None or len(run.series[against.total].steps)
        ]
        for colour, run, position in shown:
            _draw_loss(axes, run, position, colour)
            single = len(runs) == 1
            _mark_operations(axes, run, position, _FAINT if single else colour, labelled=single)
        if not shown:
            _say(axes, f"{against.label} not logged")
    panels[0].set_ylabel("loss (nats per token)")
    limits = _loss_limits(runs)
    if limits is None:
        _say(panels[0], "no loss logged yet")
    else:
        panels[0].set_ylim(*limits)
    handles = _loss_legend(labels)
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(handles), 5),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )
    return figure


def run_figures(run: RunRecord) -> dict[str, Figure]:
    """Return the figures of a run's report, by the names of their files."""
    return {
        "loss": loss_figure([run], [run.name]),
        "learning_rate": _step_figure(
            run, run.series["train/learning_rate"], "learning rate", lambda y: f"{y:.4g}", False
        ),
        "throughput": _step_figure(run, throughput(run)[0], "tokens per second", short, True),
        "gradient_norm": _step_figure(
            run, run.series["train/grad_norm"], "gradient norm", lambda y: f"{y:.3g}", True
        ),
    }


class _Against(NamedTuple):
    """What a loss is drawn against; `total` is the running total it needs, None for steps."""

    label: str
    total: str | None
    tick: Callable[[float], str]

    def position_in(self, run: RunRecord) -> Position:
        """Return where on this axis a run's steps lie."""
        total = self.total
        return _same if total is None else lambda steps: run.total_at(total, steps)


_LOSS_AXES = (
    _Against("step", None, short),
    _Against("tokens", "tokens", short),
    _Against("training FLOPs", "flops", short_flops),
)


def _same(steps: np.ndarray) -> np.ndarray:
    return steps


def _tick_by(axis: Any, tick: Callable[[float], str]) -> None:
    axis.set_major_formatter(lambda value, _: tick(value))


def _draw_loss(axes: Axes, run: RunRecord, position: Position, colour: str) -> None:
    steps, values = run.series["train/loss"]
    _draw_curve(axes, position(steps), values, colour, smooth=True)
    steps, values = run.series["val/loss"]
    axes.plot(
        position(steps),
        values,
        color=colour,
        linestyle="--",
        linewidth=1,
        marker="o",
        markersize=4.5,
        markerfacecolor="white",
        markeredgewidth=1.4,
        markevery=max(1, len(steps) // 25),
        zorder=4,
    )


def _draw_curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, smooth: bool) -> None:
    smooth = smooth and len(y) > _FEW_POINTS
    if smooth:
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
    marker = "o" if len(y) == 1 else ""
    axes.plot(x, smoothed(y) if smooth else y, color=colour, linewidth=1.7, marker=marker)


def _step_figure(
    run: RunRecord, series: Series, label: str, tick: Callable[[float], str], smooth: bool
) -> Figure:
    figure, (axes,) = new_figure(6.4, 3.4)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    _tick_by(axes.xaxis, short)
    values = series.values
    if not len(values):
        _say(axes, f"{label} not logged")
        return figure
    _draw_curve(axes, series.steps, values, COLOURS[0], smooth)
    if values.min() > 0 and values.max() > 30 * np.median(values):
        axes.set_yscale("log")
    elif values.min() >= 0:
        headroom = 1.4 if run.operations else 1.08  # for the operations' names
        axes.set_ylim(0, headroom * values.max() or 1)
    _tick_by(axes.yaxis, tick)
    _mark_operations(axes, run, _same, _FAINT, labelled=True)
    return figure


def _mark_operations(
    axes: Axes, run: RunRecord, position: Position, colour: str, labelled: bool
) -> None:
    """Draw a vertical line where operations fired, named unless there are too many to read."""
    names: dict[int, list[str]] = {}
    for operation in run.operations:
        value = operation.get("value")
        text = operation["name"] if value is None else f"{operation['name']} {value}"
        names.setdefault(operation["step"], []).append(text)
    labelled = labelled and len(run.operations) <= _LABELLED_OPERATIONS
    for step, at in zip(names, position(np.array(list(names), float)), strict=True):
        axes.axvline(at, color=colour, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
        for beside, name in enumerate(names[step] if labelled else []):
            axes.annotate(
                plain(name),
                (at, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3 + 9 * beside, -2),
                textcoords="offset points",
                rotation=90,
                fontsize=7,
                color=INK,
                ha="left",
                va="top",
            )


def _loss_limits(runs: Sequence[RunRecord]) -> tuple[float, float] | None:
    """Return the range of losses to show: no more than half above the first, spikes go off it."""
    series = [run.series[key] for run in runs for key in ("train/loss", "val/loss")]
    present = [one.values for one in series if len(one.values)]
    if not present:
        return None
    low = min(float(values.min()) for values in present)
    high = max(min(float(values.max()), 1.5 * float(abs(values[0]))) for values in present)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _loss_legend(labels: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    ink = COLOURS[0] if len(labels) == 1 else INK
    train = Line2D([], [], color=ink, linewidth=1.7, label="training")
    validation = Line2D(
        [], [], color=ink, linewidth=1, linestyle="--", marker="o", markersize=4.5,
        markerfacecolor="white", markeredgewidth=1.4, label="validation",
    )  # fmt: skip
    if len(labels) == 1:
        return [train, validation]
    runs = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=4, label=plain(label))
        for i, label in enumerate(labels)
    ]
    return [*runs, train, validation]


def _say(axes: Axes, text: str) -> None:
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": _FAINT, "fontsize": 10}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, **style)
