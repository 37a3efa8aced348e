"""Time and memory of the report on a long run.

    python benchmarks/long_report.py --steps 1000000 --log_interval 1

Writes the metrics of such a run, evaluated every 250 steps, into a temporary folder, and runs
`python -m jaxmorph.plot report` on it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVAL_INTERVAL = 250


def write_metrics(path: Path, steps: int, log_interval: int) -> None:
    """Write a line a step, like those of a run whose loss falls with the square root of the step."""
    noise = random.Random(0)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            line: dict[str, float] = {"step": step}
            loss = 1 + 4 / math.sqrt(step)
            if step % log_interval == 0 or step % EVAL_INTERVAL == 0:
                line |= {
                    **{"train/grad_norm": noise.random(), "train/learning_rate": 1e-3},
                    **{"train/loss": loss + noise.gauss(0, 0.1), "train/skipped": 0, "stage": 0},
                    **{"step_seconds": 0.1 + noise.random() / 100, "tokens": 2048 * step},
                    **{"flops": 905_969_664_000 * step, "params": 643_584, "batch_size": 16},
                    "grad_accum_steps": 1,
                }
            if step % EVAL_INTERVAL == 0:
                line |= {"val/loss": loss + noise.gauss(0, 0.01), "val/accuracy": 0.5}
            print(json.dumps(line), file=file)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--log_interval", type=int, default=1, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        write_metrics(path, arguments.steps, arguments.log_interval)
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "jaxmorph.plot", "report", folder], check=True)
        seconds = time.monotonic() - start
        size = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{arguments.steps:,} steps, {size / 1e6:,.0f} MB: {seconds:.1f} s, {peak:,.0f} MB resident"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
