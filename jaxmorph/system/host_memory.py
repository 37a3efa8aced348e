"""Host memory: how much there is and how much is free; and keeping freed memory on the CPU backend.

XLA's CPU backend reallocates a step's temporaries every step. By default glibc maps large blocks from
the system and unmaps them immediately, so every step pays for about a page fault per 4 kB: a tenth to
a fifth of its time. Keeping freed memory in the process keeps the pages mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# <malloc.h>: parameters of mallopt
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # bytes; what control groups say for "no limit" is more
_ACCELERATORS = ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, on Linux without an accelerator; elsewhere do nothing.

    Call it before JAX is imported: a thread keeps its initial arena. Results do not change.
    """
    if sys.platform != "linux" or has_accelerator():
        return
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return  # the user has tuned it already
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def has_accelerator() -> bool:
    """Return whether the machine seems to have a GPU or TPU, judging by its device files."""
    return any(Path(device).exists() for device in _ACCELERATORS)


def memory_limits() -> dict[str, int]:
    """Return the bytes this process can have at most, by what limits them; unknown ones are omitted.

    What the process uses already counts against each of them, save the address limit: that is what
    is left, as code and threads take gigabytes of addresses (but of little else).
    """
    limits = {}
    if total := _meminfo("MemTotal"):
        limits["this machine's memory"] = total
    if groups := [limit for limit, _ in _groups()]:
        limits["the control group's limit"] = min(groups)
    if (left := _addresses_left()) is not None:
        limits["what the address limit (ulimit -v) leaves"] = left
    return limits


def available_memory() -> int | None:
    """Return the bytes the process can still allocate, within its limits; None: unknown."""
    if (available := _meminfo("MemAvailable")) is None:
        return None
    left = [max(0, limit - used) for limit, used in _groups()]
    addresses = _addresses_left()
    return min([available, *left, *([] if addresses is None else [addresses])])


def _meminfo(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (_PROC / "meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) << 10
    return None


def _groups() -> Iterator[tuple[int, int]]:
    """Yield limit and use of each limited control group that the process is in, of either version."""
    lines = []
    with contextlib.suppress(OSError):
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _GROUPS / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        names = names if controllers else ("memory.max", "memory.current")
        inner = Path(path.lstrip("/"))
        for folder in {root / each for each in (inner, *inner.parents)}:
            with contextlib.suppress(OSError, ValueError):  # "max", no number, without a limit
                limit, used = (int((folder / name).read_text()) for name in names)
                if limit < _UNLIMITED:
                    yield limit, used


def _addresses_left() -> int | None:
    """Return the bytes left of the process's address limit; None without one."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int((_PROC / "self/statm").read_text().split()[0])
        return max(0, limit - pages * resource.getpagesize())
    except (ImportError, OSError, ValueError):  # another system
        return None
