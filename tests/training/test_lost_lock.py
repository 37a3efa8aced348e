"""A run whose lock file is removed and whose folder a second process takes: it writes no more."""

import dataclasses
from pathlib import Path

import pytest
from tiny_runs import SMALLEST_GPT, write_text

from jaxmorph.storage.run_lock import RunLock
from jaxmorph.train import main
from jaxmorph.training.turns import TURNS, Turn

TINY = [
    *(*SMALLEST_GPT, "--eval_interval", "4", "--max_steps", "8"),
    *("--checkpoint_interval", "3", "--progress", "off"),
]


@dataclasses.dataclass
class SecondProcess:
    """Removes the lock of a run after a step, takes the folder, and keeps what lies there then."""

    folder: Path
    step: int
    lock: RunLock | None = None
    found: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def take_over(self, run) -> None:
        """Wait for the first process's own writes, then get in."""
        run.log.flush()
        run.setup.logs.sync()
        run.setup.checkpoints.wait()
        (self.folder / "lock").unlink()
        self.lock = RunLock(self.folder).__enter__()
        self.found = contents(self.folder)

    def turn(self) -> Turn:
        """The turn that does it, just before a save."""
        return Turn("take over", due=lambda run: run.step == self.step, act=self.take_over)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("step", "saved"), [(0, None), (5, 3), (8, 6)])
def test_the_first_process_stops_and_writes_nothing_into_the_folder(tmp_path, capsys, step, saved):
    """Before the first step, in the middle, and at the last, where a save and the report are due."""
    run_dir, text = tmp_path / "run", tmp_path / "text.txt"
    write_text(text, bottles=40)
    second = SecondProcess(run_dir, step)
    argv = [*TINY, "--data", str(text), "--run_dir", str(run_dir)]
    assert main(argv, turns=(*TURNS[:-1], second.turn(), TURNS[-1])) == 1
    assert contents(run_dir) == second.found
    assert saved is None or f"checkpoints/{saved}/manifest.json" in second.found
    assert f"checkpoints/{step}/manifest.json" not in second.found
    assert "report.html" not in second.found
    message = capsys.readouterr().err
    assert message.startswith(f"error: {run_dir / 'lock'}, which this process has locked, was repl")
    assert message.count("\n") == 1
    assert second.lock is not None
    second.lock.check()
    second.lock.__exit__(None, None, None)
