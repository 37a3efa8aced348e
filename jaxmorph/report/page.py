"""One self-contained page about a run: what it reached, how it went, what it was told to do."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.wording import duration, short, short_flops
from jaxmorph.report.figures import rendered, run_figures
from jaxmorph.report.run_record import FiredOperation, RunRecord, read_run, throughput
from jaxmorph.report.timeline import architecture_figure

_TITLES = {
    "loss": "Loss",
    "architecture": "Architecture",
    "learning_rate": "Learning rate",
    "throughput": "Throughput",
    "gradient_norm": "Gradient norm",
}
_WIDE = ("loss", "architecture")
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


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html, which needs no other file, and its figures as PNG beside it.

    Raises:
      InputError: not a run folder, a malformed file in it, or a folder that cannot be written.
    """
    run = read_run(Path(run_dir))
    figures = run_figures(run)
    if (timeline := architecture_figure(run)) is not None:
        figures["architecture"] = timeline
    images = {name: rendered(figure, "png") for name, figure in figures.items()}
    for name, image in images.items():
        replace_file(run.folder / f"{name}.png", image)
    page = run.folder / "report.html"
    replace_file(page, _page(run, images).encode())
    return page


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds either the old content or all of the new.

    Raises:
      InputError: the folder is not there or cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(str(path), "", None, f"a writable file ({error.strerror})") from None


def _page(run: RunRecord, images: dict[str, bytes]) -> str:
    name, wide = html.escape(run.name), [n for n in _WIDE if n in images]
    small = [n for n in images if n not in wide]
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name} – jaxmorph run</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{name}</h1>",
        f'<p class="where">{html.escape(str(run.folder.resolve()))}</p>',
        _facts(run),
        *(_figure(n, images[n]) for n in wide),
        f'<div class="pair">{"".join(_figure(n, images[n]) for n in small)}</div>',
        _operations(run.operations),
        _settings(run.settings),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _facts(run: RunRecord) -> str:
    tiles = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        f"<small>{html.escape(note)}</small></dd></div>"
        for name, value, note in summary(run)
    )
    return f'<dl class="facts">{tiles}</dl>'


def summary(run: RunRecord) -> Iterable[tuple[str, str, str]]:
    """Yield what a run reached, as (name, value, note), leaving out what it did not log."""
    yield "Steps", f"{run.last_step:,}", ""
    for name, key, write in (
        ("Tokens", "tokens", short),
        ("Training FLOPs", "flops", short_flops),
        ("Parameters", "params", short),
    ):
        values = run.series[key].values
        if len(values):
            changed = key == "params" and values[0] != values[-1]
            yield name, write(values[-1]), f"from {write(values[0])}" if changed else ""
    rates, seconds = throughput(run)
    if seconds:
        yield "Time in steps", duration(seconds), ""
    if len(rates.values):
        yield "Tokens per second", short(sorted(rates.values)[len(rates.values) // 2]), "median"
    steps, losses = run.series["val/loss"]
    if len(losses):
        best = int(losses.argmin())
        yield "Validation loss", f"{losses[-1]:.4f}", f"from {losses[0]:.4f} at step {steps[0]:,}"
        yield "Best validation loss", f"{losses[best]:.4f}", f"at step {steps[best]:,}"
    if len(accuracies := run.series["val/accuracy"].values):
        yield "Validation accuracy", f"{accuracies[-1]:.1%}", f"from {accuracies[0]:.1%}"
    if len(losses := run.series["train/loss"].values):
        yield "Training loss", f"{losses[-1]:.4f}", f"from {losses[0]:.4f}"
    if lost := sum(run.lost[key] for key in ("train/loss", "val/loss", "val/loss_after")):
        yield "Non-finite losses", f"{lost:,}", "left out of the figures"


def _figure(name: str, image: bytes) -> str:
    title, source = _TITLES[name], f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return f'<section><h2>{title}</h2><img alt="{title}" src="{source}"></section>'


def _operations(operations: Sequence[FiredOperation]) -> str:
    if not operations:
        return ""
    rows = [_operation(operation) for operation in operations]
    head = "".join(f"<th>{title}</th>" for title in rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row.values())}</tr>"
        for row in rows
    )
    table = f"<table><tr>{head}</tr>{body}</table>"
    return f"<section><h2>Operations</h2>{table}</section>"


def _operation(operation: FiredOperation) -> dict[str, str]:
    """Return the columns of an operation's row, by their titles."""
    return {
        "step": f"{operation.step:,}",
        "operation": operation.name,
        "value": operation.value_in_words,
        "reason": operation.reason or "",
        "loss before": _written(operation.val_loss_before, ".4f"),
        "loss after": _written(operation.val_loss_after, ".4f"),
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
        f"<p><span>{html.escape(str(name))}</span><code>{html.escape(_yaml_word(value))}</code></p>"
        for name, value in settings.items()
    )
    return f'<section><h2>Settings</h2><div class="settings">{rows}</div></section>'


def _yaml_word(value: Any) -> str:
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)
