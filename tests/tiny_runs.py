"""What the tests' whole runs are made of: a text, and the flags of models that step in milliseconds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

TINY_GPT = [
    *("--n_layers", "1", "--d_model", "16", "--n_heads", "2", "--seq_len", "16"),
    *("--batch_size", "4", "--mesh", "data=1", "--log_interval", "1"),
]
SMALLEST_GPT = [
    *("--n_layers", "1", "--d_model", "8", "--n_heads", "1", "--seq_len", "8", "--batch_size", "2"),
    *("--mesh", "data=1", "--eval_iters", "1", "--log_interval", "1"),
]


def write_text(path: Path, bottles: int = 400) -> str:
    """Write a text of so many sentences; return its path as a flag has it."""
    path.write_text("".join(f"{n} green bottles hanging on the wall. " for n in range(bottles)))
    return str(path)


def train_until_killed(argv: list[str], point: str) -> None:
    """Train in a process of its own, which SIGKILL ends at a crash point."""
    process = subprocess.run(
        [sys.executable, "-m", "jaxmorph.train", *argv],
        env=os.environ | {"JAXMORPH_CRASH_AT": point},
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
