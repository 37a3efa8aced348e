"""What a change of architecture costs a run: from its trigger to the end of the next step.

    python benchmarks/morph_stall.py --json morph_stall.json

The same growth is run three ways, each in a process of its own, one after the other, --rounds times:
jaxmorph with the next stage compiled in the background, jaxmorph compiling when the operation fires,
and PyTorch, where the model is rebuilt with the old weights, the optimizer with the old moments, and
`torch.compile` called again (extra `bench`; left out where PyTorch is not installed).

A step here lasts from the end of one update to the end of the next, and so has in it whatever happens
between the two: an operation, tracing, or the share of the cores that a background compilation takes.
Usual are the steps of the run that compiles nothing in the background, stage by stage. Every step but
the run's first counts. There are no evaluations and no checkpoints in between.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
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

WAYS = ("precompiled", "not precompiled", "torch")
SIZES = {"n_layers": 4, "d_model": 192, "n_heads": 6, "seq_len": 128, "batch_size": 16}


def jaxmorph_marks(arguments: argparse.Namespace, precompile: str) -> dict[str, Any]:
    """Return when each step of a run ended, in seconds, and after which step it grew."""
    import jax

    from jaxmorph.config.mesh import parse_mesh
    from jaxmorph.config.resolve import resolve
    from jaxmorph.growth.plan import make_plan
    from jaxmorph.system.host_memory import keep_freed_memory
    from jaxmorph.training.loop import train
    from jaxmorph.training.run import Run
    from jaxmorph.training.turns import TURNS, Turn

    keep_freed_memory()
    marks: list[float] = []

    def mark(run: Run) -> None:
        """Wait for the step, and note when it ended."""
        jax.block_until_ready(run.state["step"])
        marks.append(time.perf_counter())

    timed = Turn("mark", due=lambda run: run.step > 0, act=mark)
    with tempfile.TemporaryDirectory() as folder:
        schedule = Path(folder, "schedule.json")
        rows = [growth("widen_mlp", arguments), growth("stack_layers", arguments)]
        schedule.write_text(json.dumps(rows))
        steps = 3 * arguments.steps
        flags = SIZES | {
            **{"positions": "rotary", "mesh": "data=1", "run_dir": Path(folder, "run")},
            **{"max_steps": steps, "eval_interval": 10 * steps, "eval_iters": 1},
            **{"precompile": precompile, "scaling_schedule_file": schedule, "progress": "off"},
        }
        settings, sources = resolve([f"--{name}={value}" for name, value in flags.items()])
        plan = make_plan(settings, parse_mesh(settings.scale.mesh))
        with contextlib.redirect_stdout(sys.stderr):
            status = train(plan, sources, turns=(timed, *TURNS))
        if status != 0:
            raise RuntimeError(f"training ended with {status}")
        lines = Path(folder, "run/operations.jsonl").read_text().splitlines()
    fired = [json.loads(line) for line in lines]
    return {
        "marks": marks,
        "grew_after": [line["step"] for line in fired],
        "waited": [line["compile_wait_seconds"] for line in fired],
        "version": f"jax {jax.__version__}",
    }


def growth(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a schedule's entry that doubles a size after so many steps."""
    options = {"widen_mlp": {"recipe": "split"}, "stack_layers": {"recipe": "identity"}}[name]
    wait = {"trigger_loss": None, "max_wait_iters": arguments.steps}
    return {"name": name, "value": 2, **wait, "reevaluate": False, "options": options}


def torch_marks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the same for PyTorch: weights and moments copied, then compiled again."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # an earlier run's kernels would do

    import torch  # pyright: ignore[reportMissingImports]
    from torch_gpt import Shape, torch_gpt

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(vocab_size=256, **SIZES)
    tokens = torch.randint(0, 256, (shape.batch_size, shape.seq_len + 1), device=device)
    marks, grew_after = [], []

    def build(old: Any, old_optimizer: Any, n_layers: int, d_ff: int) -> tuple[Any, Any, Any]:
        model = torch_gpt(dataclasses.replace(shape, n_layers=n_layers), d_ff).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if old is not None:
            _copy(torch, old, old_optimizer, model, optimizer)
        return model, optimizer, torch.compile(model)

    model, optimizer, compiled = build(None, None, SIZES["n_layers"], 4 * SIZES["d_model"])
    for step in range(3 * arguments.steps):
        loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        marks.append(time.perf_counter())
        if step + 1 in (arguments.steps, 2 * arguments.steps):
            grew_after.append(step + 1)
            n_layers = SIZES["n_layers"] * len(grew_after)
            model, optimizer, compiled = build(model, optimizer, n_layers, 8 * SIZES["d_model"])
    return {"marks": marks, "grew_after": grew_after, "version": f"torch {torch.__version__}"}


def _copy(torch: Any, old: Any, old_optimizer: Any, new: Any, new_optimizer: Any) -> None:
    """Copy what has the same name, as far as it goes, weights and moments."""
    sources = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if (source := sources.get(name)) is None:
            continue
        region = tuple(
            slice(0, min(a, b)) for a, b in zip(source.shape, parameter.shape, strict=True)
        )
        moments = {}
        with torch.no_grad():
            parameter[region] = source[region]
            for field, moment in old_optimizer.state[source].items():
                if moment.shape == source.shape:
                    moments[field] = torch.zeros_like(parameter)
                    moments[field][region] = moment[region]
                else:
                    moments[field] = moment.clone()
        new_optimizer.state[parameter] = moments


def figures(run: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of the stalls and of the other steps of a run."""
    marks, grew = run["marks"], run["grew_after"]
    # steps[i] ended with marks[i + 1], step i + 2 of the run
    steps = [after - before for before, after in itertools.pairwise(marks)]
    stalls = [steps[step - 1] for step in grew]
    edges = [1, *grew, len(steps) + 1]  # the first step, which may still warm up, is not among them
    stages = [steps[a - (k == 0) : b - 1] for k, (a, b) in enumerate(itertools.pairwise(edges))]
    return {
        "stalls": stalls,
        "worst_step": max(steps),
        "stage_medians": [statistics.median(stage) for stage in stages],
        "stage_worst": [max(stage) for stage in stages],
    }


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    columns = (
        "stall: MLP ×2",
        "stall: layers ×2",
        "worst step",
        "median by stage",
        "worst by stage",
    )
    table = Table("way, seconds", *columns)
    for way, rounds in report["rounds"].items():
        for one in rounds:
            single = [*one["stalls"], one["worst_step"]]
            lists = [one["stage_medians"], one["stage_worst"]]
            cells = [f"{value:.2f}" for value in single]
            cells += [", ".join(f"{value:.3f}" for value in values) for values in lists]
            table.add_row(way, *cells)
    console.print(table)
    for name, value in report["ratios"].items():
        console.print(f"{name}: {value:.2f}")


def ratios(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return what the bars are set on: medians over the rounds."""
    plain, ahead = (rounds.get(way, []) for way in ("not precompiled", "precompiled"))
    if not plain or not ahead:
        return {}
    pairs = list(zip(ahead, plain, strict=True))
    found = {
        "worst step, precompiling / not, over stages": statistics.median(
            max(a / b for a, b in zip(x["stage_worst"], p["stage_worst"], strict=True))
            for x, p in pairs
        ),
        "stall, precompiled / worst usual step of the stage after it": statistics.median(
            max(a / b for a, b in zip(x["stalls"], p["stage_worst"][1:], strict=True))
            for x, p in pairs
        ),
    }
    for k, name in enumerate(("MLP", "layers")):
        found[f"stall, not precompiled / precompiled, {name}"] = statistics.median(
            p["stalls"][k] / a["stalls"][k] for a, p in pairs
        )
    if torch := rounds.get("torch"):
        found["stall, torch / precompiled, layers"] = statistics.median(
            t["stalls"][1] / a["stalls"][1] for t, a in zip(torch, ahead, strict=False)
        )
    return found


def measure(way: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run one way in a process of its own."""
    command = [sys.executable, __file__, "--way", way, *argv]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="per stage; default: 200")
    parser.add_argument("--rounds", type=int, default=1, help="default: 1")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.way:
        run = (
            torch_marks(arguments)
            if arguments.way == "torch"
            else jaxmorph_marks(arguments, "on" if arguments.way == "precompiled" else "off")
        )
        print(json.dumps(run))
        return 0
    ways = arguments.ways.split(",")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    versions: dict[str, str] = {}
    for _ in range(arguments.rounds):
        for way in ways:
            try:
                run = measure(way, ["--steps", str(arguments.steps)])
            except subprocess.CalledProcessError:
                print(f"{way}: could not run", file=sys.stderr)
                continue
            versions[way] = run["version"]
            found[way].append(figures(run) | {"waited": run.get("waited")})
    report = {
        "benchmark": "morph_stall",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": versions | {"jaxmorph": importlib.metadata.version("jaxmorph")},
        "command": " ".join(["python", *sys.argv]),
        "sizes": SIZES,
        "steps_per_stage": arguments.steps,
        "rounds": {way: rounds for way, rounds in found.items() if rounds},
    }
    report["ratios"] = ratios(report["rounds"])
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
