"""The architecture's timeline: how a run's operations changed its shape, against steps."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxmorph.cli.wording import short
from jaxmorph.report.drawing import COLOURS, INK, mark_operations, new_figure, points_along, tick_by
from jaxmorph.report.run_record import FiredOperation, RunRecord
from jaxmorph.step.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZES = {
    "n_layers": "layers",
    "d_model": "width",
    "n_heads": "heads",
    "d_ff": "MLP width",
    "attn_lora_rank": "attention\nLoRA rank",
    "vocab_lora_rank": "vocabulary\nLoRA rank",
    "seq_len": "context",
}
_PANEL_HEIGHT, _NAMES_HEIGHT = 0.85, 1.7  # inches
_PANEL_POINTS, _LETTER_POINTS = 50, 9  # heights of a panel and of a level's text
_LABEL_WIDTH = 15  # of a panel's label: characters before it is wrapped
_NAMED_OPERATIONS = 40  # more do not fit side by side above a wide panel


def _whole(level: float) -> str:
    return f"{level:,.0f}"


class _Panel(NamedTuple):
    """A quantity over a run: its level (1-d) from each step (1-d) on, up to the last step."""

    label: str
    steps: np.ndarray
    levels: np.ndarray
    written: Callable[[float], str] = _whole

    @property
    def changes(self) -> bool:
        return len(set(self.levels.tolist())) > 1


def architecture_figure(run: RunRecord) -> Figure | None:
    """Draw an architecture's sizes and parameter count against steps, one below the other.

    Layers and parameters are always drawn; other sizes, and training settings that operations change,
    only if they changed. None if no operation changed the architecture.
    """
    morphs = [operation for operation in run.operations if operation.reshapes]
    panels = _panels(run, morphs)
    if not panels:
        return None
    height = _PANEL_HEIGHT * len(panels) + _NAMES_HEIGHT
    figure, grid = new_figure(12, height, panels=len(panels), stacked=True)
    for index, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        _draw(axes, panel, COLOURS[index % len(COLOURS)])
        mark_operations(axes, run, named=0 if index else _NAMED_OPERATIONS, above=True)
    grid[-1].set_xlabel("step")
    tick_by(grid[-1].xaxis, short)
    figure.align_ylabels(grid)
    return figure


def _panels(run: RunRecord, morphs: list[FiredOperation]) -> list[_Panel]:
    end = max([run.last_step, *(operation.step for operation in run.operations)])
    panels = []
    for size, label in _SIZES.items():
        panel = _levels(label, [_size_around(operation, size) for operation in morphs], morphs, end)
        if panel is not None and (panel.changes or size == "n_layers"):
            panels.append(panel)
    params = [(operation.params_before, operation.params_after) for operation in morphs]
    if (panel := _levels("parameters", params, morphs, end)) is not None:
        panels.append(panel._replace(written=short))
    if panels:
        settings = [metric for metric in run.metrics if metric.changed_by]
        panels += [panel for one in settings if (panel := _setting(run, one, end)).changes]
    return panels


def _size_around(operation: FiredOperation, size: str) -> tuple[int | None, int | None]:
    before, after = operation.model_before, operation.model_after
    assert before is not None
    assert after is not None
    return before.get(size), after.get(size)


def _levels(
    label: str,
    around: list[tuple[int | None, int | None]],
    morphs: list[FiredOperation],
    end: int,
) -> _Panel | None:
    """Return a quantity's levels from step 0 on; None if an operation's line lacks it."""
    known = [(before, after) for before, after in around if before is not None is not after]
    if not known or len(known) < len(around):
        return None
    levels = [known[0][0], *(after for _, after in known)]
    steps = [0, *(operation.step for operation in morphs), end]
    return _Panel(label, np.array(steps), np.array([*levels, levels[-1]]))


def _setting(run: RunRecord, setting: Metric, end: int) -> _Panel:
    """Return a logged setting's levels; it changed at its operation, the line comes later."""
    logged, values = run.series[setting.name]
    fired = np.array([one.step for one in run.operations if one.name in setting.changed_by], int)
    steps, levels = [0], values[:1].tolist()
    for index in np.flatnonzero(np.diff(values)) + 1:
        between = fired[(logged[index - 1] <= fired) & (fired < logged[index])]
        steps.append(int(between[-1] if len(between) else logged[index]))
        levels.append(values[index])
    label = textwrap.fill(setting.label, _LABEL_WIDTH)
    ends = np.array([*steps, end]), np.array([*levels, *levels[-1:]])
    return _Panel(label, *ends, setting.written)


def _draw(axes: Axes, panel: _Panel, colour: str) -> None:
    steps, levels = panel.steps, panel.levels
    axes.plot(steps, levels, color=colour, linewidth=2, drawstyle="steps-post", zorder=3)
    axes.fill_between(steps, levels, step="post", color=colour, alpha=0.1, linewidth=0)
    axes.set_ylim(0, 1.5 * max(levels.max(), 1))
    axes.set_ylabel(panel.label, rotation=0, ha="right", va="center", labelpad=8, fontsize=9)
    axes.locator_params(axis="y", nbins=3, integer=True)
    tick_by(axes.yaxis, short)
    _write_levels(axes, panel)


def _write_levels(axes: Axes, panel: _Panel) -> None:
    """Write each level where it begins: above it, or before the step if it ends soon.

    Levels that would overlap are omitted, except the last.
    """
    steps, levels = panel.steps.tolist(), panel.levels.tolist()
    begins = [i for i in range(len(steps) - 1) if i == 0 or levels[i] != levels[i - 1]]
    places = points_along(axes, [steps[index] for index in begins] + steps[-1:])
    taken: list[tuple[float, float, float]] = []  # from, to, height, all in points
    for index, place, end in reversed(list(zip(begins, places, places[1:], strict=False))):
        text = panel.written(levels[index])
        width = 8 + 5 * len(text)
        before = steps[index] > 0 and end - place < width
        left = place - width if before else place
        height = levels[index] / axes.get_ylim()[1] * _PANEL_POINTS
        covers = any(
            left < right and start < left + width and abs(height - other) < _LETTER_POINTS
            for start, right, other in taken
        )
        passed = end == place and index != begins[-1]  # changed again at the same step
        if covers or passed:
            continue
        taken.append((left, left + width, height))
        axes.annotate(
            text,
            (steps[index], levels[index]),
            xytext=(-4 if before else 4, 2),
            textcoords="offset points",
            fontsize=8,
            color=INK,
            ha="right" if before else "left",
            va="bottom",
        )
