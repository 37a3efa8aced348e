"""Graceful stops: on SIGTERM, SIGINT or SIGHUP the step finishes and the run is saved."""

from __future__ import annotations

import os
import signal
from types import FrameType

_STDOUT, _STDERR = 1, 2
_NAMES = {signal.SIGINT: "Ctrl-C"}


class StopSignals:
    """Within the context, remember the first signal to stop; a second SIGINT exits at once.

    SIGHUP, which a closed terminal sends, is one of them unless it was ignored from the start, as
    under `nohup`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}
        self._terminals: list[int] = []

    @property
    def exit_status(self) -> int:
        """Return the conventional exit status of a process stopped by a signal."""
        assert self.received is not None
        return 128 + self.received

    @property
    def name(self) -> str:
        """Return the received signal as a user knows it."""
        assert self.received is not None
        return _NAMES.get(signal.Signals(self.received), signal.Signals(self.received).name)

    def __enter__(self) -> StopSignals:
        self._terminals = [number for number in (_STDOUT, _STDERR) if os.isatty(number)]
        for number in (signal.SIGTERM, signal.SIGINT, *_hangup()):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        self.received = self.received or number
        self._leave_closed_terminals()

    def _leave_closed_terminals(self) -> None:
        """Write to nowhere from now on where the terminal has closed: writing to it would fail."""
        for number in self._terminals:
            if not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


def _hangup() -> list[signal.Signals]:
    """Return SIGHUP where there is one and nobody asked to ignore it."""
    number = getattr(signal, "SIGHUP", None)
    return [] if number is None or signal.getsignal(number) is signal.SIG_IGN else [number]
