"""Damage a real checkpoint in one place, again and again: is it named and passed over?

A part of `reliability.py` (`--corruptions N`). Each time one of `KINDS` befalls a fresh copy of the
newest of two checkpoints. It is detected if it is named, and the older one is used; harmless if the
newest one is used, and its arrays and its meta are bit for bit those that were saved; else silent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.train import main
from jaxmorph.training.resume import CheckpointRecord, check_unchanged, open_checkpoints

FLAGS = [
    *("--n_layers", "1", "--d_model", "8", "--n_heads", "2", "--seq_len", "8", "--batch_size", "2"),
    *("--mesh", "data=1", "--eval_iters", "1", "--eval_interval", "2", "--max_steps", "4"),
    *("--tokenizer", "char", "--progress", "off"),
]
OLDER, NEWEST = 2, 4
OUTCOMES: tuple[str, ...] = ("detected", "harmless", "silent", "traceback")
OF_OTHER_TYPES = (True, 7, -7.5, "words", [], ["words"], {}, {"words": 7})


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flip_a_bit(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _zero_a_block(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    end = start + draw.randint(1, 512)
    data[start:end] = bytes(len(data[start:end]))
    path.write_bytes(data)


def _repeat_a_block(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    start = draw.randrange(len(data))
    path.write_bytes(data[: start + 16] + data[start:])


def _swap(path: Path, draw: random.Random) -> None:
    other = draw.choice([each for each in _files(_top(path)) if each != path])
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def _replace_by(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def corrupt(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return corrupt


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        yield (*path, name)
        if isinstance(item, dict | list):
            yield from _places(item, (*path, name))


def _of_another_type(value: Any, draw: random.Random) -> Any:
    """The JSON value with one part of another type, where it is not null."""
    whole = json.loads(json.dumps(value))
    while True:
        *path, name = draw.choice(list(_places(whole)))
        parent = whole
        for each in path:
            parent = parent[each]
        old, new = parent[name], draw.choice(OF_OTHER_TYPES)
        numbers = all(type(each) in (int, float) for each in (old, new))
        if old is not None and type(old) is not type(new) and not numbers:
            parent[name] = new
            return whole


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def _change_a_type(path: Path, draw: random.Random) -> None:
    """In one of the JSON files, and nothing else."""
    path = _top(path) / draw.choice(["manifest.json", "meta.json"])
    changed = _of_another_type(json.loads(path.read_bytes()), draw)
    path.write_bytes(
        _canonical(changed) if path.stem == "manifest" else json.dumps(changed, indent=1).encode()
    )


def _change_a_type_soundly(path: Path, draw: random.Random) -> None:
    """With every sum right, as a bug in the writer would."""
    top = _top(path)
    manifest = json.loads((top / "manifest.json").read_bytes())
    del manifest["manifest_sha256"]
    if draw.random() < 0.7:
        meta = _of_another_type(json.loads((top / "meta.json").read_bytes()), draw)
        data = json.dumps(meta, indent=1).encode()
        (top / "meta.json").write_bytes(data)
        sums = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        manifest["files"]["meta.json"] = sums
    else:
        manifest = _of_another_type(manifest, draw)
    manifest["manifest_sha256"] = hashlib.sha256(_canonical(manifest)).hexdigest()
    (top / "manifest.json").write_bytes(_canonical(manifest))


def _top(path: Path) -> Path:
    return next(each for each in path.parents if each.name == str(NEWEST))


KINDS: dict[str, Callable[[Path, random.Random], object]] = {
    "a bit flipped": _flip_a_bit,
    "a file cut short": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    "a file emptied": lambda path, draw: os.truncate(path, 0),
    "a block zeroed": _zero_a_block,
    "a block repeated": _repeat_a_block,
    "a file deleted": lambda path, draw: path.unlink(),
    "two files swapped": _swap,
    "a file become a folder": _replace_by(Path.mkdir),
    "a file become a link to nothing": _replace_by(lambda path: path.symlink_to("nothing")),
    "a file added": lambda path, draw: path.with_name("added").write_bytes(draw.randbytes(9)),
    "a JSON value of another type": _change_a_type,
    "the same, with right sums": _change_a_type_soundly,
}


class Subject:
    """A real checkpoint, and one before it, of a small run.

    Args:
      folder: a new one.
    """

    def __init__(self, folder: Path):
        folder.mkdir()
        (folder / "text.txt").write_text("green bottles hanging on the wall. " * 40)
        self._run = folder / "run"
        flags = [*FLAGS, f"--data={folder / 'text.txt'}", f"--run_dir={self._run}"]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            assert main(flags) == 0
        checkpoints = open_checkpoints(self._run)
        assert checkpoints.latest_sound() == NEWEST
        self._meta = checkpoints.read_meta(NEWEST)
        leaves = json.loads((self._run / f"checkpoints/{NEWEST}/manifest.json").read_bytes())[
            "leaves"
        ]
        self._shapes = {
            p: jax.ShapeDtypeStruct(shape, dtype) for p, (dtype, shape) in leaves.items()
        }
        self._arrays = checkpoints.restore(NEWEST, self._shapes)
        self._copy = folder / "copy"

    def outcome(self, kind: str, draw: random.Random) -> tuple[str, str]:
        """Corrupt a fresh copy; return what became of it, and the words that say so."""
        shutil.rmtree(self._copy, ignore_errors=True)
        for step in (OLDER, NEWEST):
            name = f"checkpoints/{step}"
            shutil.copytree(self._run / name, self._copy / name)
        newest = self._copy / f"checkpoints/{NEWEST}"
        before = {path: path.read_bytes() for path in _files(newest)}
        while {path: path.read_bytes() for path in _files(newest)} == before and newest.is_dir():
            path = draw.choice([each for each in _files(newest) if each.stat().st_size])
            KINDS[kind](path, draw)  # again if it changed nothing, such as zeroes zeroed
            if kind.startswith("a file become"):
                break
        try:
            return self._verdict(open_checkpoints(self._copy))
        except Exception:
            return "traceback", traceback.format_exc()

    def _verdict(self, checkpoints: Checkpoints) -> tuple[str, str]:
        told: dict[int, str] = {}
        used = checkpoints.latest_sound(told.__setitem__)
        if used != NEWEST:
            named = used == OLDER and list(told) == [NEWEST] and "\n" not in told[NEWEST]
            return ("detected" if named else "silent"), str(told)
        arrays, meta = checkpoints.restore(NEWEST, self._shapes), checkpoints.read_meta(NEWEST)
        if meta != self._meta:
            return self._on_resume(meta)
        same = all(np.array_equal(arrays[path], array) for path, array in self._arrays.items())
        return ("harmless" if same else "silent"), "the state is that saved"

    def _on_resume(self, meta: dict[str, Any]) -> tuple[str, str]:
        """What a resumed run says to another meta of the right types: only its settings may be."""
        if meta | {"settings": self._meta["settings"]} != self._meta:
            return "silent", f"{meta}"
        record = CheckpointRecord.from_meta(meta)
        try:
            changes = check_unchanged(
                record, self._meta["settings"], record.corpus_sha256, str(self._copy)
            )
        except InputError as error:
            return "detected", str(error)
        # which folder a run lay in, and whether it had been resumed, are no part of its state
        return ("detected", "; ".join(changes)) if changes else ("harmless", "no part of the state")


def examined(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Return how often each kind of damage was detected, harmless, silent, or ended in a traceback.

    Args:
      folder: a new one.
      count: how many corruptions, of all kinds in turn.
      seed: of what is damaged where.
    """
    subject, draw, kinds = Subject(folder), random.Random(seed), list(KINDS)
    found = {kind: dict.fromkeys(OUTCOMES, 0) for kind in kinds}
    problems = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        outcome, words = subject.outcome(kind, draw)
        found[kind][outcome] += 1
        if outcome in ("silent", "traceback"):
            problems.append(f"{kind}: {outcome}: {words}")
    return {"kinds": found, "problems": problems}
