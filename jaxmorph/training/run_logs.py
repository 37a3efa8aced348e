"""The logs a run resumes with: its checkpoints know how many lines there were, and their digest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.json_lines import JsonLines, LogMark, Record, cut_back, salvaged
from jaxmorph.system.files import replace_file
from jaxmorph.training.position import Position

METRICS, OPERATIONS, HEADS = "metrics.jsonl", "operations.jsonl", "heads.jsonl"
# What is known before the first checkpoint.
NO_LINES: dict[str, LogMark] = dict.fromkeys((METRICS, OPERATIONS, HEADS), LogMark.of(()))


class RunLogs:
    """`metrics.jsonl` and `operations.jsonl` of a run, and `heads.jsonl` where its heads change.

    Args:
      run_dir: the run folder.
      heads: whether there is a log of heads.

    Attributes:
      metrics: one line per step.
      operations: one line per operation that fired.
      heads: a line per update of the controller and per evaluation; None: there is no such log.
    """

    def __init__(self, run_dir: Path, *, heads: bool = False):
        self.metrics = JsonLines(run_dir / METRICS)
        self.operations = JsonLines(run_dir / OPERATIONS)
        self.heads = JsonLines(run_dir / HEADS) if heads else None
        self._all = [log for log in (self.metrics, self.operations, self.heads) if log is not None]
        self._cuts: list[Callable[[], object]] = []

    def sync(self) -> dict[str, LogMark]:
        """Wait until the lines are on disk; return by file name what a checkpoint is to know of them."""
        for log in self._all:
            log.sync()
        return {log.path.name: log.mark() for log in self._all}

    def check(self, position: Position, known: Mapping[str, LogMark], *, accept: bool) -> list[str]:
        """Check that the logs still begin as a checkpoint knows them; change nothing yet.

        Args:
          position: the checkpoint's.
          known: what `sync` returned for it; without a log of an older format's checkpoint.
          accept: go on with what is left of a log that does not.

        Returns:
          A sentence for each log that does not.

        Raises:
          InputError: one does not, and `accept` is false; names it and what differs.
        """
        notes, self._cuts = [], []
        numbers = (("step", position.step), ("index", position.next_operation - 1))
        for log, (key, last) in zip(self._all, (*numbers, numbers[0]), strict=False):
            if (mark := known.get(log.path.name)) is None:
                keep = functools.partial(_is_up_to, log.path, key, last)
                self._cuts.append(functools.partial(cut_back, log.path, keep))
            elif log.begins_with(mark):
                self._cuts.append(log.cut)
            else:
                apart = 0 if log is self.heads else 1  # a step may have two lines of heads
                left = functools.partial(_sound_lines, log.path, key, last, apart)
                note = _compared(LogMark.of(left()), mark, position.step)
                if not accept:
                    raise InputError(str(log.path), "", *note)
                notes.append(f"{log.path}: {note[0]}")
                self._cuts.append(functools.partial(_repair, log.path, left))
        return notes

    def cut(self) -> None:
        """Remove what the checked checkpoint does not know, and repair what was accepted."""
        for cut in self._cuts:
            cut()

    def close(self) -> None:
        """Close the files."""
        for log in self._all:
            log.close()


def _is_up_to(path: Path, key: str, last: int, record: Record) -> bool:
    if (number := _number(record, key)) is None:
        raise InputError(str(path), key, record.get(key), "a whole number in every line")
    return number <= last


def _sound_lines(path: Path, key: str, last: int, apart: int) -> Iterator[bytes]:
    """The sound lines of a damaged log: a number up to `last`, `apart` or more after the one before."""
    before = -1

    def follows(record: Record) -> bool:
        nonlocal before
        number = _number(record, key)
        if number is None or not before + apart <= number <= last:
            return False
        before = number
        return True

    return salvaged(path, follows)


def _number(record: Record, key: str) -> int | None:
    number = record.get(key)
    return number if type(number) is int and number >= 0 else None


def _compared(left: LogMark, known: LogMark, step: int) -> tuple[str, str]:
    """Return what there is instead of the lines that a checkpoint knows, and what to do about it."""
    count = f"{left.lines:,} of the {known.lines:,} lines up to step {step:,}"
    if left.lines >= known.lines:
        changed = "others between them" if left == known else "some of them changed"
        count = f"{left.lines:,} lines up to step {step:,}, {changed}"
    return count, (
        f"the {known.lines:,} lines that checkpoint {step} knows, with SHA-256 {known.sha256[:12]}...; "
        "restore them from a backup, or go on with those that are left: --accept_damaged_log"
    )


def _repair(path: Path, left: Callable[[], Iterable[bytes]]) -> None:
    """Keep only what is left of a damaged log, and the file as it was beside it."""
    size = path.stat().st_size if path.exists() else 0
    if size == LogMark.of(left()).size:  # nothing to remove, or repaired before
        return
    replace_file(_free_name(path), path.read_bytes())
    replace_file(path, left())


def _free_name(path: Path) -> Path:
    number, free = 1, path.with_name(f"{path.name}.damaged")
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}.damaged{number + 1}")
    return free
