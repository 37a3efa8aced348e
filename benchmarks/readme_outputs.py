"""Record the outputs that README shows: run the demo, stop it under way, go on, keep what it said.

    python benchmarks/readme_outputs.py

About two minutes on two CPU cores, if nothing else runs there. It writes docs/examples/demo/: what
both starts printed, and the lines of the run folder's files that its tables are made of; then it
puts them into README. tests/test_docs.py compares README with them, and them with what the programs
print today.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples" / "demo"
COMMAND = ["python", "-m", "jaxmorph.train", "--config", "configs/demo.yaml"]
STOP_AFTER = "step 150:"  # the evaluation after which the first start is interrupted


def main() -> None:
    """Run the demo in an empty folder and record it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(ROOT / "configs", folder / "configs")
        shutil.rmtree(EXAMPLES, ignore_errors=True)
        EXAMPLES.mkdir(parents=True)
        for file, stop in (("stopped.txt", STOP_AFTER), ("resumed.txt", None)):
            said = start(folder, stop).replace(f"{folder}/", "")
            (EXAMPLES / file).write_text(said)
            print(said, end="")
        run_dir = folder / "runs" / "demo"
        for file in ("operations.jsonl", "metric_table.json"):
            shutil.copy(run_dir / file, EXAMPLES / file)
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        evaluated = [line for line in lines if '"val/loss"' in line]
        (EXAMPLES / "metrics.jsonl").write_text("".join(evaluated))
    readme = ROOT / "README.md"
    readme.write_text(refreshed(readme.read_text()))


def start(folder: Path, stop: str | None) -> str:
    """Start the demo in a folder and return what it printed.

    Args:
      folder: the current folder of the command.
      stop: press Ctrl-C once a line begins like this; None: let it end.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        COMMAND,
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if stop is not None and line.startswith(stop):
            process.send_signal(signal.SIGINT)
    wanted = 0 if stop is None else 128 + signal.SIGINT
    if process.wait() != wanted:
        sys.exit(f"the demo ended with status {process.returncode}:\n{''.join(said)}")
    return "".join(said)


def refreshed(readme: str) -> str:
    """Return README with the recorded lines in place of those of an earlier demo.

    Which steps it shows stays: if the operations fire at others, its blocks are to be written anew.
    """
    files = ("stopped.txt", "resumed.txt", "metrics.jsonl")
    recorded = "".join((EXAMPLES / file).read_text() for file in files)
    shown = (
        r'^{"step": 100, .*$',
        r"^step (?:0|100|250|500): validation loss \d.*$",
        r"^=== Operation 2 of 3 [^\n]*\n  (?s:.*?) after it .*$",
        r"^Stopped by [^\n]*\n.*$",
        r"^Resuming at step .*$",
    )
    for pattern in shown:
        new = iter(re.findall(pattern, recorded, re.MULTILINE))
        readme = re.sub(pattern, lambda old: next(new, old[0]), readme, flags=re.MULTILINE)  # noqa: B023
    return readme


if __name__ == "__main__":
    main()
