"""A disk that fails: at every write, fsync and rename of a short run, once or for good."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import SMALLEST_GPT, write_text

from jaxmorph.cli.command_line import run_command
from jaxmorph.config.mesh import parse_mesh
from jaxmorph.config.resolve import resolve
from jaxmorph.growth.plan import make_plan
from jaxmorph.report import page
from jaxmorph.storage.manifest import problem_of
from jaxmorph.system import files
from jaxmorph.training import preparation
from jaxmorph.training.loop import train
from jaxmorph.training.stages import StageCompiler

TINY = [*SMALLEST_GPT, "--eval_interval", "1", "--max_steps", "1"]
FAULTS = ("write", "fsync", "rename", "replace", "ftruncate")
TIMES = ("step_seconds", "seconds", "compile_wait_seconds")


class FailingDisk:
    """The `os` module for `system.files`, whose `number`th call that reaches the disk fails.

    Args:
      number: which call, from 1; 0: none.
      for_good: whether all later ones fail as well, as on a full disk.
    """

    def __init__(self, number: int, for_good: bool):
        self.number, self.for_good = number, for_good
        self.calls: list[str] = []
        self._lock = threading.Lock()  # checkpoints are written in a thread

    @property
    def failed(self) -> str | None:
        """The call that failed first; None if the run did not come that far."""
        return self.calls[self.number - 1] if len(self.calls) >= self.number > 0 else None

    def __getattr__(self, name):
        call = getattr(os, name)
        return call if name not in FAULTS else lambda *args: self._call(name, call, args)

    def _call(self, name, call, args):
        with self._lock:
            self.calls.append(name)
            count = len(self.calls)
        if self.number and (count == self.number or (self.for_good and count > self.number)):
            error = errno.ENOSPC if self.for_good else errno.EIO
            raise OSError(error, os.strerror(error))
        return call(*args)


@pytest.fixture
def folder():
    """A folder in memory where there is one: some 6,000 real calls of fsync would wait for the disk."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="jaxmorph-faults-", dir=place) as name:
        yield Path(name)


@pytest.fixture
def start(folder, monkeypatch):
    """Start the same short run in this process, on its compiled programs; return its exit status."""
    data, schedule = folder / "text.txt", folder / "schedule.json"
    write_text(data, bottles=40)
    fires = {"trigger_loss": None, "max_wait_iters": 1, "reevaluate": True}
    schedule.write_text(json.dumps([{"name": "change_lr", "value": 0.5, **fires}]))
    where = ["--data", str(data), "--scaling_schedule_file", str(schedule), "--run_dir"]
    settings, sources = resolve([*TINY, *where, str(folder / "run")])
    plan = make_plan(settings, parse_mesh("data=1"))
    compilers = []

    def shared(*args):
        if not compilers:
            compiler = StageCompiler(*args)
            init: Any = compiler.uncompiled(0).init
            monkeypatch.setattr(compiler, "initial_state", init.lower().compile())
            monkeypatch.setattr(compiler, "close", lambda: None)
            compilers.append(compiler)
        return compilers[0]

    monkeypatch.setattr(preparation, "StageCompiler", shared)
    # What a figure looks like is not the disk's business, and takes ten times as long to draw.
    monkeypatch.setattr(page, "run_figures", lambda run: {"loss": None, "learning_rate": None})
    monkeypatch.setattr(page, "rendered", lambda figure, kind: b"PNG")

    def start(disk: FailingDisk) -> int:
        monkeypatch.setattr(files, "os", disk)
        return run_command(lambda: train(plan, sources))

    yield start
    for compiler in compilers:
        StageCompiler.close(compiler)


def outcome(run_dir: Path) -> tuple:
    """What a finished run has computed, and what it has left."""
    manifest = json.loads((run_dir / "checkpoints/1/manifest.json").read_text())
    logs = [
        [
            {name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in (run_dir / name).read_text().splitlines()
        ]
        for name in ("metrics.jsonl", "operations.jsonl")
    ]
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}
    left = {name for name in names if not re.match(r"checkpoints/\d+/state", name)}
    return manifest["state_sha256"], logs, left


def assert_says_what_it_has_seen(run_dir: Path, message: str) -> None:
    """One message; the checkpoint it calls good is the newest, and good."""
    assert (message.startswith("error: "), message.count("\n")) == (True, 1), message
    assert re.search(r": (Input/output error|No space left on device)\b", message), message
    assert "intact" not in message
    steps = [f for f in (run_dir / "checkpoints").glob("*") if f.name.isdigit()]
    if said := re.search(r"last good checkpoint is (\S+)", message):
        assert Path(said[1]) == max(steps, key=lambda step: int(step.name))
        assert problem_of(Path(said[1])) is None
    elif "There is no checkpoint yet" in message:
        assert steps == []


def test_a_run_survives_a_fault_at_every_call_that_reaches_the_disk(start, folder, capsys):
    """It fails with one message, and when the disk is well again the same command ends it."""
    run_dir = folder / "run"
    assert start(quiet := FailingDisk(0, False)) == 0
    undisturbed = outcome(run_dir)
    assert {"report.html", "loss.png", "checkpoints/1/manifest.json"} <= undisturbed[2]
    assert len(undisturbed[1][1]) == 1
    assert set(FAULTS) - set(quiet.calls) == {"ftruncate"}  # only of a log that is cut back
    tried, number, for_good = [], 1, False
    while True:
        shutil.rmtree(run_dir)
        capsys.readouterr()
        status = start(disk := FailingDisk(number, for_good))
        if disk.failed is None:
            break
        tried.append((disk.failed, for_good))
        assert status == 1, tried
        assert_says_what_it_has_seen(run_dir, capsys.readouterr().err)
        assert start(FailingDisk(0, False)) == 0, tried
        assert capsys.readouterr().err == "", tried
        assert outcome(run_dir) == undisturbed, tried
        # a disk without space refuses writes for good
        for_good = disk.failed == "write" and not for_good
        number += not for_good
    assert len([call for call in tried if not call[1]]) >= 0.8 * len(quiet.calls)


SMALL_FILES_ONLY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, resource.RLIM_INFINITY))
from jaxmorph.train import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_threads_that_write_the_arrays_fail_in_the_same_one_message(tmp_path):
    """A real process whose files may not be larger than 6 kB: as good as a full disk for arrays."""
    data = tmp_path / "text.txt"
    write_text(data, bottles=40)
    argv = [*TINY, "--d_model", "16", "--data", str(data), "--run_dir", str(tmp_path / "run")]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.run(
        [sys.executable, "-c", SMALL_FILES_ONLY, *argv],
        env=environment,
        capture_output=True,
        text=True,
    )
    folder = tmp_path / "run" / "checkpoints"
    said = f"error: checkpoint 0 could not be written to {folder}: File too large. "
    assert process.stderr == f"{said}There is no checkpoint yet\n"
    assert process.returncode == 1
    assert list(folder.iterdir()) == []
