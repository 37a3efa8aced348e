"""What the tests' whole runs are made of: a text, and the flags of models that step in milliseconds."""

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
