"""One self-contained page about a run: its results, its course and its settings."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.paths import reason
from jaxmorph.cli.printing import named
from jaxmorph.report.drawing import rendered
from jaxmorph.report.figures import figure_title, run_figures
from jaxmorph.report.head_figure import head_figure
from jaxmorph.report.head_record import HEADS, read_heads
from jaxmorph.report.run_record import FiredOperation, RunRecord, read_run, throughput
from jaxmorph.report.timeline import architecture_figure
from jaxmorph.report.waiting import read_waiting
from jaxmorph.step.metrics import Metric, by_figure, objective
from jaxmorph.system.files import refusing_bad_paths, replace_file

_TIMELINE, _HEADS = "architecture", "heads"
_PAGE, _SOURCES = "report.html", ("metrics.jsonl", "operations.jsonl", HEADS)
_STYLE = """
:root { color-scheme: light dark; --page: #f8fafc; --card: #fff; --ink: #0f172a; --soft: #64748b;
  --line: #e2e8f0; }
@media (prefers-color-scheme: dark) { :root { --page: #0f172a; --card: #1e293b; --ink: #f1f5f9;
  --soft: #94a3b8; --line: #334155; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 10px; }
.where { color: var(--soft); margin: 2px 0 24px; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 12px;
  margin: 0 0 20px; }
.facts div, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.facts div { padding: 10px 14px; }
dt { color: var(--soft); font-size: 12px; }
dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: 12px; font-weight: 400; color: var(--soft); }
section { padding: 16px; margin: 0 0 20px; overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
  gap: 0 20px; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px; }
.pair img { max-width: 620px; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; }
.settings { columns: 320px; column-gap: 32px; }
.settings p { margin: 0; display: flex; justify-content: space-between; gap: 12px; font-size: 13px;
  border-bottom: 1px solid var(--line); padding: 3px 0; break-inside: avoid; }
.settings span { color: var(--soft); }
.settings code { overflow-wrap: anywhere; text-align: right; }
"""
# The page has no scripts and loads nothing; its one style sheet is known by its digest.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'",
        "base-uri 'none'",
        "form-action 'none'",
    )
)


def write_report(run_dir: Path, metrics: Sequence[Metric] | None = None) -> Path:
    """Write RUN_DIR/report.html, which is self-contained, and its figures as PNG next to it.

    Args:
      run_dir: the run folder.
      metrics: see `read_run`.

    Raises:
      InputError: not a run folder, a malformed file in it, or a folder that cannot be written.
    """
    # First, so that lines which a running run adds from now on make this an old report.
    sources = _sources_sha256(Path(run_dir))
    run = read_run(Path(run_dir), metrics)
    figures = run_figures(run)
    if (timeline := architecture_figure(run)) is not None:
        figures[_TIMELINE] = timeline
    if (heads := read_heads(run.folder)) is not None:
        figures[_HEADS] = head_figure(run, heads)
    # each figure is released once drawn
    images = {name: rendered(figures.pop(name), "png") for name in list(figures)}
    for name, image in images.items():
        write_file(run.folder / f"{name}.png", image)
    page = run.folder / _PAGE
    write_file(page, _page(run, images, sources).encode())  # last: it vouches for the figures
    return page


def report_is_current(run_dir: Path) -> bool:
    """Return whether a run folder has a report of its present logs, with all its figures."""
    try:
        with open(run_dir / _PAGE, encoding="utf-8") as file:
            head = file.read(4096)
        found = re.search(r'<meta name="jaxmorph" content="([^"]*)">', head)
        if found is None:
            return False
        sources, *figures = found[1].split()
        if not all((run_dir / f"{name}.png").is_file() for name in figures):
            return False
        return sources == _sources_sha256(run_dir)
    except (OSError, ValueError):
        return False


def _sources_sha256(run_dir: Path) -> str:
    """Return one digest of the logs that a report is made of."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        # whoever reads a file that cannot be read says so; a missing one counts as none
        with contextlib.suppress(OSError, ValueError), open(run_dir / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that readers see either the old content or all of the new.

    Raises:
      InputError: the folder does not exist or cannot be written.
      OSError: the disk is full or fails.
    """
    try:
        with refusing_bad_paths():
            replace_file(path, content)
    except ValueError as error:  # no path can have these characters
        raise InputError(str(path), "", None, f"a writable file ({reason(error)})") from None


def _page(run: RunRecord, images: dict[str, bytes], sources: str) -> str:
    name = _text(run.name)
    judged = [figure for figure, drawn in by_figure(run.metrics).items() if objective(drawn)]
    wide = [figure for figure in (*judged, _TIMELINE, _HEADS) if figure in images]
    small = [figure for figure in images if figure not in wide]
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="jaxmorph" content="{" ".join((sources, *images))}">',
        f"<title>{name} – jaxmorph run</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{name}</h1>",
        f'<p class="where">{_text(run.folder.resolve())}</p>',
        _facts(run),
        *(_figure(n, images[n]) for n in wide),
        f'<div class="pair">{"".join(_figure(n, images[n]) for n in small)}</div>',
        _operations(run),
        _waiting(run),
        _settings(run.settings),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _facts(run: RunRecord) -> str:
    tiles = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}<small>{_text(note)}</small></dd></div>"
        for name, value, note in summary(run)
    )
    return f'<dl class="facts">{tiles}</dl>'


def summary(run: RunRecord) -> Iterable[tuple[str, str, str]]:
    """Yield a run's results as (name, value, note), without metrics it did not log."""
    yield "Steps", f"{run.last_step:,}", ""
    for metric in run.metrics:
        if metric.tile:
            yield from _times(run, metric) if metric.kind == "time" else _reached(run, metric)
    judged = objective(run.metrics)
    drawn = [] if judged is None else by_figure(run.metrics)[judged.figure]
    if lost := sum(run.lost[metric.name] for metric in drawn):
        yield "Non-finite losses", f"{lost:,}", "left out of the figures"


def _reached(run: RunRecord, metric: Metric) -> Iterable[tuple[str, str, str]]:
    """Yield a metric's last value, with its first, and its best."""
    steps, values = run.series[metric.name]
    if not len(values):
        return
    first, last, name = metric.written(values[0]), metric.written(values[-1]), metric.label
    began = f"from {first} at step {steps[0]:,}" if metric.best else f"from {first}"
    yield _title(name), last, "" if metric.kind == "total" or first == last else began
    if metric.best and (best := run.best(metric)):
        yield f"Best {name}", metric.written(best[1]), f"at step {best[0]:,}"


def _times(run: RunRecord, metric: Metric) -> Iterable[tuple[str, str, str]]:
    """Yield the time of the steps, and the rates that are drawn."""
    if seconds := throughput(run)[1]:
        yield _title(metric.label), metric.written(seconds), ""
    for total in run.of_kind("total"):
        rates = sorted(throughput(run, total)[0].values)
        if rates and total.figure and total.tile:
            yield _title(total.curve_label), total.written(rates[len(rates) // 2]), "median"


def _title(words: str) -> str:
    return words[:1].upper() + words[1:]


def _figure(name: str, image: bytes) -> str:
    title, source = (
        _text(figure_title(name)),
        f"data:image/png;base64,{base64.b64encode(image).decode()}",
    )
    return f'<section><h2>{title}</h2><img alt="{title}" src="{source}"></section>'


def _operations(run: RunRecord) -> str:
    if not run.operations:
        return ""
    judged = objective(run.metrics) or Metric("", "")
    rows = [_operation(operation, judged) for operation in run.operations]
    return f"<section><h2>Operations</h2>{_table(rows)}</section>"


def _waiting(run: RunRecord) -> str:
    """Return the section on operations that have not fired, "" if all have."""
    step, waiting = read_waiting(run.folder)
    fired = len(run.operations)  # some may have fired since the file was written
    rows = [
        {"entry": str(one.number), "operation": one.operation, "waits for": one.waits_for}
        for one in waiting
        if one.number > fired
    ]
    if not rows:
        return ""
    title = f"Operations that had not fired by step {step:,}"
    return f"<section><h2>{title}</h2>{_table(rows)}</section>"


def _table(rows: Sequence[dict[str, str]]) -> str:
    """Return a table of the rows' texts, by title."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{_text(text)}</td>' for text in row.values())}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _operation(operation: FiredOperation, judged: Metric) -> dict[str, str]:
    """Return the columns of an operation's row by title; losses are formatted like `judged`."""
    before, after = operation.val_loss_before, operation.val_loss_after
    return {
        "step": f"{operation.step:,}",
        "operation": operation.name,
        "value": operation.value_in_words,
        "reason": operation.reason or "",
        "loss before": "" if before is None else judged.written(before),
        "loss after": "" if after is None else judged.written(after),
        "parameters before": _written(operation.params_before, ","),
        "parameters after": _written(operation.params_after, ","),
        "change of the function": _written(operation.function_delta, ".1e"),
        "optimizer moments": _moments(operation.moments or {}),
        "seconds": _written(operation.seconds, ".2f"),
    }


def _written(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def _moments(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {fate}" for fate, count in counts.items() if count)


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    rows = "".join(
        f"<p><span>{_text(name)}</span><code>{_text(_yaml_word(value))}</code></p>"
        for name, value in settings.items()
    )
    return f'<section><h2>Settings</h2><div class="settings">{rows}</div></section>'


def _text(value: object) -> str:
    """Return a value as text of the page, whatever it holds: escaped, and of bounded length."""
    return html.escape(named(str(value)))


def _yaml_word(value: Any) -> str:
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)
