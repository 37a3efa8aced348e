"""The pictures of runs and schedules, drawn on matplotlib's own objects: no pyplot, no state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmorph.cli.wording import short, short_flops
from jaxmorph.report.run_record import RunRecord, Series, throughput

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
_NAME_WIDTH, _LONGEST_NAME = 9, 40  # of an operation's name: points, characters
_FEW_POINTS = 40  # up to this many, a curve is drawn as it is, without smoothing

_HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 1.4}
_VALIDATION = {"linestyle": "--", "linewidth": 1, "marker": "o", "markersize": 4.5} | _HOLLOW
_AFTER = {"linestyle": "", "marker": "D", "markersize": 5.5} | _HOLLOW

Position = Callable[[np.ndarray], np.ndarray]


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


def new_figure(
    width: float, height: float, panels: int = 1, stacked: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure, in inches, with `panels` styled axes.

    They stand side by side and share their y, or are stacked and share their x.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    if stacked:
        grid = figure.subplots(panels, 1, squeeze=False, sharex=True)
    else:
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


def tick_by(axis: Any, tick: Callable[[float], str]) -> None:
    """Write the numbers along a matplotlib axis as `tick` does."""
    axis.set_major_formatter(lambda value, _: tick(value))


def mark_operations(
    axes: Axes,
    run: RunRecord,
    position: Position | None = None,
    *,
    colour: str = _FAINT,
    interleaved: tuple[int, int] = (0, 1),
    named: int = _LABELLED_OPERATIONS,
    above: bool = False,
) -> None:
    """Draw a vertical line where operations fired, with their names.

    Args:
      axes: where; its curves are there already, as names keep clear of one another in its limits.
      run: whose operations.
      position: where on the x axis steps lie; None: at themselves.
      colour: of the lines.
      interleaved: (i, n): the lines are the i-th of n sets, whose dashes leave room for the others'.
      named: the names are left out where there are more operations than this.
      above: write the names above the axes, not in them.
    """
    names: dict[int, list[str]] = {}
    for operation in run.operations:
        names.setdefault(operation.step, []).append(operation.title)
    index, sets = interleaved
    dashes: Any = (6 * index, (4, 6 * sets - 4))
    steps = np.array(list(names), float)
    places = [float(at) for at in (steps if position is None else position(steps))]
    for at in places:
        axes.axvline(at, color=colour, linewidth=1, linestyle=dashes, zorder=1)
    if len(run.operations) > named:
        return
    titles = [(at, name) for at, step in zip(places, names, strict=True) for name in names[step]]
    offsets = _beside_one_another(axes, [at for at, _ in titles])
    for (at, name), offset in zip(titles, offsets, strict=True):
        axes.annotate(
            plain(name[:_LONGEST_NAME]),
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(offset, 2 if above else -2),
            textcoords="offset points",
            rotation=90,
            fontsize=7,
            color=INK,
            ha="left",
            va="bottom" if above else "top",
        )


def points_along(axes: Axes, x: Sequence[float]) -> np.ndarray:
    """Return how far right of the axes' left edge `x` lies, in points; the layout moves it a bit."""
    low, high = axes.get_xlim()
    figure, spec = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None
    assert spec is not None
    width = 0.92 * 72 * figure.get_size_inches()[0] / spec.get_gridspec().ncols
    return (np.asarray(x, float) - low) / (high - low) * width


def _beside_one_another(axes: Axes, x: Sequence[float]) -> list[float]:
    """Return how far right of `x`, in points, upright names stand so that none covers another."""
    offsets, free = [], -np.inf
    for at in points_along(axes, x):
        start = max(at + 3, free)
        offsets.append(float(start - at))
        free = start + _NAME_WIDTH
    return offsets


def loss_figure(runs: Sequence[RunRecord], labels: Sequence[str]) -> Figure:
    """Draw loss against steps, tokens and FLOPs: training thin and smoothed, validation marked."""
    figure, panels = new_figure(12, 4.2, panels=len(_LOSS_AXES))
    for axes, against in zip(panels, _LOSS_AXES, strict=True):
        axes.set_xlabel(against.label)
        tick_by(axes.xaxis, against.tick)
        shown = [
            (i, run, against.position_in(run))
            for i, run in enumerate(runs)
            if against.total is None or len(run.series[against.total].steps)
        ]
        for i, run, position in shown:
            _draw_loss(axes, run, position, COLOURS[i % len(COLOURS)])
        for i, run, position in shown:
            _mark_one_of(len(runs), i, axes, run, position)
        if not shown:
            _say(axes, f"{against.label} not logged")
    panels[0].set_ylabel("loss (nats per token)")
    limits = _loss_limits(runs)
    if limits is None:
        _say(panels[0], "no loss logged yet")
    else:
        panels[0].set_ylim(*limits)
    handles = _loss_legend(runs, labels)
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=_columns([str(handle.get_label()) for handle in handles], figure),
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


def _draw_loss(axes: Axes, run: RunRecord, position: Position, colour: str) -> None:
    steps, values = run.series["train/loss"]
    _draw_curve(axes, position(steps), values, colour, smooth=True)
    steps, values = run.series["val/loss"]
    axes.plot(
        position(steps),
        values,
        color=colour,
        markevery=max(1, len(steps) // 25),
        zorder=4,
        **_VALIDATION,
    )
    steps, values = run.series["val/loss_after"]
    if len(steps):
        axes.plot(position(steps), values, color=colour, zorder=5, **_AFTER)


def _mark_one_of(n: int, index: int, axes: Axes, run: RunRecord, position: Position) -> None:
    """Mark the operations of one of `n` runs: named where it is the only one, else in its colour."""
    if n == 1:
        return mark_operations(axes, run, position)
    colour, sets = COLOURS[index % len(COLOURS)], min(n, 4)
    mark_operations(axes, run, position, colour=colour, interleaved=(index % sets, sets), named=0)


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
    tick_by(axes.xaxis, short)
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
    tick_by(axes.yaxis, tick)
    mark_operations(axes, run)
    return figure


def _loss_limits(runs: Sequence[RunRecord]) -> tuple[float, float] | None:
    """Return the range of losses to show: no more than half above the first, spikes go off it."""
    series = [run.series[key] for run in runs for key in ("train/loss", "val/loss")]
    present = [one.values for one in series if len(one.values)]
    if not present:
        return None
    low = min(float(values.min()) for values in present)
    tops = [1.5 * float(abs(values[0])) for values in present]
    high = max(min(float(v.max()), top) for v, top in zip(present, tops, strict=True))
    for run in runs:
        if len(after := run.series["val/loss_after"].values):
            low = min(low, float(after.min()))
            high = max(high, min(float(after.max()), max(tops)))
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _loss_legend(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    ink = COLOURS[0] if len(labels) == 1 else INK
    entries = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=4, label=plain(label))
        for i, label in enumerate(labels if len(labels) > 1 else [])
    ]
    entries.append(Line2D([], [], color=ink, linewidth=1.7, label="training"))
    entries.append(Line2D([], [], color=ink, label="validation", **_VALIDATION))
    if any(len(run.series["val/loss_after"].steps) for run in runs):
        label = "validation right after an operation"
        entries.append(Line2D([], [], color=ink, label=label, **_AFTER))
    if any(run.operations for run in runs):
        faint = _FAINT if len(labels) == 1 else INK
        upright: dict[str, Any] = {"linestyle": "", "marker": "|", "markersize": 11}
        entries.append(Line2D([], [], color=faint, label="operation", **upright))
    return entries


def _columns(labels: Sequence[str], figure: Figure) -> int:
    """Return how many columns a legend fits into: one for each label, or all as wide as the widest."""
    widths = [45 + 5.2 * len(label) for label in labels]  # points, at 9 points a letter
    room = 72 * figure.get_size_inches()[0]
    return len(labels) if sum(widths) < room else max(1, int(room / max(widths)))


def _say(axes: Axes, text: str) -> None:
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": _FAINT, "fontsize": 10}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, **style)
