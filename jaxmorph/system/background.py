"""Work done once: ahead of time in a lowest-priority thread, or by the first caller who needs it."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from typing import Any

import jax

_LOWEST_PRIORITY = 19


class Background:
    """Run tasks by key, each once.

    Args:
      work: runs the task of a key and returns its result; called from either thread.
    """

    def __init__(self, work: Callable[[Any], Any]):
        self._work = work
        self._futures: dict[Hashable, Future] = {}
        self._lock = threading.Lock()  # of the futures
        self._wanted: queue.SimpleQueue[tuple[Hashable, Future] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def result(self, key: Hashable) -> Any:
        """Return the result of a task: run it now, unless it is finished or running.

        Raises:
          Exception: what the task raised.
        """
        with self._lock:
            is_new = key not in self._futures
            future = self._futures.setdefault(key, Future())
        if is_new:
            self._complete(key, future)
        return future.result()

    def want(self, keys: Iterable[Hashable]) -> None:
        """Schedule tasks in the background, in this order, unless they are scheduled already."""
        with self._lock:
            for key in keys:
                if key not in self._futures:
                    self._futures[key] = Future()
                    self._wanted.put((key, self._futures[key]))
        if self._thread is None and not self._wanted.empty():
            x64 = jax.config.read("jax_enable_x64")
            self._thread = threading.Thread(target=self._run, args=(x64,), daemon=True)
            self._thread.start()

    def forget(self, unneeded: Callable[[Any], bool]) -> None:
        """Drop results, and tasks not yet started, whose key is `unneeded`."""
        with self._lock:
            for key in [key for key in self._futures if unneeded(key)]:
                del self._futures[key]

    def wait(self) -> None:
        """Wait until all scheduled tasks are finished.

        Raises:
          Exception: what a task raised.
        """
        with self._lock:
            futures = list(self._futures.values())
        for future in futures:
            future.result()

    def close(self) -> None:
        """Wait for the running task: a process must not exit in the middle of a compilation."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._wanted.get_nowait()
        self._wanted.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, x64: bool) -> None:
        """Run the scheduled tasks; in JAX x64 is a thread-local setting."""
        if sys.platform == "linux":  # there nice is per thread: training steps come first
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        with jax.enable_x64(x64):
            while (task := self._wanted.get()) is not None:
                key, future = task
                with self._lock:
                    is_needed = self._futures.get(key) is future
                if is_needed:
                    self._complete(key, future)

    def _complete(self, key: Hashable, future: Future) -> None:
        try:
            future.set_result(self._work(key))
        except BaseException as error:
            future.set_exception(error)
