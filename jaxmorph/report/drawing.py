"""Drawing primitives of all figures, on matplotlib's own objects: no pyplot, no state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmorph.cli.printing import escaped
from jaxmorph.report.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#2563eb", "#ea580c", "#059669", "#7c3aed", "#db2777", "#0891b2", "#ca8a04", "#475569",
    "#dc2626",
)  # fmt: skip
INK, FAINT = "#334155", "#94a3b8"
_GRID = "#e2e8f0"
_LABELLED_OPERATIONS = 12  # more labels are illegible side by side
_NAME_WIDTH, _LONGEST_NAME = 9, 40  # of an operation's name: points, characters

Position = Callable[[np.ndarray], np.ndarray]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return a moving mean of 1-d `values`, applied twice so that a spike leaves a bump, not a box.

    The window is centred. Towards the start, where a loss is steep, it narrows on both sides to avoid
    lag; towards the end, where it is flat, only on one, to avoid following noise.
    """
    centre = np.arange(len(values))
    before = np.minimum(centre, max(1, len(values) // 80))
    after = np.minimum(before, centre[::-1])
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[centre + after + 1] - sums[centre - before]) / (before + after + 1)
    return values


def plain(text: str) -> str:
    """Return text that matplotlib draws literally: no formulas, no hidden legend entries, one line."""
    return (" " if text.startswith("_") else "") + escaped(text).replace("$", r"\$")


def new_figure(
    width: float,
    height: float,
    panels: int = 1,
    stacked: bool = False,
    heights: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Return a figure, in inches, with `panels` styled axes.

    They are side by side and share y, or stacked and share x, of equal heights or of these.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    if stacked:
        grid = figure.subplots(panels, 1, squeeze=False, sharex=True, height_ratios=heights)
    else:
        grid = figure.subplots(1, panels, squeeze=False, sharey=panels > 1)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.grid(True, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=9, length=0)
        axes.tick_params(which="minor", length=0)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    return figure, list(grid.flat)


def rendered(figure: Figure, kind: str) -> bytes:
    """Return the figure as the bytes of a file of the given kind ("png", "svg", "pdf")."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    in_pieces = rc_context({"agg.path.chunksize": 1000})  # a long noisy curve at once takes 50 MB
    with in_pieces, warnings.catch_warnings():
        # glyphs that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def tick_by(axis: Any, tick: Callable[[float], str]) -> None:
    """Format the tick labels of a matplotlib axis with `tick`."""
    axis.set_major_formatter(lambda value, _: tick(value))


def mark_operations(
    axes: Axes,
    run: RunRecord,
    position: Position | None = None,
    *,
    colour: str = FAINT,
    interleaved: tuple[int, int] = (0, 1),
    named: int = _LABELLED_OPERATIONS,
    above: bool = False,
) -> None:
    """Draw a vertical line where operations fired, with their names.

    Args:
      axes: the axes; curves must be drawn before, because names are spaced within its limits.
      run: the run whose operations to draw.
      position: maps steps to x; None: steps are x.
      colour: of the lines.
      interleaved: (i, n): the lines are the i-th of n sets, whose dashes leave room for the others'.
      named: names are omitted if there are more operations than this.
      above: write the names above the axes, not inside.
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
    _write_upright(axes, titles, above)


def _write_upright(axes: Axes, titles: Sequence[tuple[float, str]], above: bool) -> None:
    """Write (x, name) along the top of the axes, or above it, without overlap."""
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
    """Return the distance of `x` from the axes' left edge in points, before the final layout."""
    low, high = axes.get_xlim()
    figure, spec = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None
    assert spec is not None
    width = 0.92 * 72 * figure.get_size_inches()[0] / spec.get_gridspec().ncols
    return (np.asarray(x, float) - low) / (high - low) * width


def _beside_one_another(axes: Axes, x: Sequence[float]) -> list[float]:
    """Return how far right of `x`, in points, to put upright names so that none overlap."""
    offsets, free = [], -np.inf
    for at in points_along(axes, x):
        start = max(at + 3, free)
        offsets.append(float(start - at))
        free = start + _NAME_WIDTH
    return offsets


def say(axes: Axes, text: str) -> None:
    """Write a line of text in the middle of the axes."""
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": FAINT, "fontsize": 10}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, **style)
