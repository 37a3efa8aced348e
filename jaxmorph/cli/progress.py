"""The progress display of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from jaxmorph.cli.printing import escaped, say

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    """Show a run's progress. `update` may be called often; it decides what to show."""

    def update(self, step: int, facts: str, seconds_left: float | None) -> None:
        """Show the last step, one line of facts and the time left (None: not known yet)."""

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Within the context, a bar says what goes on between two steps."""
        ...

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
            TextColumn("{task.fields[shown]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=Console(highlight=False),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total, completed=step, shown="", left="")

    def update(self, step: int, facts: str, seconds_left: float | None) -> None:
        left = _time_left(seconds_left)
        self._progress.update(self._task, completed=step, shown=escaped(facts), left=left)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        before = self._progress.tasks[0].fields["shown"]
        with _terminal_may_close():  # shown at once: what follows may keep the display's thread out
            self._progress.update(self._task, shown=f"{escaped(what)} ...", refresh=True)
        try:
            yield
        finally:
            self._progress.update(self._task, shown=before)

    def note(self, text: str) -> None:
        with _terminal_may_close():
            self._progress.console.print(escaped(text, kept="\n\t"), markup=False)

    def __enter__(self) -> _Bar:
        with _terminal_may_close():
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        with _terminal_may_close():
            self._progress.stop()


class _Lines:
    def __init__(self, step: int, total: int):
        self._total = total
        self._last = 0.0

    def update(self, step: int, facts: str, seconds_left: float | None) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            left = "" if seconds_left is None else f"  {_time_left(seconds_left)}"
            self.note(f"step {step}/{self._total}  {facts}{left}")

    def doing(self, what: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def note(self, text: str) -> None:
        with _terminal_may_close():
            say(text)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Off(_Lines):
    def update(self, step: int, facts: str, seconds_left: float | None) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    return f"{clock} left"


@contextlib.contextmanager
def _terminal_may_close() -> Iterator[None]:
    """Ignore that a terminal has closed: the run is then stopped by a signal, and saves."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
