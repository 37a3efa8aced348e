"""Final loss of a small GPT that is widened under way, recipe by recipe, beside staying small.

    python benchmarks/symmetry.py --seeds 0 1 2 --json symmetry.json

A recipe decides how new units differ from those they copy, and so whether both learn the same. For
each seed one run stays small to its end. Every recipe goes on from that run's checkpoint of the step
before the operation, with the same batches, so that the runs of a seed differ by the recipe alone;
the table gives the final validation loss, its difference from recipe `even` in the mean over the seeds
with the standard error of these paired differences, and the largest change of the function.

Recipes: `small` (no operation), `even`, `noise-X` (X standard deviations), `split-X` (half-width X of
the shares), `fresh-X` (second moments begin at X means of their leaf's) and `big`, which is large from
the start: an MLP of that width, or, as heads keep their size, what recipe `fresh` (of heads) or
`split` (of the residual stream) makes of the model at step 0. An operation leaves out recipes that it
does not have.
With --folder the runs are kept there, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxmorph import train
from jaxmorph.growth.operations import OPERATIONS as TABLE

SIZES = {
    **{"n_layers": 2, "d_model": 64, "n_heads": 4, "d_ff": 64, "seq_len": 64, "batch_size": 16},
    **{"narrow_steps": 400, "wide_steps": 600, "eval_iters": 100},
}
OPERATIONS = ("widen_mlp", "widen_heads", "widen_embed")
RECIPES = (
    "small",
    "even",
    "noise-0.01",
    "split-0.5",
    "split-1",
    "fresh-1",
    "fresh-0.25",
    "fresh-0",
)
SMALL, EVEN, BIG = "small", "even", "big"
AMOUNTS = {"noise": "noise", "split": "spread", "fresh": "fresh_nu"}  # recipe -> X's option
ANY_LOSS = 1e9
PACKAGES = ("jaxmorph", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Result(NamedTuple):
    """What a finished run came to."""

    operation: str  # "" where there was none
    recipe: str
    seed: int
    loss: float  # validation, at the end
    function_delta: float | None
    seconds: float


class Bench(NamedTuple):
    """Trains the runs, each in a subfolder of `folder`."""

    folder: Path
    arguments: argparse.Namespace

    def small(self, seed: int) -> Result:
        """Train without an operation, and keep a checkpoint of the step before one would be."""
        # An operation comes before the checkpoint of its step, hence the step before.
        steps = self.arguments.narrow_steps - 1
        checkpoints = {"checkpoint_interval": steps, "keep_checkpoints": self._total}
        return self._train("", SMALL, seed, checkpoints)

    def widened(self, operation: str, recipe: str, seed: int) -> Result:
        """Go on from the small run with an operation in its schedule."""
        run, narrow = self._run_dir(operation, recipe, seed), self.arguments.narrow_steps
        if not run.exists():
            partial = run.with_name(f"{run.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _copy_run(self._run_dir("", SMALL, seed), partial, narrow - 1)
            partial.rename(run)
        schedule = self._schedule(operation, recipe_options(recipe), max_wait_iters=narrow)
        flags = {"scaling_schedule_file": schedule, "allow_schedule_change": True}
        return self._train(operation, recipe, seed, flags)

    def big(self, operation: str, seed: int) -> Result:
        """Train at the larger size from the start."""
        if operation == "widen_mlp":
            flags = {"d_ff": round(self.arguments.d_ff * self.arguments.factor)}
        else:
            recipe = "fresh" if "fresh" in recipes_of(operation) else "split"
            schedule = self._schedule(operation, {"recipe": recipe}, trigger_loss=ANY_LOSS)
            flags = {"scaling_schedule_file": schedule}
        return self._train(operation, BIG, seed, flags)

    @property
    def _total(self) -> int:
        return self.arguments.narrow_steps + self.arguments.wide_steps

    def _run_dir(self, operation: str, recipe: str, seed: int) -> Path:
        return self.folder / "_".join([*([operation] if operation else []), recipe, f"seed{seed}"])

    def _schedule(self, operation: str, options: dict, **trigger: float) -> Path:
        entry = {"name": operation, "value": self.arguments.factor, "reevaluate": False}
        entry |= {"trigger_loss": None, "max_wait_iters": None} | trigger | {"options": options}
        name = "-".join([operation, *(str(value) for value in [*options.values(), *trigger])])
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps([entry], indent=1) + "\n")
        return path

    def _train(self, operation: str, recipe: str, seed: int, more: dict[str, Any]) -> Result:
        start, run = time.monotonic(), self._run_dir(operation, recipe, seed)
        settings = configuration(self.arguments)["settings"] | {"run_dir": run, "seed": seed}
        settings |= {"max_steps": self._total, "eval_interval": self._total, **more}
        flags = [f"--{n}" if v is True else f"--{n}={v}" for n, v in settings.items()]
        flags += ["--no_keep_best", "--precompile=off", "--progress=off", *self.arguments.more]
        print(f"{run.name} ...", file=sys.stderr, flush=True)
        with (
            open(log := run.with_name(f"{run.name}.log"), "a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            status = train.main(flags)
        if status != 0:
            raise RuntimeError(f"{run.name} ended with {status}:\n{log.read_text()[-2000:]}")
        jax.clear_caches()
        metrics, operations = (_lines(run / f"{n}.jsonl") for n in ("metrics", "operations"))
        assert metrics[-1]["step"] == self._total, metrics[-1]
        deltas = [line["function_delta"] for line in operations]
        loss, seconds = float(metrics[-1]["val/loss"]), time.monotonic() - start
        return Result(operation, recipe, seed, loss, deltas[-1] if deltas else None, seconds)


def _copy_run(source: Path, target: Path, step: int) -> None:
    """Copy a run folder with one of its checkpoints."""
    shutil.copytree(
        source,
        target,
        ignore=lambda folder, names: [
            name for name in names if Path(folder).name == "checkpoints" and name != str(step)
        ],
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recipes_of(operation: str) -> tuple[str, ...]:
    """Return the recipes an operation has."""
    return TABLE[operation].options["recipe"].choices


def recipe_options(recipe: str) -> dict[str, Any]:
    """Return a recipe of the command line as a schedule's options."""
    name, _, amount = recipe.partition("-")
    return {"recipe": name} | ({AMOUNTS[name]: float(amount)} if amount else {})


def train_all(bench: Bench) -> list[Result]:
    """Train all runs, seed by seed."""
    results, arguments = [], bench.arguments
    for seed in arguments.seeds:
        results.append(bench.small(seed))
        for operation in arguments.operation:
            for recipe in arguments.recipes:
                if recipe == BIG:
                    results.append(bench.big(operation, seed))
                elif recipe.partition("-")[0] in recipes_of(operation):
                    results.append(bench.widened(operation, recipe, seed))
    return results


def summarize(results: Sequence[Result], operation: str) -> list[dict[str, Any]]:
    """Return a row for each recipe, the lowest mean loss first."""
    losses: dict[str, dict[int, float]] = {}
    deltas: dict[str, list[float]] = {}
    for result in results:
        if result.operation in ("", operation):
            losses.setdefault(result.recipe, {})[result.seed] = result.loss
            if result.function_delta is not None:
                deltas.setdefault(result.recipe, []).append(result.function_delta)
    rows = []
    for recipe, of_seeds in sorted(losses.items(), key=lambda i: statistics.fmean(i[1].values())):
        row = {"recipe": recipe, "mean_loss": statistics.fmean(of_seeds.values())}
        row |= {"losses": of_seeds, "against_even": None}
        if EVEN in losses and recipe != EVEN:
            row["against_even"] = paired(of_seeds, losses[EVEN])
        row["function_delta"] = max(deltas[recipe]) if recipe in deltas else None
        rows.append(row)
    return rows


def paired(losses: dict[int, float], others: dict[int, float]) -> dict[str, float | None]:
    """Return the mean difference of two recipes and its standard error; None for a single seed."""
    differences = [losses[seed] - others[seed] for seed in losses]
    error, count = None, len(differences)
    if count > 1:
        error = statistics.stdev(differences) / math.sqrt(count)
    return {"mean": statistics.fmean(differences), "standard_error": error}


def show(report: dict[str, Any]) -> None:
    """Print a table for each operation."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for operation, rows in report["operations"].items():
        seeds = [f"seed {seed}" for seed in rows[0]["losses"]]
        table = Table(title=f"{operation} {report['configuration']['factor']:g}, validation loss")
        table.add_column("recipe")
        for column in ("mean", *seeds, "against even", "Δ function"):
            table.add_column(column, justify="right")
        for row in rows:
            losses = [f"{loss:.4f}" for loss in (row["mean_loss"], *row["losses"].values())]
            against, delta = row["against_even"], row["function_delta"]
            difference = "-" if against is None else f"{against['mean']:+.4f}"
            if against is not None and against["standard_error"] is not None:
                difference += f" ± {against['standard_error']:.4f}"
            moved = "-" if delta is None else f"{delta:.1e}"
            table.add_row(row["recipe"], *losses, difference, moved)
        console.print(table)


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs share."""
    given = vars(arguments)
    names = [n for n in SIZES if not n.endswith("_steps")] + ["learning_rate", "scheduler", "data"]
    shared = {n: given[n] for n in ("narrow_steps", "wide_steps", "factor", "more")}
    return {**shared, "settings": {name: given[name] for name in names}}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    for name, default in SIZES.items():
        add(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    add("--learning_rate", type=float, default=2e-3, help="default: 2e-3")
    add("--scheduler", default="cosine", help="of the learning rate; default: cosine")
    add("--data", default="stdlib", help="as of jaxmorph.train; default: stdlib")
    add("--factor", type=float, default=2.0, help="of the operation; default: 2")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--operation", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="default: all")
    add("--recipes", nargs="+", type=_recipe, default=[*RECIPES, BIG],
        help=f"small is always among them; default: {' '.join(RECIPES)} {BIG}")  # fmt: skip
    add("--folder", type=Path, help="keep the runs there, and go on with those that are")
    add("--json", type=Path, metavar="FILE", help="write the report there as well")
    add("more", nargs="*", metavar="-- FLAGS", help="further flags of the runs")
    return parser


def _recipe(text: str) -> str:
    name, dash, amount = text.partition("-")
    with contextlib.suppress(ValueError):
        if text in (SMALL, EVEN, BIG) or (name in AMOUNTS and dash and float(amount) >= 0):
            return text
    raise argparse.ArgumentTypeError(f"got {text!r}, expected one like {', '.join(RECIPES)}, {BIG}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.narrow_steps < 2 or arguments.wide_steps < 1:
        parser.error("expected --narrow_steps ≥ 2 and --wide_steps ≥ 1")
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    record, text = folder / "configuration.json", json.dumps(configuration(arguments), indent=1)
    if record.exists() and record.read_text() != text:
        parser.error(
            f"{folder} has runs of another configuration, see {record}: expected a new one"
        )
    record.write_text(text)
    print(f"The runs are in {folder.absolute()}.", file=sys.stderr)
    show(report := examine(Bench(folder.absolute(), arguments)))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


def examine(bench: Bench) -> dict[str, Any]:
    """Train all runs; return the report."""
    # the runs of a recipe, and all narrow parts, are the same programs
    jax.config.update("jax_compilation_cache_dir", str(bench.folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    start, results = time.monotonic(), train_all(bench)
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    return {
        "benchmark": "symmetry",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}; {device}",
        "versions": {n: importlib.metadata.version(n) for n in PACKAGES},
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
        "configuration": configuration(bench.arguments),
        "seconds": time.monotonic() - start,
        "operations": {name: summarize(results, name) for name in bench.arguments.operation},
        "runs": [result._asdict() for result in results],
    }


if __name__ == "__main__":
    sys.exit(main())
