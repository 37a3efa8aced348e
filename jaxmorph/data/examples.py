"""The endless stream of training examples, and the validation batches.

An example is a window of seq_len + 1 tokens: the first seq_len are inputs, the last seq_len are
targets. Positions in the stream count examples over all processes, never batches, so that the
batch size can change between any two batches.
"""

from __future__ import annotations

import sys
from collections.abc import Generator

import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.data.shuffle import shuffled
from jaxmorph.data.token_files import Tokens, windows

_PREFETCHED_BATCHES = 8
_GROUP = 1 << 18  # tokens: batches are made in groups of about so many, for speed


class _Groups:
    """Random access to groups of successive batches from one position on, as a grain data source."""

    def __init__(self, stream: ExampleStream, position: int, batch_size: int, count: int):
        self._stream, self._position, self._batch_size = stream, position, batch_size
        self._count = count

    def __len__(self) -> int:
        return sys.maxsize // (self._batch_size * self._count) - self._position

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._position + index * self._batch_size * self._count
        return self._stream.batch_group(start, self._batch_size, self._count)


class ExampleStream:
    """An endless, seeded stream of training examples: the same for any number of processes.

    An epoch is one pass over windows that tile the tokens, reshuffled every epoch (see `shuffle`). Each
    epoch shifts the tiling by a seeded offset below seq_len, so that window boundaries differ.

    Args:
      tokens: [tokens] integer ids, at least seq_len + 1 of them, in memory or in a file.
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
        tokens: Tokens,
        *,
        seq_len: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if len(tokens) <= seq_len:
            raise ValueError(f"{len(tokens)} tokens hold no window of {seq_len} + 1")
        self.examples_per_epoch = max(1, (len(tokens) - seq_len) // seq_len)
        self._seed, self._seq_len = seed, seq_len
        self._process_index, self._process_count = process_index, process_count
        self._tokens = tokens

    def example_ids(self, position: int, count: int) -> np.ndarray:
        """Return epoch and window of the examples from `position` on: [count, 2] int64."""
        return self._ids(np.arange(position, position + count))

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        n = self.examples_per_epoch
        return np.stack([positions // n, shuffled(positions, n, self._seed)], axis=1)

    def batch(self, position: int, batch_size: int) -> np.ndarray:
        """Return this process's rows of the global batch at `position`: [local_B, T+1] int32.

        `batch_size` is that of the global batch and a multiple of the process count.
        """
        return self.batch_group(position, batch_size, 1)[0]

    def batch_group(self, position: int, batch_size: int, count: int) -> np.ndarray:
        """Return `count` successive batches, see `batch`: [count, local_B, T+1] int32."""
        local = batch_size // self._process_count
        first = position + local * self._process_index + np.arange(count) * batch_size
        ids = self._ids((first[:, None] + np.arange(local)).ravel())
        epochs, place = np.unique(ids[:, 0], return_inverse=True)
        offsets = np.array([self._offset(int(epoch)) for epoch in epochs], np.int64)[place]
        width = self._seq_len + 1
        rows = windows(self._tokens, offsets + ids[:, 1] * self._seq_len, width)
        return rows.astype(np.int32).reshape(count, local, width)

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
        # No group goes far past an epoch: the order of each epoch has to be set up.
        examples = min(_GROUP // (self._seq_len + 1), self.examples_per_epoch)
        count = max(1, examples // batch_size)
        return self._prefetch(_Groups(self, position, batch_size, count), count)

    def _prefetch(self, groups: _Groups, count: int) -> Generator[np.ndarray, None, None]:
        import grain

        ahead = max(2, _PREFETCHED_BATCHES // count)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
        iterator = iter(grain.MapDataset.source(groups).to_iter_dataset(options))
        try:
            for group in iterator:
                yield from group
        finally:
            iterator.close()

    def _offset(self, epoch: int) -> int:
        """Return where the epoch's first window starts; there are spare tokens for any offset."""
        spare = (
            len(self._tokens) - 1 - self._seq_len - (self.examples_per_epoch - 1) * self._seq_len
        )
        drawn = np.random.SeedSequence([self._seed, epoch]).generate_state(1, np.uint64)[0]
        return int(drawn) % min(self._seq_len, spare + 1)


def validation_batches(
    tokens: Tokens, *, seq_len: int, batch_size: int, n_batches: int
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
    rows = windows(tokens, starts, seq_len + 1)
    return list(rows.astype(np.int32).reshape(n_batches, batch_size, seq_len + 1))
