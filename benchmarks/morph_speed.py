"""What a change of shape costs in time and memory, beside copying the new state.

    python benchmarks/morph_speed.py --json morph_speed.json
    python benchmarks/morph_speed.py --against ../older     # the same with the code in that folder

Each operation is compiled as a run compiles it and measured in a process of its own, on one CPU device:
--repeats times the morph, and a plain copy of the new state after each, so that a busy machine slows
both. With --against the two folders take turns, --rounds times. Times are medians.

Temporaries are the compiler's own count. The resident peak is that of the process in its first morph,
less what it held before the old state was made; the old state and the new one are in it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZES = {
    **{"n_layers": 8, "d_model": 640, "n_heads": 10, "d_ff": 2560, "seq_len": 128},
    **{"batch_size": 1, "positions": "rotary", "tokenizer": "byte", "max_steps": 10},
}
CASES: dict[str, dict[str, Any]] = {
    "widen_mlp, split": {"name": "widen_mlp", "options": {"recipe": "split"}},
    "widen_mlp, even": {"name": "widen_mlp", "options": {"recipe": "even"}},
    "widen_heads, split": {"name": "widen_heads", "options": {"recipe": "split"}},
    "stack_layers": {"name": "stack_layers"},
}
MB = 1e6


def measured(case: str, repeats: int) -> dict[str, Any]:
    """Return the figures of one operation, in this process."""
    from jaxmorph.system.host_memory import keep_freed_memory

    keep_freed_memory()

    import jax
    import jax.numpy as jnp

    compiler = _compiler(CASES[case])
    morph: Any = compiler.change(1).morph
    analysis = morph.memory_analysis()
    gc.collect()
    held = _resident("VmRSS")
    state = jax.block_until_ready(compiler.initial_state())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    new = jax.block_until_ready(morph(state))[0]
    peak = _resident("VmHWM") - held
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    jax.block_until_ready(copy(new))
    times: dict[str, list[float]] = {"morph": [], "copy": []}
    for _ in range(repeats):
        for name, run in (("morph", lambda: morph(state)), ("copy", lambda: copy(new))):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(new)]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "states_MB": (sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + sum(sizes)) / MB,
        "largest_leaf_MB": max(sizes) / MB,
        "temporaries_MB": analysis.temp_size_in_bytes / MB,
        "peak_MB": peak / MB,
        **times,
    }


def _compiler(entry: dict[str, Any]) -> Any:
    """Return the compiler of a run that performs an operation, as `train` makes it."""
    from jaxmorph.config.mesh import parse_mesh
    from jaxmorph.config.resolve import resolve
    from jaxmorph.growth.plan import make_plan
    from jaxmorph.step.sharding import make_mesh
    from jaxmorph.training.stages import StageCompiler
    from jaxmorph.training.tables import Tables

    mesh = parse_mesh("data=1")
    trigger = {"value": 2, "trigger_loss": None, "max_wait_iters": 1, "reevaluate": False}
    with tempfile.TemporaryDirectory() as folder:
        schedule = Path(folder, "schedule.json")
        schedule.write_text(json.dumps([trigger | entry]))
        flags = SIZES | {"scaling_schedule_file": schedule, "run_dir": Path(folder, "run")}
        settings, _ = resolve([f"--{name}={value}" for name, value in flags.items()])
        plan = make_plan(settings, mesh)
    return StageCompiler(plan, make_mesh(mesh), lambda shape: [], Tables())


def _resident(field: str) -> float:
    """Return a size of this process in bytes: VmRSS, or its peak, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_a_process(case: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Return the figures of one operation with the package in a folder."""
    words = [sys.executable, __file__, "--case", case, "--repeats", str(repeats)]
    environment = os.environ | {"PYTHONPATH": str(folder.resolve()), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of several processes as one: medians, and the ratio of times."""
    found = {
        name: statistics.median(figures[name] for figures in rounds)
        for name in rounds[0]
        if name not in ("morph", "copy")
    }
    for name in ("morph", "copy"):
        found[f"{name}_seconds"] = statistics.median(t for one in rounds for t in one[name])
    ratios = [a / b for one in rounds for a, b in zip(one["morph"], one["copy"], strict=True)]
    return found | {"times_copy": statistics.median(ratios)}


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    columns = ("s", "copy, s", "× copy", "old + new, MB", "largest leaf", "temporaries", "peak")
    table = Table("operation", *columns)
    for name, found in results.items():
        times = [f"{found[key]:.3f}" for key in ("morph_seconds", "copy_seconds")]
        keys = ("states_MB", "largest_leaf_MB", "temporaries_MB", "peak_MB")
        cells = [*times, f"{found['times_copy']:.1f}", *(f"{found[key]:,.0f}" for key in keys)]
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=7, help="per process; default: 7")
    parser.add_argument("--rounds", type=int, default=1, help="processes per case; default: 1")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.case:
        print(json.dumps(measured(arguments.case, arguments.repeats)))
        return 0
    folders = {"": Path(__file__).parent.parent}
    folders |= {"other: ": arguments.against} if arguments.against else {}
    results = {}
    for case in arguments.cases:
        rounds: dict[str, list[dict[str, Any]]] = {prefix: [] for prefix in folders}
        for _ in range(arguments.rounds):
            for prefix, folder in folders.items():
                rounds[prefix].append(in_a_process(case, arguments.repeats, folder))
        results |= {prefix + case: summary(found) for prefix, found in rounds.items()}
    report = {
        "benchmark": "morph_speed",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "load": os.getloadavg()[1],
        "versions": {
            name: importlib.metadata.version(name) for name in ("jaxmorph", "jax", "jaxlib")
        },
        "command": " ".join(["python", *sys.argv]),
        "sizes": SIZES,
        "results": results,
    }
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
