"""What closing attention heads costs, and how well it is known beforehand which ones to close.

    python benchmarks/heads.py importance --folder runs/heads --json heads.json

A case is a line of `CASES`. Each trains the model of configs/demo.yaml, once per seed; runs in --folder
are kept, and the same command goes on with those that are there.

Case `importance`: on held-out batches, the importance of every head against its ablation (how much the
loss rises without it), and what closing several heads at once costs if they are chosen by one or
another order. Heads are chosen on half of the batches and judged on the other half.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.stats import rankdata

from jaxmorph import train
from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.resolve import resolve
from jaxmorph.config.settings import Settings
from jaxmorph.config.start import start_shape
from jaxmorph.data.examples import validation_batches
from jaxmorph.data.loading import load_tokens
from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.model.signatures import Signature
from jaxmorph.model.tree_paths import leaves_by_path
from jaxmorph.step.heads import HEAD_AXES, covers
from jaxmorph.step.parts import Parts
from jaxmorph.step.programs import make_programs
from jaxmorph.step.sharding import make_mesh
from jaxmorph.step.state import GATES, Start, TrainState
from jaxmorph.training.head_meter import Head, HeadMeter, head_batch_rows, head_batches
from jaxmorph.training.resume import CheckpointRecord, open_checkpoints, restore_model

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
PACKAGES = ("jaxmorph", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")
HELD_OUT = 16  # batches to choose on, and as many others to judge on
DRAWS = 10  # of an order that is drawn by chance
CLOSED = (6, 10, 14)
_NEXT_TO_NONE = 0.01  # nats


class Table(NamedTuple):
    """A table of a report.

    Args:
      title: a sentence.
      columns: their heads.
      rows: the same number of cells each; numbers are written with four decimals.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class Trained:
    """A trained model with what it is measured on.

    Args:
      state: with its parameters and gates.
      signatures: of its parameters.
      choosing: measures heads on the first half of the held-out batches.
      judging: measures heads on the other half.
      controller: measures heads on the batches of the controller.
    """

    state: TrainState
    signatures: dict[str, Signature]
    choosing: HeadMeter
    judging: HeadMeter
    controller: HeadMeter

    @property
    def gates(self) -> np.ndarray:
        """Return the gates of its heads [layer, head]."""
        return np.asarray(self.state["head_gate"])

    def without(self, heads: Sequence[Head]) -> TrainState:
        """Return its state with these heads closed as well."""
        gates = closed(self.gates, heads)
        return self.state.with_variables(
            head_gate=jax.device_put(gates, self.state["head_gate"].sharding)
        )


def trained(folder: Path, seed: int) -> Trained:
    """Return the demo's model, trained in `folder` unless it is there."""
    run_dir = folder / f"demo_seed{seed}"
    argv = ["--config", str(DEMO), "--seed", str(seed)]
    checkpoints = open_checkpoints(run_dir)
    settings = resolve(argv)[0]
    if (step := checkpoints.latest_sound()) != settings.run.max_steps:
        print(f"{run_dir} ...", file=sys.stderr, flush=True)
        if train.main([*argv, "--run_dir", str(run_dir), "--progress", "off"]) != 0:
            raise RuntimeError(f"{run_dir}: training failed")
        step = checkpoints.latest_sound()
    assert step is not None
    config = CheckpointRecord.from_meta(checkpoints.read_meta(step)).model
    return _with_batches(settings, config, *restore_model(checkpoints, step, config))


def _with_batches(settings: Settings, config: Any, params: Any, gates: Any) -> Trained:
    data, mesh, parts = settings.data, make_mesh(MeshShape()), Parts()
    shape = dataclasses.replace(start_shape(settings, None, None), model=config)
    corpus = load_tokens(
        data.data,
        data.tokenizer,
        seq_len=config.seq_len,
        val_fraction=data.val_fraction,
        bpe_vocab_size=data.bpe_vocab_size,
        cache_dir=data.cache_dir,
    )
    total = settings.run.max_steps or 0
    programs = make_programs(Start(settings, shape, total), mesh, parts)
    state = programs.init()
    variables = {GATES[name]: gate for name, gate in gates.items()}
    state = TrainState(params, state.opt_state, state.variables | variables)
    state = jax.device_put(state, programs.state_shardings)
    held_out = validation_batches(
        corpus.val, seq_len=config.seq_len, batch_size=shape.batch_size, n_batches=2 * HELD_OUT
    )
    fixed = head_batches(
        parts.task,
        corpus.train,
        seq_len=config.seq_len,
        seed=settings.run.seed,
        rows=head_batch_rows(shape, MeshShape()),
        count=settings.heads.controller_batches,
    )
    meters = (
        HeadMeter(mesh, parts.task, lambda: programs, lambda batches=batches: batches)
        for batches in (held_out[::2], held_out[1::2], fixed)
    )
    return Trained(state, gpt_signatures(config), *meters)


def closed(gates: np.ndarray, heads: Sequence[Head]) -> np.ndarray:
    """Return the gates with these heads closed."""
    gates = gates.copy()
    for head in heads:
        gates[head] = 0
    return gates


def ranked(values: np.ndarray) -> list[Head]:
    """Return all heads, those of the smallest values [layer, head] first."""
    order = np.argsort(values, axis=None, kind="stable")
    return [(int(n) // values.shape[1], int(n) % values.shape[1]) for n in order]


def closable(order: Sequence[Head], layers: int, heads: int) -> list[Head]:
    """Return an order without the heads that would leave their layer without any."""
    left, kept = [heads] * layers, []
    for layer, head in order:
        if left[layer] > 1:
            left[layer] -= 1
            kept.append((layer, head))
    return kept


def by_shortlist(model: Trained, meter: HeadMeter, count: int) -> list[Head]:
    """Return the first `count` heads to close as the controller chooses them, measured in rounds.

    In each round the quarter of the open heads with the lowest importance is ablated, and the cheaper
    half of these is closed.
    """
    chosen: list[Head] = []
    while len(chosen) < count:
        state, done = model.without(chosen), len(chosen)
        left = [h for h in ranked(meter.measures(state)["importance"]) if h not in chosen]
        allowed = closable([*chosen, *left], *model.gates.shape)[done:]
        shortlist = allowed[: -(-len(left) // 4)]
        rises = meter.ablation(state, shortlist)
        cheapest = sorted(shortlist, key=lambda head: rises[head])[: -(-len(shortlist) // 2)]
        chosen = closable([*chosen, *cheapest], *model.gates.shape)
    return chosen[:count]


def weight_norms(model: Trained) -> np.ndarray:
    """Return the norm of each head's parameters [layer, head]."""
    leaves, squares = leaves_by_path(model.state.params), np.zeros(model.gates.shape)
    for path, signature in model.signatures.items():
        if covers(signature, HEAD_AXES):
            others = tuple(
                n for n, axis in enumerate(signature.axes) if axis not in HEAD_AXES.split()
            )
            squares += np.square(np.asarray(leaves[path], np.float64)).sum(axis=others)
    return np.sqrt(squares)


def layer_means(values: np.ndarray) -> np.ndarray:
    """Return values [layer, head] with each head's replaced by the mean of its layer."""
    return np.broadcast_to(values.mean(axis=1, keepdims=True), values.shape)


def orders(model: Trained, seed: int) -> Iterator[tuple[str, list[list[Head]]]]:
    """Yield the orders to close heads in, by name; those drawn by chance several times."""
    everything = list(np.ndindex(*model.gates.shape))
    rng = np.random.default_rng(seed)
    for where, meter in (("", model.choosing), (", controller's batches", model.controller)):
        importance = meter.measures(model.state)["importance"]
        yield f"ablation of all, once{where}", [ranked(meter.ablation(model.state, everything))]
        yield f"shortlist and ablation{where}", [by_shortlist(model, meter, max(CLOSED))]
        yield f"importance, once{where}", [ranked(importance)]
        if not where:
            means = layer_means(importance)
            drawn = [means * (1 + 1e-9 * rng.random(means.shape)) for _ in range(DRAWS)]
            yield "layer means of importance", [ranked(values) for values in drawn]
    yield "weight norm", [ranked(weight_norms(model))]
    yield "random", [ranked(rng.random(model.gates.shape)) for _ in range(DRAWS)]


def importance(folder: Path, seeds: Sequence[int]) -> list[Table]:
    """Compare importance with ablation, and the orders to close heads in."""
    agreement, costs = [], []
    for seed in seeds:
        model = trained(folder, seed)
        everything = list(np.ndindex(*model.gates.shape))
        ablation = model.choosing.ablation(model.state, everything)
        for name, meter in (("held-out", model.choosing), ("controller's", model.controller)):
            measured = meter.measures(model.state)["importance"]
            agreement.append((seed, name, *_correlations(measured, ablation)))
        costs += [(seed, *row) for row in _costs(model, seed)]
    layers = tuple(f"layer {n}" for n in range(len(agreement[0]) - 4))
    return [
        Table(
            "Spearman correlation of importance with ablation on the held-out batches",
            ("seed", "batches", "all heads", "layer means", *layers),
            agreement,
        ),
        Table(
            "Rise of the loss, in nats, with so many heads closed (n × that by ablation of all)",
            ("seed", "chosen by", *(f"{n} closed" for n in CLOSED)),
            costs,
        ),
    ]


def _correlations(measured: np.ndarray, ablation: np.ndarray) -> list[float]:
    layers = zip(measured, ablation, strict=True)
    return [
        _spearman(*pair)
        for pair in [(measured, ablation), (layer_means(measured), ablation), *layers]
    ]


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def _costs(model: Trained, seed: int) -> Iterator[tuple[str, ...]]:
    (before,) = model.judging.losses(model.state, [model.gates])
    first: list[float] = []
    for name, several in orders(model, seed):
        kept = [closable(order, *model.gates.shape) for order in several]
        rises = []
        for count in CLOSED:
            gates = [closed(model.gates, order[:count]) for order in kept]
            rises.append(float(np.mean(model.judging.losses(model.state, gates))) - before)
        first = first or rises
        yield name, *map(_cost, rises, first)


def _cost(rise: float, least: float) -> str:
    """Return a rise of the loss, with its ratio to the one by ablation if that is not next to none."""
    return f"{rise:.4f} ({rise / least:.2f} ×)" if least > _NEXT_TO_NONE else f"{rise:.4f}"


CASES: dict[str, Callable[[Path, Sequence[int]], list[Table]]] = {"importance": importance}


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    written = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in line] for line in lines]
    return "\n".join([f"{table.title}:", "", *(f"| {' | '.join(line)} |" for line in written)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a case; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument(
        "--folder", type=Path, help="keep the runs there, and go on with those there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tables = CASES[arguments.case](folder, arguments.seeds)
    print("\n\n".join(map(markdown, tables)))
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    report = {
        "benchmark": f"heads {arguments.case}",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}; {device}",
        "versions": {n: importlib.metadata.version(n) for n in PACKAGES},
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
        "seconds": time.monotonic() - start,
        "tables": [table._asdict() for table in tables],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
