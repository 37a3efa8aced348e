"""Run every schedule of a folder to its end on a tiny model, and say what fired.

    python benchmarks/moving_over.py --json moving_over.json

The schedules are those of tests/growth/schedules, in the style of nano_gpt's training orchestrator:
sizes, lists of layers, `trigger_loss: 0`, batches, accumulation and LoRA. The tests run two of them,
this runs all. Each row has the operations that fired, the step of the last one, the final sizes, and
the largest change of the function by an operation that is to keep it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmorph.config.resolve import resolve
from jaxmorph.growth.plan import make_plan
from jaxmorph.train import main as train

GROWTH = Path(__file__).parents[1] / "tests" / "growth"
TEXT = "".join(f"{n} green bottles hanging on the wall. " for n in range(400))


def run(schedule: Path, config: Path, folder: Path) -> dict[str, Any]:
    """Train with a schedule; return its row.

    Raises:
      RuntimeError: the run failed, or an operation did not fire.
    """
    start, text = time.monotonic(), folder / "text.txt"
    text.write_text(TEXT)
    run_dir, log = folder / schedule.stem, folder / f"{schedule.name}.log"
    argv = ["--config", str(config), "--scaling_schedule_file", str(schedule)]
    argv += ["--data", str(text), "--run_dir", str(run_dir), "--progress", "lines"]
    plan = make_plan(resolve(argv)[0], None)
    with (
        open(log, "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        status = train(argv)
    lines = (run_dir / "operations.jsonl").read_text().splitlines() if status == 0 else []
    fired = [json.loads(line) for line in lines]
    if [one["name"] for one in fired] != [entry.name for entry in plan.entries]:
        raise RuntimeError(f"{schedule.name} ended with {status}:\n{log.read_text()[-2000:]}")
    pairs = zip(plan.stages[1:], (one["function_delta"] for one in fired), strict=True)
    model = fired[-1]["model_after"]
    sizes = ("n_layers", "d_model", "n_heads", "d_ff", "attn_lora_rank", "vocab_lora_rank")
    return {
        "schedule": schedule.name,
        "fired": len(fired),
        "last_step": fired[-1]["step"],
        "model": {name: model[name] for name in sizes},
        "exact_delta": max((d for s, d in pairs if s.exact and d is not None), default=None),
        "seconds": round(time.monotonic() - start, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schedules", type=Path, default=GROWTH / "schedules", metavar="FOLDER")
    parser.add_argument("--config", type=Path, default=GROWTH / "tiny_lora.yaml", metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/programs")
        for schedule in sorted(arguments.schedules.iterdir()):
            rows.append(row := run(schedule, arguments.config, Path(folder)))
            print(*(f"{name} {value}" for name, value in row.items()), sep="; ", flush=True)
    print(f"{len(rows)} schedules ran to their end.")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
