"""Tokenised corpora, the endless stream of training examples, and the validation batches.

An example is a window of seq_len + 1 tokens: the first seq_len are inputs, the last seq_len are
targets. Positions in the stream count examples over all processes, never batches, so that the
batch size can change between any two batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.printing import named, say
from jaxmorph.data.corpora import (
    STDLIB,
    Documents,
    bin_files,
    map_bin,
    read_documents,
    split_documents,
)
from jaxmorph.data.tokenization import CharTokenizer, Tokenizer, load_tokenizer, train_bpe

_FORMAT = "1"  # part of every hash: increment it when reading, splitting or tokenising changes
_CHUNK = 64 << 20  # bytes
_HASHED_WHOLE = 1 << 30  # bytes
_PREFETCHED_BATCHES = 8


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A corpus ready for training.

    Attributes:
      train: [tokens] unsigned ids of the training split (maybe memory-mapped; do not write).
      val: [tokens] of the validation split.
      tokenizer: what the ids mean.
      sha256: digest of the text, of both splits' ids and of the vocabulary size.
      description: one line for people.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    sha256: str
    description: str


def load_tokens(
    data: str,
    tokenizer: str,
    *,
    seq_len: int,
    val_fraction: float,
    bpe_vocab_size: int,
    cache_dir: str | None,
    where: str = "--data",
) -> TokenizedCorpus:
    """Read, split and tokenise a corpus. The user's files are never written.

    With several documents (stdlib, folder, JSONL) whole ones are held out, chosen by a hash of their
    names so that close to `val_fraction` of the bytes is validation; with one text (or .bin without
    its val.bin) the end is. Text is held in memory; a .bin file is memory-mapped.

    Args:
      data: `stdlib`, a text file, a folder of text files, a .jsonl file with a "text" per line, a
        nanoGPT .bin file (uint16 ids), or a folder with train.bin and val.bin.
      tokenizer: a `--tokenizer` value; for .bin files, the one they were made with.
      seq_len: tokens read per example; each split must hold one example.
      val_fraction: in (0, 1).
      bpe_vocab_size: size of the vocabulary that `bpe` learns from the training split.
      cache_dir: where tokenised text is cached; None: the user's cache folder.
      where: what to name in an error about `data`.

    Raises:
      InputError: missing, unreadable, not UTF-8, malformed, empty or too short; a tokenizer that
        is unknown, missing or does not match the data.
    """
    if data != STDLIB and not os.path.exists(data):
        raise InputError(where, "", data, "stdlib, or an existing file or folder")
    try:
        if files := bin_files(Path(data)) if data != STDLIB else []:
            content = "nanogpt"
            train, val, used = _load_bin(files, tokenizer, val_fraction)
        else:
            text = read_documents(data, where)
            content = text.digest()
            train, val, used = _tokenise(
                text, content, tokenizer, val_fraction, bpe_vocab_size, cache_dir
            )
    except OSError as error:
        place = str(error.filename or data)
        raise InputError(where, place, None, f"to be readable ({error.strerror})") from None
    _check_length("training", train, data, seq_len, val_fraction, where)
    _check_length("validation", val, data, seq_len, val_fraction, where)
    parts = (_FORMAT, content, _digest(train), _digest(val), str(used.vocab_size))
    sha256 = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    description = (
        f"{data}: {len(train):,} training and {len(val):,} validation tokens, "
        f"{Path(tokenizer).name} tokenizer of {used.vocab_size:,}"
    )
    return TokenizedCorpus(train, val, used, sha256, description)


def _check_length(
    split: str, tokens: np.ndarray, data: str, seq_len: int, val_fraction: float, where: str
) -> None:
    if len(tokens) <= seq_len:
        expected = (
            f"at least {seq_len + 1} {split} tokens (--seq_len + 1): give more text, lower "
            f"--seq_len or change --val_fraction (now {val_fraction:g})"
        )
        raise InputError(where, data, len(tokens), expected)


def _tokenise(
    text: Documents,
    content: str,
    spec: str,
    val_fraction: float,
    bpe_vocab_size: int,
    cache_dir: str | None,
) -> tuple[np.ndarray, np.ndarray, Tokenizer]:
    """Return both splits' ids and their tokenizer, from the cache if it has them."""
    learnt = {"char": "char", "bpe": f"bpe {bpe_vocab_size}"}
    ready = None if spec in learnt else load_tokenizer(spec)
    kind = learnt[spec] if ready is None else ready.to_json()
    folder = Path(cache_dir or _default_cache())
    key = hashlib.sha256(f"{_FORMAT}\n{content}\n{val_fraction!r}\n{kind}".encode()).hexdigest()
    cached = None if spec == "byte" else _read_cache(folder, key)
    if cached is not None:
        return cached
    split = split_documents(text, val_fraction)
    if spec == "char":
        ready = CharTokenizer.of_documents(text.documents, separate=split.separate)
    elif spec == "bpe":
        ready = train_bpe(split.train, bpe_vocab_size)
    assert ready is not None
    train = ready.encode_documents(split.train, separate=split.separate)
    val = ready.encode_documents(split.val, separate=split.separate)
    if spec != "byte":  # reading the bytes is as fast as reading the cache
        _write_cache(folder, key, train, val, ready)
    return train, val, ready


def _default_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "jaxmorph")


def _cache_files(folder: Path, key: str) -> tuple[Path, Path, Path]:
    return folder / f"{key}.train.npy", folder / f"{key}.val.npy", folder / f"{key}.json"


def _cache_digests(train: np.ndarray, val: np.ndarray, tokenizer: str) -> list[str]:
    return [_digest(train), _digest(val), hashlib.sha256(tokenizer.encode()).hexdigest()]


def _read_cache(folder: Path, key: str) -> tuple[np.ndarray, np.ndarray, Tokenizer] | None:
    """Return the entry if it is intact; otherwise it is rebuilt."""
    *arrays, manifest = _cache_files(folder, key)
    try:
        entry = json.loads(manifest.read_text(encoding="utf-8"))
        train, val = (np.load(a, mmap_mode="r", allow_pickle=False) for a in arrays)
        train, val = np.asarray(train), np.asarray(val)
        if _cache_digests(train, val, entry["tokenizer"]) != entry["digests"]:
            return None
    except Exception:  # damaged files make numpy and json raise anything
        return None
    return train, val, Tokenizer.from_json(entry["tokenizer"], where=str(manifest))


def _write_cache(
    folder: Path, key: str, train: np.ndarray, val: np.ndarray, tokenizer: Tokenizer
) -> None:
    train_file, val_file, manifest = _cache_files(folder, key)
    description = tokenizer.to_json()
    entry = {"digests": _cache_digests(train, val, description), "tokenizer": description}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(train_file, train)
        _replace(val_file, val)
        _replace(manifest, json.dumps(entry).encode())  # last: it validates the other two
    except OSError as error:
        say(
            f"{named(str(folder))}: the tokenised corpus is not cached ({error.strerror})",
            file=sys.stderr,
        )


def _replace(path: Path, content: np.ndarray | bytes) -> None:
    """Write a file atomically."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _load_bin(
    files: Sequence[Path], spec: str, val_fraction: float
) -> tuple[np.ndarray, np.ndarray, Tokenizer]:
    if spec in ("char", "bpe"):
        expected = f"the tokenizer that {files[0].name} was made with: gpt2, byte or a file"
        raise InputError("--tokenizer", "", spec, expected)
    tokenizer = load_tokenizer(spec)
    arrays = [map_bin(file) for file in files]
    for file, array in zip(files, arrays, strict=True):
        highest = max(int(chunk.max()) for chunk in _chunks(array))
        if highest >= tokenizer.vocab_size:
            expected = (
                f"ids below {tokenizer.vocab_size}, the vocabulary of --tokenizer {spec}; name the "
                f"tokenizer the file was made with (nanoGPT's OpenWebText: gpt2)"
            )
            raise InputError(str(file), "", highest, expected)
    if len(arrays) == 2:
        return arrays[0], arrays[1], tokenizer
    cut = int(len(arrays[0]) * (1 - val_fraction))
    return arrays[0][:cut], arrays[0][cut:], tokenizer


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Yield all tokens in order; above 1 GiB only the first and last 64 MiB, to start at once."""
    step = _CHUNK // tokens.itemsize
    if tokens.nbytes > _HASHED_WHOLE:
        yield tokens[:step]
        yield tokens[-step:]
        return
    for start in range(0, len(tokens), step):
        yield tokens[start : start + step]


def _digest(tokens: np.ndarray) -> str:
    found = hashlib.sha256(f"{tokens.dtype.str} {tokens.shape}".encode())
    for chunk in _chunks(tokens):
        found.update(np.ascontiguousarray(chunk).data)
    return found.hexdigest()


class _Batches:
    """Random access to the batches from one position on, as a grain data source."""

    def __init__(self, stream: ExampleStream, position: int, batch_size: int):
        self._stream, self._position, self._batch_size = stream, position, batch_size

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size - self._position

    def __getitem__(self, index: int) -> np.ndarray:
        return self._stream.batch(self._position + index * self._batch_size, self._batch_size)


class ExampleStream:
    """An endless, seeded stream of training examples: the same for any number of processes.

    An epoch is one pass over windows that tile the tokens, reshuffled by grain every epoch. Each
    epoch shifts the tiling by a seeded offset below seq_len, so that window boundaries differ.

    Args:
      tokens: [tokens] integer ids, at least seq_len + 1 of them.
      seq_len: tokens read per example.
      seed: below 2**32.
      process_index: this process, below `process_count`.
      process_count: processes that share each batch.

    Attributes:
      examples_per_epoch: windows in one pass.

    Raises:
      ValueError: fewer than seq_len + 1 tokens.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        seq_len: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        import grain

        if len(tokens) <= seq_len:
            raise ValueError(f"{len(tokens)} tokens hold no window of {seq_len} + 1")
        self.examples_per_epoch = max(1, (len(tokens) - seq_len) // seq_len)
        self._seed, self._seq_len = seed, seq_len
        self._process_index, self._process_count = process_index, process_count
        self._windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)
        self._order = grain.MapDataset.range(self.examples_per_epoch).seed(seed).shuffle().repeat()
        _ = self._order[0]  # grain fills its caches on first use, which is not thread-safe

    def example_ids(self, position: int, count: int) -> np.ndarray:
        """Return epoch and window of the examples from `position` on: [count, 2] int64."""
        indices = range(position, position + count)
        windows = [self._order[index] for index in indices]
        epochs = [index // self.examples_per_epoch for index in indices]
        return np.stack([np.array(epochs, np.int64), np.array(windows, np.int64)], axis=1)

    def batch(self, position: int, batch_size: int) -> np.ndarray:
        """Return this process's rows of the global batch at `position`: [local_B, T+1] int32.

        `batch_size` is that of the global batch and a multiple of the process count.
        """
        local = batch_size // self._process_count
        ids = self.example_ids(position + local * self._process_index, local)
        epochs, place = np.unique(ids[:, 0], return_inverse=True)
        offsets = np.array([self._offset(int(epoch)) for epoch in epochs], np.int64)[place]
        return self._windows[offsets + ids[:, 1] * self._seq_len].astype(np.int32)

    def batches(self, position: int, batch_size: int) -> Generator[np.ndarray, None, None]:
        """Return an endless iterator over this process's part of the batches from `position` on.

        A thread prefetches batches and ends with the iterator: `close()` it or drop it. To change
        the batch size, call again with the position reached.

        Args:
          position: global index of the first example, over all processes.
          batch_size: examples in a global batch.

        Returns:
          Arrays [batch_size / process_count, seq_len + 1], int32.

        Raises:
          InputError: the processes cannot share `batch_size` evenly.
        """
        if batch_size % self._process_count:
            expected = f"a multiple of the {self._process_count} processes"
            raise InputError("--batch_size", "", batch_size, expected)
        return self._prefetch(_Batches(self, position, batch_size))

    def _prefetch(self, batches: _Batches) -> Generator[np.ndarray, None, None]:
        import grain

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def _offset(self, epoch: int) -> int:
        """Return where the epoch's first window starts; there are spare tokens for any offset."""
        spare = self._windows.shape[0] - 1 - (self.examples_per_epoch - 1) * self._seq_len
        drawn = np.random.SeedSequence([self._seed, epoch]).generate_state(1, np.uint64)[0]
        return int(drawn) % min(self._seq_len, spare + 1)


def validation_batches(
    tokens: np.ndarray, *, seq_len: int, batch_size: int, n_batches: int
) -> list[np.ndarray]:
    """Return the validation batches, [B, seq_len + 1] int32, the same ones every time.

    Windows are spread evenly over `tokens`, including the first and last token, and no token is
    predicted twice. If there are too few `tokens`, the list holds as many full batches as fit, or
    a single smaller batch if none does, so its length and B say how much there is.

    Raises:
      ValueError: fewer than seq_len + 1 tokens.
    """
    room = len(tokens) - 1 - seq_len  # where the last window starts
    if room < 0:
        raise ValueError(f"{len(tokens)} tokens hold no window of {seq_len} + 1")
    available = room // seq_len + 1
    batch_size = min(batch_size, available)
    n_batches = min(n_batches, available // batch_size)
    count = batch_size * n_batches
    starts = np.arange(count) * room // max(count - 1, 1)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[starts]
    return list(windows.astype(np.int32).reshape(n_batches, batch_size, seq_len + 1))
