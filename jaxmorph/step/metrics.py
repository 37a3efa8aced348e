"""What a run measures: one line for each number of metrics.jsonl. Does not import JAX.

All code that records, shows or draws a number takes its name, label, unit and style from here, so a
new metric is one line. A task's measures (its loss, its accuracy) are a separate table: another task
has other lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from jaxmorph.cli.wording import duration, short, short_flops

Kind = Literal["value", "total", "time"]
Style = Literal["line", "smooth", "marked", "points"]
Best = Literal["", "lowest", "highest"]


@dataclass(frozen=True)
class Metric:
    """A number that a run records.

    Args:
      name: its key in metrics.jsonl: "train/grad_norm".
      label: in words: "gradient norm".
      unit: "nats per token"; "" if the label implies it.
      form: how to format a value: a format specification, or a function.
      figure: the file stem of its figure: "gradient_norm"; "" for none. Metrics with the same figure
        share it; a new name makes a new one.
      brief: a short name for legends and table headers; "" for the label.
      kind: a value of the step; a running total, against which losses are drawn, and which is itself
        drawn as its growth per second; or the seconds that a step took.
      style: its curve: a line; a line with its moving mean; dashed with markers, for occasional
        measurements; points alone.
      tile: whether the report's summary shows it.
      best: which value is best, if the run is judged by it. Its figure is drawn large, against steps
        and all running totals, and runs are compared by it.
      changed_by: the operations that set it, if it is a setting; the timeline draws it.
      idle: its value in runs that do not use it; a figure that would show nothing else is left out.
      value: computes it from an update (`loss`, `grad_norm`, `learning_rate`, `skipped`, `state`:
        the state after it), inside the compiled step; None: known on the host.
    """

    name: str
    label: str
    unit: str = ""
    form: str | Callable[[float], str] = ".4g"
    figure: str = ""
    brief: str = ""
    kind: Kind = "value"
    style: Style = "line"
    tile: bool = False
    best: Best = ""
    changed_by: tuple[str, ...] = ()
    idle: float | None = None
    value: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        assert re.fullmatch(r"\w*", self.figure), f"{self.figure!r} cannot name a file"
        assert self.figure or not self.best, f"{self.name}: a metric with `best` needs a figure"

    @property
    def curve_label(self) -> str:
        """The label of its curve."""
        return f"{self.label} per second" if self.kind == "total" else self.label

    def written(self, value: float) -> str:
        """Return a value formatted for people, without its unit."""
        return format(value, self.form) if isinstance(self.form, str) else self.form(value)


_RESIZE = ("change_batch_size", "set_batch_size")
_ACCUMULATE = ("change_grad_accum", "set_grad_accum")
_NATS = "nats per token"

# Tiles of the summary and figures follow the order of these lines.
RUN_METRICS = (
    Metric("train/learning_rate", "learning rate", figure="learning_rate",
           value=lambda update: update.learning_rate),
    Metric("tokens", "tokens", form=short, figure="throughput", kind="total", style="smooth", tile=True),
    Metric("flops", "training FLOPs", form=short_flops, brief="FLOPs", kind="total", tile=True),
    Metric("params", "parameters", form=short, tile=True),
    Metric("step_seconds", "time in steps", form=duration, kind="time", tile=True),
    Metric("train/grad_norm", "gradient norm", form=".3g", figure="gradient_norm", style="smooth",
           value=lambda update: update.grad_norm),
    Metric("train/skipped", "skipped updates", form=",.0f", value=lambda update: update.skipped),
    Metric("batch_size", "batch size", form=",.0f", changed_by=_RESIZE),
    Metric("grad_accum_steps", "forward passes per update", form=",.0f", changed_by=_ACCUMULATE),
    Metric("newly_activated_heads", "heads opened", form=",.0f",
           value=lambda update: update.state["newly_activated_heads"]),
    Metric("newly_pruned_heads", "heads closed", form=",.0f",
           value=lambda update: update.state["newly_pruned_heads"]),
    Metric("cooling_down_heads", "heads with a rate of their own", form=",.0f",
           value=lambda update: (update.state["head_status"] > 0).sum()),
    Metric("max_head_lr_multiplier", "largest multiplier of a head's learning rate",
           figure="head_learning_rate", brief="largest", idle=1,
           value=lambda update: update.head_multipliers.max(initial=0)),
    Metric("avg_head_lr_multiplier", "mean multiplier of the heads' learning rates",
           figure="head_learning_rate", brief="mean", idle=1,
           value=lambda update: update.mean_head_multiplier),
    Metric("stage", "stage", form=",.0f"),
)  # fmt: skip
LM_METRICS = (
    Metric("val/loss", "validation loss", _NATS, ".4f", "loss", "validation", style="marked",
           tile=True, best="lowest"),
    Metric("val/accuracy", "validation accuracy", form=".1%", tile=True),
    Metric("train/loss", "training loss", _NATS, ".4f", "loss", "training", style="smooth",
           tile=True),
    Metric("val/loss_after", "validation loss right after an operation", _NATS, ".4f", "loss",
           "validation right after an operation", style="points"),
)  # fmt: skip
DEFAULT: tuple[Metric, ...] = (*RUN_METRICS, *LM_METRICS)


METRIC_TABLE = "metric_table.json"  # its file in a run folder
_SAFE = {
    **{"name": r".{1,200}", "label": r".{0,200}", "unit": r".{0,200}", "brief": r".{0,200}"},
    **{"figure": r"\w{0,60}", "form": r"(?!.*\d{3}).{0,40}"},
    **{"kind": "|".join(get_args(Kind)), "style": "|".join(get_args(Style))},
    "best": "|".join(get_args(Best)),
}
_FORMS = {form.__name__: form for form in (short, short_flops, duration)}


def table_to_json(metrics: Iterable[Metric]) -> str:
    """Return a table of metrics as the text of a JSON file; how values are computed is left out."""
    rows = []
    for metric in metrics:
        row = {f.name: getattr(metric, f.name) for f in fields(metric) if f.name != "value"}
        named = metric.form if isinstance(metric.form, str) else metric.form.__name__
        rows.append(row | {"form": named})
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def table_from_json(text: str) -> tuple[Metric, ...]:
    """Return the table that `table_to_json` wrote.

    Functions of other code that format values are replaced by a general format.

    Raises:
      ValueError: no such table.
    """
    try:
        return tuple(_metric(row) for row in json.loads(text))
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _metric(row: dict[str, Any]) -> Metric:
    """Return the metric of a row; whoever wrote it, its figure names a file and its form is short."""
    for name, pattern in _SAFE.items():
        if not re.fullmatch(pattern, row[name]):
            raise ValueError(f"{name}: {row[name]!r}")
    idle = row.get("idle")  # older tables have none
    named: dict[str, Any] = {"form": _form(row["form"]), "changed_by": tuple(row["changed_by"])}
    named["idle"] = None if idle is None else float(idle)
    return Metric(**row | named)


def _form(name: str) -> str | Callable[[float], str]:
    if name.isidentifier():
        return _FORMS.get(name, ".4g")
    return name


def by_figure(metrics: Iterable[Metric]) -> dict[str, list[Metric]]:
    """Return the metrics of each figure, by its name."""
    figures: dict[str, list[Metric]] = {}
    for metric in metrics:
        if metric.figure:
            figures.setdefault(metric.figure, []).append(metric)
    return figures


def objective(metrics: Iterable[Metric]) -> Metric | None:
    """Return the first metric that runs are judged by; None if there is none."""
    return next((metric for metric in metrics if metric.best), None)
