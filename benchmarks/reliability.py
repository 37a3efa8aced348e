"""Kill a training run again and again, and compare what it leaves with a run that nobody disturbed.

    python benchmarks/reliability.py --kills 20 --named --json reliability.json

One run trains without interruption; it grows in depth, in width, and merges its LoRA adapters.
Another one, with the same settings in another run folder, is killed by SIGKILL at random (--seed)
moments and started again until it is done. With --named a third one is killed at the points of
`jaxmorph.system.crash_points` around each of the three morphs (`AROUND`), one after the other.
With --plateau each morph waits for the validation loss to stand still, and for nothing else, so that
what the trigger has counted must come back with the checkpoint for it to fire at the same step.
With --several a very small model grows by the operations of `SEVERAL`, two or three of them at one step,
and runs of `KILLS_A_RUN` kills each are killed, two at a time.
At the end the run folders must say the same. The moments are uniform over a process's time, from its
start to a limit that lets the run be done soon after the last kill. All run on the CPU, from one copy
of the package: work on it meanwhile changes nothing.

    python benchmarks/reliability.py --storage
    python benchmarks/reliability.py --corruptions 1100

kill a process that only saves, prunes and logs (`storage_kills.py`), and damage a checkpoint in every
way but one at a time (`corruptions.py`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jaxmorph
from jaxmorph.cli.errors import InputError
from jaxmorph.storage.manifest import problem_of, read_manifest
from jaxmorph.storage.run_lock import RunLock
from jaxmorph.system.crash_points import VARIABLE

EVAL_INTERVAL, SAVE_INTERVAL = 50, 20
CONFIGURATION = {
    **{"n_layers": 2, "d_model": 64, "n_heads": 4, "seq_len": 64, "dropout": 0.1},
    **{"batch_size": 8, "grad_accum_steps": 2, "mesh": "data=1", "eval_iters": 4},
    **{"eval_interval": EVAL_INTERVAL, "checkpoint_interval": SAVE_INTERVAL, "log_interval": 1},
    **{"attn_lora_rank_divisor": 8, "lora_base": "trained"},
    "plateau_min_change": 0.02,  # for --plateau: in 2,000 steps the loss then stands still three times
}
MORPHS = (
    {"name": "stack_layers", "value": 2, "options": {"recipe": "identity"}},
    {"name": "widen_mlp", "value": 2},
    {"name": "merge_lora_weights", "value": None},
)
AROUND = {  # where to kill, around which of the morphs
    "stack_layers": (
        *("step", "evaluation", "before_operation", "during_operation", "after_operation"),
        *("reevaluation", "first_step"),
    ),
    "widen_mlp": (
        *("compiling", "during_operation", "operation_recorded", "before_save", "during_save"),
    ),
    "merge_lora_weights": (
        *("before_operation", "during_operation", "reevaluation", "first_step", "after_arrays"),
        *("after_manifest", "after_save"),
    ),
}
SEVERAL = (  # the first of each group waits; the others follow it at its step, whatever the loss is
    (("change_lr", 0.5), ("widen_mlp", 2), ("set_batch_size", 6)),
    (("stack_layers", 2), ("change_grad_accum", 2)),
    (("widen_heads", 2), ("set_lora_alpha", 8), ("change_eval_iters", 2)),
    (("merge_lora_weights", None), ("stack_layers", 2)),
    (("set_seq_len", 8), ("change_lr", 2), ("widen_mlp", 1.5)),
)
VERY_SMALL = {  # so that what a restart costs is Python and JAX
    **{"n_layers": 1, "d_model": 8, "n_heads": 2, "seq_len": 16, "batch_size": 4},
    **{"grad_accum_steps": 1, "eval_iters": 2, "checkpoint_interval": 40},
    "attn_lora_rank_divisor": 4,
}
KILLS_A_RUN, AT_A_TIME = 25, 2
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
PATIENCE = 4  # evaluations without an improvement that set a morph off, with --plateau
CORPUS_CHARACTERS = 500_000  # so that the run passes through it more than once
PACKAGES = ("jaxmorph", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
LIMIT = 900  # seconds; a process that runs longer hangs


class Run(NamedTuple):
    """A run folder, beside the package, and the command that starts or resumes the run in it."""

    folder: Path
    corpus: Path
    steps: int
    more: Sequence[str]  # flags
    configuration: Mapping[str, Any] = CONFIGURATION

    @property
    def schedule(self) -> Path:
        """The schedule file, beside the run folder."""
        return self.folder.parent / "schedule.json"

    def start(self, crash_at: str = "") -> subprocess.Popen:
        """Start a process; what it prints goes to FOLDER.log."""
        paths = {"data": self.corpus, "run_dir": self.folder, "max_steps": self.steps}
        paths["scaling_schedule_file"] = self.schedule
        flags = [f"--{name}={value}" for name, value in {**self.configuration, **paths}.items()]
        command = [sys.executable, "-m", "jaxmorph.train", *flags, *self.more]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", VARIABLE: crash_at}
        if self.configuration is not CONFIGURATION:  # else compiling is a part of what is killed
            env |= {"JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "programs")}
            env |= {
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "XLA_FLAGS": QUICKLY_COMPILED,
            }
        here = self.folder.parent
        with open(self.folder.with_suffix(".log"), "wb") as log:
            return subprocess.Popen(command, env=env, cwd=here, stdout=log, stderr=log)

    def printed(self) -> str:
        """Return what the last process printed."""
        return self.folder.with_suffix(".log").read_text()

    def metrics(self) -> bytes:
        """Return the bytes of metrics.jsonl, b"" where there is none."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def operations(self) -> list[dict[str, Any]]:
        """Return what has fired, without the times it took."""
        lines = (self.folder / "operations.jsonl").read_text().splitlines()
        untimed = {"seconds": 0, "compile_wait_seconds": 0}
        return [json.loads(line) | untimed for line in lines]

    def checkpoints(self) -> list[int]:
        """Return the steps of the committed checkpoints, oldest first; 0 where there is none."""
        names = [path.name for path in self.folder.glob("checkpoints/*")]
        return sorted(int(name) for name in names if name.isdigit()) or [0]

    def position(self, step: int) -> dict[str, Any]:
        """Return where the checkpoint of a step says that the run stands."""
        return json.loads((self.folder / f"checkpoints/{step}/meta.json").read_text())["position"]


def end(run: Run, process: subprocess.Popen, expected: int) -> None:
    """Wait for a process; refuse any but the expected status."""
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        status = f"nothing in {LIMIT} s"
    if status != expected:
        raise RuntimeError(f"ended with {status}, not {expected}:\n{run.printed()[-2000:]}")


def watch(run: Run, process: subprocess.Popen, seconds: float, most: int) -> float:
    """Wait so long, or until the line of step `most`; return when training began, 0 if it did not."""
    start, began, newest, before = time.monotonic(), 0.0, run.checkpoints()[-1], run.metrics()
    while (passed := time.monotonic() - start) < seconds and process.poll() is None:
        lines = run.metrics()
        if lines != before and (step := lines.count(b"\n") - 1) > newest:
            began = began or passed
            if step >= most:
                break
        time.sleep(min(0.03, seconds - passed))
    return began


def rows_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the schedule: a standstill, a wait, or the entry before sets each of its entries off."""
    if not arguments.several:
        wait = {"max_wait_iters": arguments.steps // (len(MORPHS) + 1)}
        trigger = {"trigger_plateau": PATIENCE} if arguments.plateau else wait
        return [morph | trigger | {"reevaluate": True} for morph in MORPHS]
    wait, rows = arguments.steps // (len(SEVERAL) + 1), []
    for group in SEVERAL:
        for number, (name, value) in enumerate(group):
            trigger = {"trigger_loss": 1e6} if number else {"max_wait_iters": wait}
            rows.append({"name": name, "value": value, "reevaluate": number == 1} | trigger)
    return rows


def reason_of(row: Mapping[str, Any]) -> str:
    """Return the reason that a fired entry must have."""
    reasons = {"trigger_plateau": "plateau", "trigger_loss": "loss", "max_wait_iters": "timeout"}
    return next(reason for trigger, reason in reasons.items() if trigger in row)


def undisturbed(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Train to the end; return the seconds of the start-up, of a step and in all.

    Raises:
      RuntimeError: an entry of `rows` has not fired, not for its reason, or not at the step of the one
        it follows; then there is nothing to compare with.
    """
    start, process = time.monotonic(), run.start()
    startup = watch(run, process, LIMIT, most=1)
    end(run, process, 0)
    whole, lines = time.monotonic() - start, map(json.loads, run.metrics().splitlines()[1:])
    step = statistics.median(line["step_seconds"] for line in lines)
    lines = run.operations()
    fired = [(line["name"], line["reason"]) for line in lines]
    follow = [a["step"] == b["step"] for a, b in itertools.pairwise(lines) if b["reason"] == "loss"]
    problem = _unlike([(row["name"], reason_of(row)) for row in rows], fired)
    if problem or not all(follow):
        raise RuntimeError(f"operations of the undisturbed run: {problem}")
    return {"startup_seconds": startup, "step_seconds": step, "seconds": whole}


def killed_at_random(run: Run, kills: int, seed: int, whole: dict) -> Iterator[dict[str, Any]]:
    """Yield what was found after each of the random kills, then finish the run."""
    draw, startup = random.Random(seed), whole["startup_seconds"]
    for left in range(kills, 0, -1):
        before, newest = run.metrics(), run.checkpoints()[-1]
        slowness = startup / whole["startup_seconds"]  # others may use the machine, now or then
        # A life of 0 to S + G seconds, of which starting takes S, trains for G²/2(S + G) in the mean:
        # let that be 9/10 of its share of the training that remains, and never half of all of it.
        share = 1.8 * (run.steps - newest) * whole["step_seconds"] * slowness / left
        training = (share + math.sqrt(share**2 + 4 * share * startup)) / 2
        moment, process = draw.uniform(0, startup + training), run.start()
        began = watch(run, process, moment, most=(newest + run.steps + 1) // 2)
        startup = began or max(startup, moment)
        process.kill()  # if it has ended by itself, its status says so
        end(run, process, -signal.SIGKILL)
        yield {"seconds": moment, "during": occupation(run, before, newest)} | after_kill(run)
    end(run, run.start(), 0)


def killed_at_points(run: Run, whole: Run) -> Iterator[dict[str, Any]]:
    """Yield what was found after a kill at each point around each of the morphs."""
    steps = [line["step"] for line in whole.operations()]
    for number, (morph, points) in enumerate(AROUND.items()):
        for point in points:
            count = passings(run, point, number, steps)
            end(run, run.start(f"{point}:{count}"), -signal.SIGKILL)
            yield {"during": f"{morph}: {point}"} | after_kill(run)
    end(run, run.start(), 0)


def passings(run: Run, point: str, number: int, steps: Sequence[int]) -> int:
    """Return how often a resumed process passes a point up to the one around a morph.

    Args:
      run: as it lies there.
      point: of `jaxmorph.system.crash_points`.
      number: of the morph, from 0.
      steps: at which the morphs fire.
    """
    begun, newest = any(run.folder.glob("checkpoints/[0-9]*")), run.checkpoints()[-1]
    at = steps[number]
    fired = sum(step <= newest for step in steps)  # and in the newest checkpoint
    match point:
        case "step":  # the one that ends with the morph
            return at - newest
        case "evaluation":  # the second of the batches there
            before = (at - 1) // EVAL_INTERVAL - newest // EVAL_INTERVAL + (not begun)
            return before * CONFIGURATION["eval_iters"] + 2
        case "reevaluation":
            return (number - fired) * CONFIGURATION["eval_iters"] + 2
        case "compiling":  # after that of the stage it begins in
            return 2 + number - fired
        case "before_save" | "during_save" | "after_arrays" | "after_manifest" | "after_save":
            # the first that has the morph: that of its own step where one is due there
            return math.ceil(at / SAVE_INTERVAL) - newest // SAVE_INTERVAL + (not begun)
    return number - fired + 1


def occupation(run: Run, before: bytes, newest: int) -> str:
    """Return what a process was at when it was killed, as its files and its output tell."""
    step = run.metrics().count(b"\n") - 1
    if "jaxmorph on jax" not in run.printed():
        return "imports and corpus"
    if run.metrics() == before or step <= newest:
        return "restoring and compiling"
    if run.checkpoints()[-1] == run.steps:
        return "report"
    if any(run.folder.glob("checkpoints/*.partial")):
        return "save"
    # every line but the evaluated step's own is written before an evaluation, and only then
    return "evaluation" if (step + 1) % EVAL_INTERVAL == 0 else "steps"


def after_kill(run: Run) -> dict[str, Any]:
    """Return the last line and the newest checkpoint after a kill, and what is wrong with them."""
    lines, saved = run.metrics().split(b"\n")[:-1], run.checkpoints()
    steps = [json.loads(line)["step"] for line in lines]
    folders = [p for p in run.folder.glob("checkpoints/*") if p.name.isdigit()]
    wrong = [f"{path.name}: {problem}" for path in folders if (problem := problem_of(path))]
    if steps != list(range(len(steps))):
        wrong.append("metrics.jsonl repeats or misses a step")
    if folders and saved[-1] >= len(steps):
        wrong.append("metrics.jsonl ends before the newest checkpoint")
    found = {"line": len(steps) - 1, "checkpoint": saved[-1] if folders else None, "wrong": wrong}
    return found | {"trend": run.position(saved[-1])["trend"] if folders and not wrong else None}


def differences(whole: Run, killed: Run) -> dict[str, str]:
    """Return what was compared between two finished runs -> how they differ, "" where they agree."""
    runs = (whole, killed)
    newest = [r.folder / "checkpoints" / str(r.checkpoints()[-1]) for r in runs]
    lines = [[json.loads(line) for line in r.metrics().splitlines()] for r in runs]
    timeless = [[line | {"step_seconds": 0} for line in each] for each in lines]
    unlike = [pair for pair in zip(*timeless, strict=False) if pair[0] != pair[1]]
    times = Counter(line["step"] for line in lines[1])
    patterns = ("*.partial", "*.corrupt*", "*.tmp", "*.part")
    left = [path.name for pattern in patterns for path in killed.folder.rglob(pattern)]
    return {
        "state_sha256": _unlike(*(read_manifest(p)["state_sha256"] for p in newest)),
        "position": _unlike(*(r.position(r.checkpoints()[-1]) for r in runs)),
        "operations.jsonl": _unlike(*(r.operations() for r in runs)),
        "metrics.jsonl": _unlike(*unlike[0]) if unlike else "",
        "each step once": _unlike([], [s for s in range(killed.steps + 1) if times[s] != 1]),
        "checkpoints kept": _unlike(*(r.checkpoints() for r in runs)),
        "files of the run": _unlike(*(sorted(p.name for p in r.folder.iterdir()) for r in runs)),
        "leftovers": _unlike([], left),
        "lock": _lock_problem(killed.folder),
    }


def _unlike(expected: Any, got: Any) -> str:
    return "" if expected == got else f"expected {expected!r}, got {got!r}"


def _lock_problem(folder: Path) -> str:
    try:
        with RunLock(folder) as lock:
            return _unlike("", lock.taken_over_from)
    except InputError as error:
        return str(error)


def try_series(name: str, whole: Run, killed: Run, kills: Iterator[dict]) -> dict[str, Any]:
    """Go through a series of kills, then compare; return all that was found."""
    start, found, compared = time.monotonic(), [], {"exit": ""}
    try:
        for kill in kills:
            found.append(kill)
            print(f"{name}, kill {len(found)}: {kill}", file=sys.stderr, flush=True)
        compared |= differences(whole, killed)
    except RuntimeError as error:
        compared["exit"] = str(error)
    compared["after each kill"] = "; ".join(wrong for kill in found for wrong in kill["wrong"])
    result = {"name": name, "seconds": time.monotonic() - start, "kills": found}
    return result | {"differences": compared}


def try_several(folder: Path, whole: Run, arguments: argparse.Namespace, times: dict) -> dict:
    """Kill runs at random moments, `AT_A_TIME` together; return all that was found, as of one series."""
    runs = max(AT_A_TIME, math.ceil(arguments.kills / KILLS_A_RUN))
    counts = [(arguments.kills + number) // runs for number in range(runs)]

    def one(number: int, kills: int) -> dict[str, Any]:
        run = whole._replace(folder=folder / f"random{number}")
        found = killed_at_random(run, kills, arguments.seed + number, times)
        return try_series(f"at random moments, run {number}", whole, run, found)

    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
        series = list(pool.map(one, range(len(counts)), counts))
    names = {name: None for each in series for name in each["differences"]}
    return {
        "name": f"at random moments, in {len(series)} runs",
        "seconds": time.monotonic() - start,
        "kills": [kill for each in series for kill in each["kills"]],
        "differences": {
            name: "; ".join(filter(None, (each["differences"].get(name) for each in series)))
            for name in names
        },
    }


def try_storage(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill a process that only writes; return all that was found, as of one series."""
    import storage_kills

    start, kills = time.monotonic(), []
    for kill in storage_kills.killed(folder / "storage", arguments.kills, arguments.seed):
        kills.append(kill)
        if len(kills) % 50 == 0:
            print(f"{len(kills)} kills", file=sys.stderr, flush=True)
    found = {"name": "of the storage alone", "seconds": time.monotonic() - start, "kills": kills}
    return found | {"differences": storage_kills.differences(kills)}


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for series in report["series"]:
        console.print(f"{len(series['kills'])} kills {series['name']}, {series['seconds']:.0f} s")
        table = Table("killed during", "times")
        for during, times in Counter(kill["during"] for kill in series["kills"]).items():
            table.add_row(during, str(times))
        console.print(table)
        table = Table("compared", "result")
        for name, problem in series["differences"].items():
            table.add_row(name, f"DIFFERS: {escape(problem[:500])}" if problem else "ok")
        console.print(table)
    if corruptions := report.get("corruptions"):
        table = Table("damage", *(outcomes := list(next(iter(corruptions["kinds"].values())))))
        for kind, times in corruptions["kinds"].items():
            table.add_row(kind, *(str(times[outcome]) for outcome in outcomes))
        console.print(table)
        console.print(*map(escape, corruptions["problems"][:5]), sep="\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--steps", type=int, help="of a run; default: 2000, 1200 with --several")
    parser.add_argument(
        "--kills", type=int, help="default: 20; 300 with --several, 500 of the storage"
    )
    parser.add_argument(
        "--named", action="store_true", help="kill at points around the morphs as well"
    )
    parser.add_argument(
        "--plateau", action="store_true", help="the morphs wait for the loss to stand still"
    )
    parser.add_argument(
        "--several", action="store_true", help="a very small model, several operations at one step"
    )
    parser.add_argument(
        "--storage", action="store_true", help="no runs: kill a process that only saves and logs"
    )
    parser.add_argument(
        "--corruptions", type=int, metavar="N", help="no runs: damage a checkpoint N times"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    parser.add_argument("more", nargs="*", metavar="-- FLAGS", help="further flags of the runs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 where nothing differs, else 1."""
    arguments, folder = make_parser().parse_args(argv), Path(tempfile.mkdtemp())
    if arguments.kills is None:
        arguments.kills = 300 if arguments.several else 500 if arguments.storage else 20
    arguments.steps = arguments.steps or (1200 if arguments.several else 2000)
    show(report := examine(folder, arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if not report["same"]:
        print(f"The runs are in {folder}.")
        return 1
    shutil.rmtree(folder)
    return 0


def examine(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything in `folder`; return the report."""
    facts = {
        "benchmark": "reliability",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {n: importlib.metadata.version(n) for n in PACKAGES},
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }
    if arguments.corruptions:
        import corruptions

        found = corruptions.examined(folder / "corruptions", arguments.corruptions, arguments.seed)
        return facts | {"series": [], "corruptions": found, "same": not found["problems"]}
    if arguments.storage:
        facts |= {"series": [try_storage(folder, arguments)]}
    else:
        facts |= examine_runs(folder, arguments)
    return facts | {"same": not any(any(each["differences"].values()) for each in facts["series"])}


def examine_runs(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run and kill whole training runs; return what the report says of them."""
    shutil.copytree(Path(str(jaxmorph.__file__)).parent, folder / "jaxmorph")
    corpus, library = folder / "text.txt", sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text("utf-8", "replace") for path in library)
    corpus.write_text(text[:CORPUS_CHARACTERS], "utf-8")
    rows = rows_of(arguments)
    (folder / "schedule.json").write_text(json.dumps(rows))
    configuration = {**CONFIGURATION, **VERY_SMALL} if arguments.several else CONFIGURATION
    names = (folder / name for name in ("undisturbed", "random", "named"))
    whole, by_time, by_name = (
        Run(name, corpus, arguments.steps, arguments.more, configuration) for name in names
    )
    times, series = undisturbed(whole, rows), []
    if arguments.several:
        series.append(try_several(folder, whole, arguments, times))
    elif arguments.kills > 0:
        kills = killed_at_random(by_time, arguments.kills, arguments.seed, times)
        series.append(try_series("at random moments", whole, by_time, kills))
    if arguments.named and not arguments.several:
        kills = killed_at_points(by_name, whole)
        series.append(try_series("at named points", whole, by_name, kills))
    return {
        "configuration": {**configuration, "max_steps": arguments.steps, "schedule": rows},
        "undisturbed": times,
        "operations": [
            {n: line[n] for n in ("name", "step", "reason")} for line in whole.operations()
        ],
        "series": series,
    }


if __name__ == "__main__":
    sys.exit(main())
