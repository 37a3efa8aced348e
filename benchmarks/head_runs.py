"""Whole runs whose heads close and open: what the controller, rates of their own and removal are worth.

    python benchmarks/head_runs.py controller --seeds 0 1 2 --json head_control.json
    python benchmarks/head_runs.py controller --no_growth
    python benchmarks/head_runs.py recovery
    python benchmarks/head_runs.py removal

`controller`: the demo without a controller; with it; and with its rules on other grounds, so that as
many heads close at the same steps: the norm of a head's weights, or the mean importance of its layer.
The final validation losses are compared; `--no_growth` has all of it at the demo's final size.
`recovery`: a quarter of the heads of a small GPT close at step 150 and regrow at 250, at the run's rate
and with boosts of 2, 5 and 10. `removal`: the time of a step before and after half of the demo's heads
leave the arrays.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.model.tree_paths import leaves_by_path
from jaxmorph.step.heads import CLOSED_GATE, HEAD_AXES, covers
from jaxmorph.train import main as train
from jaxmorph.training.control import control
from jaxmorph.training.run import Run
from jaxmorph.training.turns import TURNS, Turn

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
CONTROLLER = {
    "controller_warmup": 100,
    "controller_interval": 20,
    "max_pruned_heads": 0.5,
}
SMALL = [
    *("--n_layers=2", "--d_model=128", "--n_heads=4", "--seq_len=64", "--batch_size=16"),
    *("--max_steps=450", "--eval_interval=25"),
]
Choice = Callable[[Run, dict[str, np.ndarray]], np.ndarray]


def weight_norm(run: Run, measured: dict[str, np.ndarray]) -> np.ndarray:
    """Return the Euclidean norm of each head's weights, [layer, head]."""
    total = np.zeros(measured["importance"].shape)
    leaves = leaves_by_path(run.state.params)
    for path, signature in gpt_signatures(run.stage.shape.model).items():
        if covers(signature, HEAD_AXES):
            others = [n for n, axis in enumerate(signature.axes) if axis not in HEAD_AXES.split()]
            total += np.square(np.asarray(leaves[path])).sum(axis=tuple(others))
    return np.sqrt(total)


def layer_mean(run: Run, measured: dict[str, np.ndarray]) -> np.ndarray:
    """Return the mean importance of each head's layer, [layer, head]."""
    importance = measured["importance"]
    return np.broadcast_to(importance.mean(axis=1, keepdims=True), importance.shape)


CHOICES: dict[str, Choice | None] = {
    "no controller": None,
    "controller": None,
    "weight norm": weight_norm,
    "layer means": layer_mean,
}


class Otherwise:
    """A run whose heads are judged by another choice than the controller's measurements."""

    def __init__(self, run: Run, choice: Choice):
        self.__dict__ |= {"run": run, "choice": choice}

    def __getattr__(self, name: str) -> Any:
        """Return what the run has."""
        return getattr(self.run, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it in the run."""
        setattr(self.run, name, value)

    def head_measures(self) -> dict[str, np.ndarray]:
        """Return the run's measurements, with the choice in place of importance and nothing idle."""
        measured = self.run.head_measures()
        ground = self.choice(self.run, measured)
        zeros = np.zeros_like(ground)  # no head is idle, and no closed one asks to open
        return measured | {"importance": ground, "entropy": zeros, "gate_gradient": zeros}

    def ablation(self, heads: list[tuple[int, int]]) -> np.ndarray:
        """Return the choice in place of the measured rise of the loss, for these heads."""
        measured = self.run.head_measures()
        ground, asked = self.choice(self.run, measured), np.full(measured["entropy"].shape, np.nan)
        for head in heads:
            asked[head] = ground[head]
        return asked


def final_size(folder: Path) -> Path:
    """Write the demo's settings without its growth; return the file."""
    settings = yaml.safe_load(CONFIG.read_text())
    for name in ("scaling_schedule_file", "n_layer_divisor", "n_hidden_divisor"):
        del settings[name]
    file = folder / "final_size.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def _trained(argv: list[str], turns: Sequence[Turn] = TURNS) -> list[dict[str, Any]]:
    """Train; return the lines of the run's metrics.jsonl."""
    if status := train([*argv, "--progress=off"], None, turns):
        raise SystemExit(f"{' '.join(argv)}: status {status}")
    (run_dir,) = (word.partition("=")[2] for word in argv if word.startswith("--run_dir="))
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def _run(name: str, seed: int, folder: Path, config: Path) -> dict[str, Any]:
    """Train one run with one choice of heads; return its final loss and how many are closed."""
    choice, run_dir = CHOICES[name], folder / f"{name} {seed}"
    argv = [f"--config={config}", f"--seed={seed}", f"--run_dir={run_dir}"]
    if name != "no controller":
        argv += [
            "--enable_controller",
            *(f"--{flag}={value}" for flag, value in CONTROLLER.items()),
        ]
    turns = list(TURNS)
    if choice is not None:
        at = [turn.name for turn in turns].index("control")
        turns[at] = dataclasses.replace(
            turns[at], act=lambda run: control(cast(Run, Otherwise(run, choice)))
        )
    lines = _trained(argv, turns)
    loss = [line["val/loss"] for line in lines if "val/loss" in line][-1]
    found = {"choice": name, "seed": seed, "val_loss": loss, "closed": 0, "heads": 0}
    if (log := run_dir / "heads.jsonl").exists():
        gates = np.asarray(json.loads(log.read_text().splitlines()[-1])["heads"]["gates"])
        found |= {"closed": int((gates <= CLOSED_GATE).sum()), "heads": gates.size}
    return found


def controller(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare the controller with other choices and with no controller, in runs of the demo."""
    config = final_size(folder) if arguments.no_growth else CONFIG
    runs = [
        _run(name, seed, folder, config) for seed in arguments.seeds for name in arguments.choices
    ]
    for run in runs:
        part = f"{run['closed']} of {run['heads']} closed" if run["heads"] else ""
        print(f"{run['choice']:14s} seed {run['seed']}: {run['val_loss']:.4f} {part}")
    return {"runs": runs}


def recovery(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Regrow a quarter of the heads in the middle of a run, with and without rates of their own."""
    entries = [
        {
            "name": "prune_heads",
            "value": 0.25,
            "trigger_loss": None,
            "max_wait_iters": 150,
            "reevaluate": False,
            "options": {"by": "random"},
        },
        {
            "name": "regrow_heads",
            "value": 1.0,
            "trigger_loss": None,
            "max_wait_iters": 100,
            "reevaluate": True,
        },
    ]
    schedule = folder / "recovery.json"
    schedule.write_text(json.dumps(entries))
    rows = []
    for seed in arguments.seeds:
        for boost in (None, 2.0, 5.0, 10.0):
            argv = [*SMALL, f"--seed={seed}", f"--scaling_schedule_file={schedule}"]
            argv += [f"--run_dir={folder / f'recovery {seed} {boost}'}"]
            if boost is not None:
                argv += ["--enable_head_lr", f"--head_lr_boost={boost}"]
                argv += ["--head_lr_warmup=20", "--head_lr_cooldown=100"]
            lines = _trained(argv)
            losses = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
            rows.append({"seed": seed, "boost": boost, "losses": losses})
            after = ", ".join(f"{step}: {losses[step]:.4f}" for step in (275, 300, 350, 450))
            print(f"boost {boost or 'off'}, seed {seed}: validation loss at {after}")
    return {"runs": rows}


def removal(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the time of a step before and after half of the heads leave the arrays."""
    heads = [[layer, head] for layer in range(4) for head in range(3)]
    wait = {"trigger_loss": None, "max_wait_iters": 30, "reevaluate": False}
    entries = [
        {"name": "set_gates", "value": 0.0, "options": {"heads": heads}, **wait},
        {"name": "remove_heads", "value": None, **wait},
    ]
    schedule = folder / "removal.json"
    schedule.write_text(json.dumps(entries))
    flags = {"scaling_schedule_file": schedule, "max_steps": 90, "log_interval": 1}
    flags |= {"eval_interval": 90, "run_dir": folder / "removal"}
    argv = [f"--config={final_size(folder)}", *(f"--{name}={v}" for name, v in flags.items())]
    lines = _trained(argv)
    seconds = {line["step"]: line["step_seconds"] for line in lines if "step_seconds" in line}
    found = {
        name: statistics.median(seconds[step] for step in range(first, last))
        for name, first, last in (
            ("all open", 5, 30),
            ("half closed", 32, 60),
            ("half removed", 65, 90),
        )
    }
    for name, median in found.items():
        print(f"{name}: {1e3 * median:.1f} ms a step")
    return found


CASES = {"controller": controller, "recovery": recovery, "removal": removal}


def main() -> None:
    """Run a case, print its figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--no_growth", action="store_true", help="the demo's final size throughout")
    parser.add_argument("--keep", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = CASES[arguments.case](arguments, arguments.keep or Path(name))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
