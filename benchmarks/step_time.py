"""Tokens per second of a training step, against a PyTorch GPT of the same shape.

    python benchmarks/step_time.py --json step_time.json

Every contender (jaxmorph; PyTorch eager and compiled; float32 and bfloat16) lives in a process of its
own that steps only when it is its turn, so that thread pools do not fight and a drift in the machine's
speed hits all alike. Ratios are medians of per-round ratios; where rounds differ much the machine was
not idle and the report says so: such ratios mean nothing. Runs on the GPU where there is one.

A step is forward, backward and an AdamW update over float32 parameters; bfloat16 means autocast in
PyTorch and `--dtype bfloat16` in jaxmorph, which also clips the gradient and checks that it is finite.
On a GPU "float32" products run in TF32 in both. PyTorch's AdamW is fused where that is the faster.
A contender that cannot run is listed with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from torch_gpt import WARMUP_STEPS, Shape, Step, timed, torch_step

from jaxmorph.cli.errors import InputError

CONTENDERS = {  # name -> (library, mode, dtype)
    "jaxmorph-f32": ("jaxmorph", "", "float32"),
    "torch-eager-f32": ("torch", "eager", "float32"),
    "torch-compile-f32": ("torch", "compile", "float32"),
    "jaxmorph-bf16": ("jaxmorph", "", "bfloat16"),
    "torch-eager-bf16": ("torch", "eager", "bfloat16"),
    "torch-compile-bf16": ("torch", "compile", "bfloat16"),
}
PRECISIONS = ("f32", "bf16")
TOTAL_STEPS = 100_000  # of the run that the steps are taken to be of: the rate hardly falls
START_SECONDS = 900  # compiling a large model for a GPU takes minutes
NOISY_SPREAD = (
    1.3  # slowest over fastest round of a contender, above which the machine was not idle
)
PAUSE_SECONDS = 0.3  # between turns: thread pools spin for a while after their last work


def jaxmorph_step(shape: Shape, dtype: str) -> tuple[Step, dict[str, Any]]:
    """Return jaxmorph's own training step, and facts about it."""
    from jaxmorph.system.host_memory import keep_freed_memory

    keep_freed_memory()  # as training does, and before JAX starts threads
    import jax
    import numpy as np

    from jaxmorph.config.mesh import MeshShape
    from jaxmorph.config.resolve import resolve
    from jaxmorph.config.start import start_shape
    from jaxmorph.step.parts import Parts
    from jaxmorph.step.programs import make_programs
    from jaxmorph.step.sharding import make_mesh, place_batch
    from jaxmorph.step.state import Start

    fields = ("n_layers", "d_model", "n_heads", "seq_len", "batch_size")
    flags = [text for name in fields for text in (f"--{name}", str(getattr(shape, name)))]
    settings, _ = resolve([*flags, "--dtype", dtype, "--warmup_steps", "0"])
    start = Start(settings, start_shape(settings, shape.vocab_size, TOTAL_STEPS), TOTAL_STEPS)
    mesh = make_mesh(MeshShape())
    programs = make_programs(start, mesh, Parts())
    tokens = np.random.default_rng(0).integers(
        0, shape.vocab_size, (shape.batch_size, shape.seq_len + 1), dtype=np.int32
    )
    batch, index = place_batch(mesh, tokens), np.int32(0)
    state, sums = programs.init(), programs.zero_sums()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def step() -> float:
        nonlocal state, sums
        sums = programs.accumulate(state, sums, batch, index)
        state, sums, metrics = programs.update(state, sums)
        return float(metrics["train/loss"])

    device = mesh.devices.flat[0].device_kind
    return step, {"version": f"jax {jax.__version__}", "device": device, "parameters": parameters}


def serve(name: str, shape: Shape) -> None:
    """Be a contender: answer each line "run N" with the milliseconds of N steps, as JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    library, mode, dtype = CONTENDERS[name]
    try:
        if library == "jaxmorph":
            step, facts = jaxmorph_step(shape, dtype)
        else:
            step, facts = torch_step(shape, mode, dtype)
        for _ in range(WARMUP_STEPS):
            facts["loss"] = step()
    except Exception as error:  # whatever hinders a contender is a line in the table
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        answer({"unavailable": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]})
        return
    answer(facts)
    for line in sys.stdin:
        step()  # the first after a wait finds cold caches and sleeping threads
        answer([1e3 * timed(step) for _ in range(int(line))])


class Contender:
    """A contender's process, started and warmed up."""

    def __init__(self, name: str, arguments: Sequence[str]):
        self.name = name
        self.rounds: list[list[float]] = []
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        self.facts = self._read()

    @property
    def available(self) -> bool:
        """Whether the contender runs."""
        return "unavailable" not in self.facts

    def turn(self, steps: int) -> None:
        """Let it do its steps of one round."""
        assert self.process.stdin is not None
        answer: Any = None
        try:
            print(steps, file=self.process.stdin, flush=True)
            answer = self._read()
        except BrokenPipeError:
            answer = self._died()
        if isinstance(answer, dict):
            self.facts |= answer
        else:
            self.rounds.append(answer)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    def _read(self) -> Any:
        """Return its next answer; where it hangs or dies, that it is unavailable and why."""
        assert self.process.stdout is not None
        with Watchdog(self.process, START_SECONDS) as watchdog:
            line = self.process.stdout.readline()
        if watchdog.bit:
            return {"unavailable": f"no answer in {START_SECONDS} s"}
        return json.loads(line) if line else self._died()

    def _died(self) -> dict[str, str]:
        self.log.seek(0)
        last = [line for line in self.log.read().splitlines() if line.strip()][-1:]
        code = self.process.wait()
        return {"unavailable": f"exited with status {code}: {' '.join(last)}"[:300]}


class Watchdog:
    """Kills a process that is still being waited for after some seconds."""

    def __init__(self, process: subprocess.Popen, seconds: float):
        self.bit, self._process = False, process
        self._timer = threading.Timer(seconds, self._bite)

    def _bite(self) -> None:
        self.bit = True
        self._process.kill()

    def __enter__(self) -> Watchdog:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def race(
    names: Sequence[str], arguments: Sequence[str], rounds: int, steps: int
) -> list[Contender]:
    """Run every contender in turn, `rounds` times `steps` steps, and return them."""
    contenders = []
    try:
        for name in names:
            print(f"starting {name} ...", file=sys.stderr, flush=True)
            contenders.append(Contender(name, arguments))
        for number in range(rounds):
            # Every other round backwards, so that none always follows the same one.
            for contender in contenders[:: 1 if number % 2 == 0 else -1]:
                if contender.available:
                    time.sleep(PAUSE_SECONDS)
                    contender.turn(steps)
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        for contender in contenders:
            contender.close()
    return contenders


def summarize(contenders: Sequence[Contender], shape: Shape) -> dict[str, Any]:
    """Return medians of each contender, and the ratios of speed to the best PyTorch one.

    A ratio above 1 says that jaxmorph is the faster.
    """
    results: dict[str, Any] = {}
    for contender in contenders:
        result = dict(contender.facts)
        if contender.available:
            median = statistics.median(ms for turn in contender.rounds for ms in turn)
            result |= {
                "median_ms": median,
                "min_ms": min(ms for turn in contender.rounds for ms in turn),
                "tokens_per_second": 1e3 * shape.tokens / median,
                "rounds_ms": contender.rounds,
            }
        results[contender.name] = result
    medians = [[statistics.median(turn) for turn in contender.rounds] for contender in contenders]
    spread = max((max(of_rounds) / min(of_rounds) for of_rounds in medians if of_rounds), default=1)
    return {
        "contenders": results,
        "ratios": ratios(results),
        "spread": spread,
        "idle_machine": spread <= NOISY_SPREAD,
    }


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """Return jaxmorph's speed over that of the best PyTorch contender, for each precision."""
    out = {}
    for precision in PRECISIONS:
        ran = {
            name: result["rounds_ms"]
            for name, result in results.items()
            if name.endswith(f"-{precision}") and "rounds_ms" in result
        }
        ours = ran.pop(f"jaxmorph-{precision}", None)
        if ours is None or not ran:
            continue
        best = min(ran, key=lambda name: results[name]["median_ms"])
        pairs = zip(ran[best], ours, strict=True)
        by_round = [statistics.median(theirs) / statistics.median(mine) for theirs, mine in pairs]
        out[precision] = {"ratio": statistics.median(by_round), "against": best, "rounds": by_round}
    return out


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.table import Table

    shape = ", ".join(f"{name} {size}" for name, size in report["shape"].items())
    table = Table(title=f"training step, {shape}")
    for column in ("contender", "ms (median)", "ms (min)", "tokens/s", "remarks"):
        table.add_column(column, justify="left" if column in ("contender", "remarks") else "right")
    for name, result in report["contenders"].items():
        if "unavailable" in result:
            table.add_row(name, "-", "-", "-", f"unavailable: {result['unavailable']}")
            continue
        remarks = [result["version"], result["device"]]
        remarks += [f"{result['adamw']} AdamW"] if "adamw" in result else []
        numbers = (f"{result[key]:,.0f}" for key in ("median_ms", "min_ms", "tokens_per_second"))
        table.add_row(name, *numbers, ", ".join(remarks))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for precision, ratio in report["ratios"].items():
        console.print(
            f"jaxmorph {precision}: {ratio['ratio']:.2f} x the speed of {ratio['against']} "
            f"(rounds {min(ratio['rounds']):.2f} to {max(ratio['rounds']):.2f})"
        )
    if not report["idle_machine"]:
        console.print(
            f"WARNING: a contender's rounds differ by {report['spread']:.1f} times, so the machine was "
            "not idle: do not rely on these ratios."
        )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for field, default in zip(dataclasses.fields(Shape), (6, 384, 6, 256, 12, 65), strict=True):
        parser.add_argument(f"--{field.name}", type=positive, default=default, metavar="N")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N")
    parser.add_argument("--steps_per_round", type=positive, default=3, metavar="N")
    parser.add_argument(
        "--contenders",
        type=contender_names,
        default=list(CONTENDERS),
        metavar="NAME,...",
        help=f"some of {','.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected an integer ≥ 1")
    return value


def contender_names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(
            f"got {unknown[0]!r}, expected some of {', '.join(CONTENDERS)}"
        )
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or one of its contenders; return the exit status."""
    arguments = make_parser().parse_args(argv)
    shape = Shape(*(getattr(arguments, field.name) for field in dataclasses.fields(Shape)))
    if arguments.worker:
        serve(arguments.worker, shape)
        return 0
    if shape.d_model % shape.n_heads:
        error = InputError("--n_heads", "", shape.n_heads, f"a divisor of d_model {shape.d_model}")
        print(f"error: {error}", file=sys.stderr)
        return 2
    flags = [f"--{name}={value}" for name, value in dataclasses.asdict(shape).items()]
    contenders = race(arguments.contenders, flags, arguments.rounds, arguments.steps_per_round)
    report = {
        "shape": dataclasses.asdict(shape),
        "rounds": arguments.rounds,
        "steps_per_round": arguments.steps_per_round,
        "machine": {"platform": platform.platform(), "cpus": len(os.sched_getaffinity(0))},
        **summarize(contenders, shape),
    }
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if any(contender.available for contender in contenders) else 1


if __name__ == "__main__":
    sys.exit(main())
