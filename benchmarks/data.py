"""How fast training batches are read: tokens per second, at several context lengths.

    python benchmarks/data.py --json data.json

Three ways, one after the other in every round, so that a busy machine slows all of them:

- "looked up": grain's own shuffle, asked for one example at a time, and one batch at a time prefetched;
- "in memory": jaxmorph's stream, tokens in an array;
- "from a file": jaxmorph's stream, tokens read from a file by position.

The examples of all three are the same, which is checked first. Per second of wall time, and per second
of processor time of all threads, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jaxmorph.data.examples import ExampleStream
from jaxmorph.data.nanogpt import open_bin
from jaxmorph.data.token_files import Tokens

LENGTHS = (64, 256, 1024)


class LookedUp:
    """The batches of `ExampleStream`, each example looked up by itself, as a grain data source."""

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, batch_size: int):
        self._stream = ExampleStream(tokens, seq_len=seq_len, seed=seed)
        self._windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)
        self._seq_len, self._batch_size = seq_len, batch_size
        per_epoch = self._stream.examples_per_epoch
        self._order = grain.MapDataset.range(per_epoch).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> np.ndarray:
        positions = range(index * self._batch_size, (index + 1) * self._batch_size)
        places = np.array([self._order[position] for position in positions])
        epochs, which = np.unique(
            np.array(positions) // self._stream.examples_per_epoch, return_inverse=True
        )
        offsets = np.array([self._stream._offset(int(epoch)) for epoch in epochs])[which]
        return self._windows[offsets + places * self._seq_len].astype(np.int32)


def looked_up(ids: np.ndarray, seq_len: int, batch_size: int) -> Any:
    """Return an iterator over batches of examples that are looked up, prefetched by a thread."""
    source = LookedUp(ids, seq_len, 1, batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def streamed(tokens: Tokens, seq_len: int, batch_size: int) -> Generator[np.ndarray, None, None]:
    """Return the batches of jaxmorph's stream."""
    return ExampleStream(tokens, seq_len=seq_len, seed=1).batches(0, batch_size)


def speed(batches: Any, seq_len: int, batch_size: int, tokens: int) -> dict[str, float]:
    """Return tokens per second of wall and of processor time, after a few batches to begin with."""
    for _ in range(20):
        next(batches)
    count = max(1, tokens // (seq_len * batch_size))
    wall, busy = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    batches.close()
    done = count * batch_size * seq_len
    return {"per_second": done / wall, "per_processor_second": done / busy}


def measure(path: Path, ids: np.ndarray, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the speeds of all rounds, by context length and way."""
    found: dict[str, Any] = {}
    for seq_len in LENGTHS:
        shape = (seq_len, arguments.batch_size)
        ways = {
            "looked up": partial(looked_up, ids, *shape),
            "in memory": partial(streamed, ids, *shape),
            "from a file": partial(streamed, open_bin(path), *shape),
        }
        first = []
        for make in ways.values():
            batches = make()
            first.append([next(batches) for _ in range(50)])
            batches.close()
        for other in first[1:]:
            np.testing.assert_array_equal(other, first[0])
        rounds = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way, make in ways.items():
                share = 8 if way == "looked up" and seq_len < 512 else 1
                rounds[way].append(speed(make(), *shape, arguments.tokens // share))
        found[str(seq_len)] = rounds
    return found


def show(report: dict[str, Any]) -> None:
    """Print the medians as a table in Markdown."""
    print("| T | way | M tokens/s | M tokens/s of processor time |\n|---|---|---|---|")
    for seq_len, rounds in report["rounds"].items():
        for way, speeds in rounds.items():
            medians = [
                statistics.median(one[unit] for one in speeds) / 1e6
                for unit in ("per_second", "per_processor_second")
            ]
            print(f"| {seq_len} | {way} | {medians[0]:.1f} | {medians[1]:.1f} |")


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description="How fast training batches are read.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="per way and round")
    parser.add_argument("--corpus", type=int, default=20_000_000, help="tokens of the corpus")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, 50_257, arguments.corpus).astype("<u2")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ids.bin")
        ids.tofile(path)
        rounds = measure(path, ids, arguments)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "grain")},
        "batch_size": arguments.batch_size,
        "rounds": rounds,
    }
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
