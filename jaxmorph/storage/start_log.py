"""`runs.jsonl`: the software and devices of each start of a run.

Another library release or another device may round differently: a run resumed with it can no
longer be reproduced bit for bit elsewhere, and this log says since when.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmorph import __version__
from jaxmorph.storage.json_lines import JsonLines, cut_back, read_records
from jaxmorph.system.files import refusing_bad_paths

START_LOG = "runs.jsonl"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def software_facts(devices: Sequence[Any]) -> dict[str, Any]:
    """Return what may affect the last bits of a result: versions, platform, devices.

    Args:
      devices: the JAX devices the run computes on.
    """
    return {
        "jaxmorph": __version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": devices[0].device_kind,
        "device_count": len(devices),
    }


def record_start(run_dir: Path, step: int, resumed: bool, software: Mapping[str, Any]) -> list[str]:
    """Append a line for a start of the run to `runs.jsonl`; return notes for the user.

    A line has `started` (local time with its zone), `step`, `resumed` and all of `software`.

    Args:
      run_dir: the run folder, held by this process.
      step: the step it starts from.
      resumed: whether the run was resumed.
      software: see `software_facts`.

    Returns:
      A sentence if a resumed run uses other software than at its last start; else nothing.

    Raises:
      InputError: the log cannot be read or written, or a line before its last is damaged.
      OSError: the disk is full or fails.
    """
    path = run_dir / START_LOG
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with refusing_bad_paths(), JsonLines(path) as lines:
        cut_back(path, lambda record: True)  # what a killed process or a power cut left
        earlier = read_records(path)
        lines.write({"started": started, "step": step, "resumed": resumed, **software})
        lines.sync()
    changes = changed_software(earlier[-1], software) if resumed and earlier else []
    if not changes:
        return []
    said = ", ".join(changes)
    return [f"This run continues with other software: {said}; results may differ in the last bits."]


def changed_software(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two starts of a run, each as "name old -> new"."""
    return [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
