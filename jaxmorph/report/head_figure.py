"""The heads of a run over time: their gates, the multipliers of their learning rates, their status."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmorph.cli.wording import short
from jaxmorph.report.drawing import FAINT, INK, mark_operations, new_figure, tick_by
from jaxmorph.report.head_record import HeadRecord, Heads
from jaxmorph.report.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED_ROWS = (
    32  # more names of heads are illegible one below the other; then only layers have them
)
_NAMED_OPERATIONS = 40
_ROW_HEIGHT, _LEAST_HEIGHT, _MOST_HEIGHT = 0.14, 1.6, 6.0  # inches, of a heatmap
_STRIP_HEIGHT, _NAMES_HEIGHT = 0.9, 2.2
# From closed to open, and from there to the largest rate: the same colours in all panels.
_CLOSED, _OPEN, _FAST = "#172554", "#dbeafe", "#ea580c"
_GATES = (_CLOSED, "#2563eb", _OPEN)
_RATES = (_CLOSED, "#60a5fa", "#f8fafc", "#fdba74", _FAST)  # 1 in the middle
# By status, from below: -1 closed, above 0 with a rate of its own, else stable.
_STATUS = {
    "closed": (_CLOSED, lambda status: status < 0),
    "open, with a rate of its own": (_FAST, lambda status: status > 0),
    "open, stable": ("#bfdbfe", lambda status: status == 0),
}


def head_figure(run: RunRecord, heads: HeadRecord) -> Figure:
    """Draw each head's gate and multiplier as heatmaps over steps, and how many have which status.

    A row is a head, layer by layer; where the model lacks it, before or after a change of its shape,
    the row is hatched.

    Args:
      run: whose operations are marked.
      heads: its heads, at one step at least.
    """
    n_rows = max(1, len(heads.rows))
    height = min(max(_ROW_HEIGHT * n_rows, _LEAST_HEIGHT), _MOST_HEIGHT)
    heights = [height, height, _STRIP_HEIGHT]
    figure, grid = new_figure(12, sum(heights) + _NAMES_HEIGHT, 3, stacked=True, heights=heights)
    edges = _edges(run, heads.lines)
    gates, multipliers = heads.grid("gates"), heads.grid("multiplier")
    _heatmap(grid[0], edges, gates, "gate", _gate_colours())
    _heatmap(grid[1], edges, multipliers, "learning-rate\nmultiplier", _rate_colours(multipliers))
    for axes in grid[:2]:
        _name_rows(axes, heads.rows)
    _draw_statuses(grid[2], edges, heads.grid("status"))
    for index, axes in enumerate(grid):
        mark_operations(axes, run, colour=INK, named=0 if index else _NAMED_OPERATIONS, above=True)
        axes.set_xlim(edges[0], edges[-1])
    grid[-1].set_xlabel("step")
    tick_by(grid[-1].xaxis, short)
    return figure


def _edges(run: RunRecord, lines: Sequence[Heads]) -> np.ndarray:
    """Return where the columns of lines begin, and where the last ends: what a line says holds on.

    The first line of another shape begins where the shape changed, which was before it.
    """
    steps = [line.step for line in lines]
    usual = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    edges = np.array([*steps, max(run.last_step, steps[-1] + usual)], float)
    changed = [operation.step for operation in run.operations if operation.reshapes]
    for column, (before, after) in enumerate(pairwise(lines), start=1):
        between = [step for step in changed if before.step <= step < after.step]
        if before.gates.shape != after.gates.shape and between:
            edges[column] = between[-1]
    return edges


def _gate_colours() -> dict[str, Any]:
    from matplotlib.colors import LinearSegmentedColormap

    return {"cmap": LinearSegmentedColormap.from_list("gates", _GATES), "vmin": 0, "vmax": 1}


def _rate_colours(multipliers: np.ndarray) -> dict[str, Any]:
    """Return colours on both sides of 1, from the 0 of closed heads to the largest multiplier."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    finite = multipliers[np.isfinite(multipliers)]
    colours = LinearSegmentedColormap.from_list("rates", _RATES)
    return {"cmap": colours, "norm": TwoSlopeNorm(1, 0, finite.max(initial=2))}


def _heatmap(
    axes: Axes, edges: np.ndarray, values: np.ndarray, label: str, colours: dict[str, Any]
) -> None:
    """Draw values [row, column], the first row on top, with their scale."""
    axes.grid(False)
    axes.patch.set(facecolor="white", hatch="////", edgecolor="#cbd5e1")
    shown = np.ma.masked_invalid(values)
    rows = np.arange(len(values) + 1)
    mesh = axes.pcolormesh(edges, rows, shown, rasterized=True, **colours)
    axes.set_ylim(max(1, len(values)), 0)
    figure = axes.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.03, aspect=12)
    bar.set_label(label, color=INK, fontsize=9)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(colors=INK, labelsize=8, length=0)


def _name_rows(axes: Axes, rows: list[tuple[int, int]]) -> None:
    """Name the rows as layer.head, or, if they are many, each layer's first; separate layers."""
    first = [i for i, (layer, _) in enumerate(rows) if i == 0 or rows[i - 1][0] != layer]
    for row in first[1:]:
        axes.axhline(row, color="white", linewidth=1.2)
    if len(rows) <= _NAMED_ROWS:
        named = [(row + 0.5, f"{layer}.{head}") for row, (layer, head) in enumerate(rows)]
        axes.set_ylabel("layer.head")
    else:
        every = -(-len(first) // _NAMED_ROWS)
        named = [(row, str(rows[row][0])) for row in first[::every]]
        axes.set_ylabel("layer")
    axes.set_yticks([at for at, _ in named], [name for _, name in named], fontsize=7)


def _draw_statuses(axes: Axes, edges: np.ndarray, status: np.ndarray) -> None:
    """Draw how many heads have each status [row, column], one above the other."""
    counts = [is_so(status).sum(axis=0) for _, is_so in _STATUS.values()]
    levels = [np.append(count, count[-1]) for count in counts]
    colours = [colour for colour, _ in _STATUS.values()]
    axes.stackplot(edges, levels, colors=colours, labels=list(_STATUS), step="post", linewidth=0)
    axes.set_ylim(0, max(1, np.sum(levels, axis=0).max()))
    axes.set_ylabel("heads")
    axes.locator_params(axis="y", nbins=3, integer=True)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(
        loc="outside lower center", ncols=len(_STATUS), frameon=False, fontsize=9, labelcolor=INK
    )
