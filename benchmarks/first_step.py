"""Seconds from the command to its first step, on the small Shakespeare run.

    python benchmarks/first_step.py --data tinyshakespeare.txt --json first_step.json

Three kinds of start, in turn: as a new user has it; with JAX's compilation cache while it is written;
and with that cache filled. The corpus is tokenised beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs" / "tinyshakespeare_cpu.yaml"
FLAGS = ["--max_steps", "3", "--warmup_steps", "0", "--progress", "lines"]
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def seconds_to_first_step(data: str, folder: Path, run: str, cache: Path | None) -> float:
    """Return the seconds from starting the command until its first step is printed."""
    command = [sys.executable, "-m", "jaxmorph.train", "--config", str(CONFIG), "--data", data]
    command += [*FLAGS, "--cache_dir", str(folder / "data"), "--run_dir", str(folder / run)]
    environment = os.environ | ({} if cache is None else CACHE)
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    start, seconds = time.perf_counter(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if seconds is None and line.startswith("step 1/"):
                seconds = time.perf_counter() - start
    if process.returncode or seconds is None:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return seconds


def main() -> None:
    """Measure, print a line per kind of start and write all of it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="tiny Shakespeare, a text file")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {"no cache": [], "cache written": [], "cache read": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds_to_first_step(arguments.data, folder, "warm-up", None)
        for k in range(arguments.rounds):
            for kind, cache in zip(found, (None, *[folder / f"cache{k}"] * 2), strict=True):
                run = f"{kind} {k}"
                found[kind].append(seconds_to_first_step(arguments.data, folder, run, cache))
    for kind, seconds in found.items():
        print(
            f"{kind:14s} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
