"""Graceful stops: on SIGTERM or SIGINT the step finishes and the run is saved."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignals:
    """Within the context, remember the first SIGTERM or SIGINT; a second SIGINT exits at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    @property
    def exit_status(self) -> int:
        """Return the conventional exit status of a process stopped by a signal."""
        assert self.received is not None
        return 128 + self.received

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        self.received = self.received or number
