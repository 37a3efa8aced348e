"""The progress display of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from jaxmorph.cli.printing import escaped, say

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    """Show a run's progress. `update` may be called often; it decides what to show."""

    def update(self, step: int, facts: str, seconds_left: float | None) -> None:
        """Show the last step, one line of facts and the time left (None: not known yet)."""

    def note(self, text: str) -> None:
        """Show a permanent line."""

    def __enter__(self) -> Progress:
        """Start the display."""
        ...

    def __exit__(self, *error: object) -> None:
        """Restore the terminal."""


def make_progress(kind: str, step: int, total: int) -> Progress:
    """Return the display that `--progress` names; auto is a bar on a terminal, else lines."""
    if kind == "auto":
        kind = "bar" if sys.stdout.isatty() else "lines"
    return {"bar": _Bar, "lines": _Lines, "off": _Off}[kind](step, total)


class _Bar:
    def __init__(self, step: int, total: int):
        self._progress = RichProgress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=Console(highlight=False),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total, completed=step, facts="compiling ...")

    def update(self, step: int, facts: str, seconds_left: float | None) -> None:
        self._progress.update(self._task, completed=step, facts=escaped(facts))

    def note(self, text: str) -> None:
        self._progress.console.print(escaped(text, kept="\n\t"), markup=False)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, step: int, total: int):
        self._total = total
        self._last = 0.0

    def update(self, step: int, facts: str, seconds_left: float | None) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            left = "" if seconds_left is None else f"  {_clock(seconds_left)} left"
            self.note(f"step {step}/{self._total}  {facts}{left}")

    def note(self, text: str) -> None:
        say(text)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


class _Off(_Lines):
    def update(self, step: int, facts: str, seconds_left: float | None) -> None:
        pass

    def note(self, text: str) -> None:
        pass
