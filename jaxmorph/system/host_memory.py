"""Host memory: how much is free, and keeping freed memory in the process on the CPU backend.

XLA's CPU backend reallocates a step's temporaries every step. By default glibc maps large blocks from
the system and unmaps them immediately, so every step pays for about a page fault per 4 kB: a tenth to
a fifth of its time. Keeping freed memory in the process keeps the pages mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

# <malloc.h>: parameters of mallopt
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, on Linux without an accelerator; elsewhere do nothing.

    Call it before JAX is imported: a thread keeps its initial arena. Results do not change.
    """
    if sys.platform != "linux" or any(Path(device).exists() for device in _ACCELERATORS):
        return
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return  # the user has tuned it already
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def available_memory() -> int | None:
    """Return the bytes the process can still allocate within its container; None: unknown."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return min([int(line.split()[1]) << 10, *_left_in_group()])
    return None


def _left_in_group() -> list[int]:
    """Return the bytes left in the control group, as a list that is empty without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, used = (
            int(Path("/sys/fs/cgroup", name).read_text())  # "max", no number, without a limit
            for name in ("memory.max", "memory.current")
        )
        return [max(0, limit - used)]
    return []
