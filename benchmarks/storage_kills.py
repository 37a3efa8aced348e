"""Kill a process that saves, prunes and logs through `jaxmorph.storage`, and look at what it leaves.

A part of `reliability.py` (`--storage`). The process is forked from one that has imported everything
and started nothing, so that a kill costs a fraction of a second. It goes on as a training run does:
it takes the lock, restores the newest checkpoint, compares it with what was saved, removes leftovers,
cuts its log back and writes on. Everything is a function of the step, and so known in advance.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.checkpoint_folder import make_folder
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.storage.json_lines import JsonLines, LogMark
from jaxmorph.storage.manifest import problem_of
from jaxmorph.storage.run_lock import RunLock

SAVE_EVERY, KEEP = 3, 2  # steps, checkpoints
SAVES_A_LIFE = 2  # committed ones, at most
STARTS = 1 / 6  # the part of the processes that are killed before they have begun to write
CHECKS = (
    "every committed checkpoint sound",
    "no acknowledged checkpoint missing",
    "checkpoints kept: the newest two and the best",
    "log: each step once, none missing up to the newest checkpoint",
    "restored arrays and meta: those saved",
    "lock of the killed process taken over",
    "leftovers removed at the next start",
)


def arrays_of(step: int) -> dict[str, np.ndarray]:
    """Return the state saved at a step: a few arrays of a few sizes and dtypes."""
    rng = np.random.default_rng(step)
    wide = {f"layer{n}": rng.normal(size=(64, 8 << n)).astype(np.float32) for n in range(5)}
    return wide | {"step": np.asarray(step, np.int32), "none": np.zeros((0, 3), np.float32)}


def score_of(step: int) -> float:
    """Return the score of a step, which falls and rises, so that the best one changes."""
    return 2 + float(np.sin(step / 7)) - step / 1e4


def line_of(step: int) -> dict[str, Any]:
    """Return the line logged at a step."""
    return {"step": step, "loss": score_of(step)} | (
        {"val": step} if step % SAVE_EVERY == 0 else {}
    )


class Victims:
    """The processes that write to one folder, one after the other.

    Args:
      folder: what a run folder is to a run.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._acknowledged = 0  # the newest step that a process has said to be committed
        self._was_ready = False  # the newest process, before it was killed
        self.startup, self.save = 0.5, 0.2  # seconds, newest measurements

    def live(self, draw: random.Random) -> tuple[float, list[str]]:
        """Let a process live, kill it, and return the seconds and what it has found wrong.

        The moment is uniform over its start, or over a save after none, one or two of this process.
        """
        reading, writing = os.pipe()
        sys.stdout.flush()
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _write_on(self._folder, writing)
        os.close(writing)
        if draw.random() < STARTS:
            said = b""
            time.sleep(draw.uniform(0, self.startup))
        else:
            said = _read_lines(
                reading, 1 + draw.randint(0, SAVES_A_LIFE)
            )  # that it is ready, saves
            time.sleep(draw.uniform(0, self.save))
        os.kill(pid, signal.SIGKILL)
        seconds = time.monotonic() - start
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(reading, "rb") as pipe:
            lines = [line.split(" ", 2) for line in (said + pipe.read()).decode().splitlines()]
        self._measure([(words[0], float(words[1]) - start) for words in lines if len(words) == 2])
        wrong = [" ".join(words[1:]) for words in lines if words[0] == "wrong"]
        return seconds, wrong + (
            [f"ended by itself with {status}"] if status != -signal.SIGKILL else []
        )

    def _measure(self, times: list[tuple[str, float]]) -> None:
        self._was_ready = times[:1] != [] and times[0][0] == "ready"
        if self._was_ready:
            self.startup = times[0][1]
        self._acknowledged = max([self._acknowledged, *(int(step) for step, _ in times[1:])])
        if len(times) > 1:
            self.save = (times[-1][1] - times[0][1]) / (len(times) - 1)

    def found(self) -> dict[str, Any]:
        """Return what lies in the folder after a kill: what it was doing, and what is wrong."""
        folder = self._folder / "checkpoints"
        steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
        newest = steps[-1] if steps else 0
        problems = [f"{step}: {p}" for step in steps if (p := problem_of(folder / str(step)))]
        wrong = {CHECKS[0]: problems}
        if newest < self._acknowledged:
            wrong[CHECKS[1]] = [f"{self._acknowledged} was committed, {newest} is the newest"]
        if not problems and (missing := _kept(newest) - set(steps)):
            wrong[CHECKS[2]] = [f"without {sorted(missing)}: {steps}"]
        wrong[CHECKS[3]] = _wrong_lines(self._folder / "log.jsonl", newest)
        during = _occupation(folder, newest) if self._was_ready else "start, with what it restores"
        return {"during": during, "checkpoint": newest, "wrong": wrong}


def _read_lines(pipe: int, count: int) -> bytes:
    """Read from a pipe until there are so many lines, or its end."""
    said = b""
    while said.count(b"\n") < count and (more := os.read(pipe, 1 << 16)):
        said += more
    return said


def _kept(newest: int) -> set[int]:
    """The steps that must have a checkpoint if `newest` is the newest."""
    saved = range(SAVE_EVERY, newest + 1, SAVE_EVERY)
    best = min(reversed(saved), key=score_of, default=0)
    return {*saved[-KEEP:], *([best] if saved else [])}


def _wrong_lines(path: Path, newest: int) -> list[str]:
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines]
    steps = [record["step"] for record in records]
    if steps != list(range(1, len(steps) + 1)):
        return [f"steps {steps[-5:]}"]
    if len(steps) < newest:
        return [f"ends at {len(steps)}, the newest checkpoint is {newest}"]
    unlike = [r for r in records[:newest] if r != line_of(r["step"])]
    return [f"{unlike[0]}, not {line_of(unlike[0]['step'])}"] if unlike else []


def _occupation(folder: Path, newest: int) -> str:
    partial = list(folder.glob("*.partial"))
    if not partial:
        return "between two saves"
    if int(partial[0].stem) < newest:
        return "removing an old checkpoint"
    if not (partial[0] / "manifest.json").exists():
        return "writing the arrays of a checkpoint"
    return "writing its manifest, or before the commit"


def _write_on(folder: Path, pipe: int) -> NoReturn:
    """What a victim does: go on where the one before was killed, without an end."""

    def say(*words: object) -> None:
        os.write(pipe, f"{' '.join(map(str, words))}\n".encode())

    try:
        lock = RunLock(folder).__enter__()
    except InputError as error:
        say("wrong", 5, error)
        os._exit(1)
    try:
        make_folder(folder / "checkpoints")
        _run(folder, lock, say)
    except BaseException:
        say("wrong", 4, repr(traceback.format_exc()[-500:]))
    os._exit(1)


def _run(folder: Path, lock: RunLock, say: Any) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", KEEP, True, check_lock=lock.check)
    step = checkpoints.latest_sound() or 0
    if step:
        _compare(checkpoints, step, say)
    checkpoints.remove_partial()
    if left := [path.name for path in checkpoints.folder.glob("*.*")]:
        say("wrong", 6, f"left {left}")
    lines = JsonLines(folder / "log.jsonl")
    mark = LogMark(**checkpoints.read_meta(step)["log"]) if step else LogMark.of(())
    if not lines.begins_with(mark):
        say("wrong", 3, f"not the log that checkpoint {step} knows")
        os._exit(1)
    lines.cut()
    say("ready", time.monotonic())
    saved = 0
    while True:
        step += 1
        lines.write({"step": step, "loss": score_of(step)})
        if step % SAVE_EVERY:
            continue
        lines.write((lines.take_back(step) or {}) | {"val": step})  # as after an evaluation
        checkpoints.wait()
        if saved:
            say(saved, time.monotonic())
        lines.sync()
        meta = {"step": step, "log": dataclasses.asdict(lines.mark())}
        checkpoints.save(step, arrays_of(step), meta, score=score_of(step))
        saved = step


def _compare(checkpoints: Checkpoints, step: int, say: Any) -> None:
    import jax

    expected = arrays_of(step)
    shapes = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in expected.items()}
    restored = checkpoints.restore(step, shapes)
    unlike = [path for path, a in expected.items() if not np.array_equal(restored[path], a)]
    if unlike or checkpoints.read_meta(step)["step"] != step:
        say("wrong", 4, f"checkpoint {step}: {unlike or 'meta'}")


def killed(folder: Path, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what was found after each of the kills; see `Victims.live` for their moments.

    Args:
      folder: a new one.
      kills: how many.
      seed: of the moments.
    """
    import orbax.checkpoint  # noqa: F401  what is imported here the victims need not import

    folder.mkdir()
    draw, victims = random.Random(seed), Victims(folder)
    for _ in range(kills):
        seconds, told = victims.live(draw)
        found = victims.found()
        for words in told:
            number, _, problem = words.partition(" ")
            name = CHECKS[int(number)] if number.isdigit() else CHECKS[4]
            found["wrong"].setdefault(name, []).append(problem or words)
        found["wrong"] = {name: problems for name, problems in found["wrong"].items() if problems}
        yield {"seconds": seconds} | found


def differences(kills: list[Mapping[str, Any]]) -> dict[str, str]:
    """Return each check -> what it has found wrong after any of the kills, "" if nothing."""
    return {
        name: "; ".join(problem for kill in kills for problem in kill["wrong"].get(name, ()))
        for name in CHECKS
    }
