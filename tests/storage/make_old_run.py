"""Make a small stopped run of the present checkpoint format, to be resumed by all later versions.

    python tests/storage/make_old_run.py

writes `tests/storage/old_runs/format_N`, which `test_old_runs.py` goes on with. Make one whenever a
format is new, and commit it; those of older formats stay as they are. In the folder are the files of
the run, its newest checkpoint, its corpus, and in `later.jsonl` the lines that the same version
writes when it goes on. It has a first operation behind it and a second one before it.
"""

import json
import shutil
import tempfile
from pathlib import Path

from jaxmorph.storage.formats import current_format
from jaxmorph.train import main

OLD_RUNS = Path(__file__).parent / "old_runs"
STOPPED, LAST = 4, 8
SCHEDULE = [
    {"name": "widen_mlp", "value": 2, "max_wait_iters": 3, "reevaluate": True},
    {"name": "change_lr", "value": 2, "max_wait_iters": 3, "reevaluate": True},
]
FLAGS = [
    *("--n_layers", "1", "--d_model", "8", "--n_heads", "2", "--d_ff", "8", "--seq_len", "8"),
    *("--batch_size", "2", "--mesh", "data=1", "--tokenizer", "char", "--progress", "off"),
    *(
        "--eval_interval",
        "2",
        "--eval_iters",
        "1",
        "--log_interval",
        "1",
        "--scheduler",
        "constant",
    ),
    *("--keep_checkpoints", "1"),
]


def flags(folder: Path, steps: int) -> list[str]:
    """Return the flags of the run in a folder that holds its corpus and its schedule."""
    paths = {"data": "text.txt", "scaling_schedule_file": "entries.json", "run_dir": "run"}
    named = [f"--{name}={folder / path}" for name, path in paths.items()]
    return [*FLAGS, *named, f"--max_steps={steps}"]


def make(folder: Path) -> None:
    """Make the run in an empty folder."""
    text = "".join(f"{n} green bottles hanging on the wall. " for n in range(30))
    (folder / "text.txt").write_text(text)
    (folder / "entries.json").write_text(json.dumps(SCHEDULE, indent=1) + "\n")
    assert main(flags(folder, STOPPED)) == 0
    whole = folder / "whole"
    shutil.copytree(folder / "run", whole)
    assert main([*flags(folder, LAST), f"--run_dir={whole}"]) == 0
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "later.jsonl").write_text("".join(lines[STOPPED + 1 :]))
    shutil.rmtree(whole)
    unneeded = [*folder.glob("run/*.png"), folder / "run/report.html", folder / "run/lock"]
    for path in unneeded:
        path.unlink()
    for older in sorted((folder / "run/checkpoints").iterdir())[:-1]:  # steps of one digit
        shutil.rmtree(older)


if __name__ == "__main__":
    made = Path(tempfile.gettempdir()) / "jaxmorph-old-run"  # its path stands in the checkpoint
    made.mkdir()
    try:
        make(made)
        shutil.copytree(made, OLD_RUNS / f"format_{current_format()}")
    finally:
        shutil.rmtree(made)
