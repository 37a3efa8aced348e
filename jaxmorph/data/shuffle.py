"""The order of examples: grain's pseudorandom permutations, of many indices at once.

`grain.MapDataset.shuffle` permutes one index per call, in microseconds; this is the same function of
whole arrays. A permutation needs no memory: it is a small block cipher on the index.
"""

from __future__ import annotations

import functools
import math

import numpy as np

_SMALLEST_BLOCK = 16  # bits
_ROUNDS = 4
_WORD = 0xFFFFFFFF


def shuffled(indices: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Return where an endless, per-epoch reshuffled pass over `length` elements has each index.

    It equals `grain.MapDataset.range(length).seed(seed).shuffle().repeat()[index] % length`.

    Args:
      indices: [n] int64, ≥ 0; `indices // length` is the epoch.
      length: elements of an epoch, ≥ 1.
      seed: of the order, below 2**32.

    Returns:
      [n] int64, below `length`.
    """
    places = np.empty(len(indices), np.int64)
    epochs, within = np.divmod(indices, length)
    first = _stream_seed(seed)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        places[chosen] = _permuted(within[chosen], length, (first + epoch) & _WORD)
    return places


@functools.cache
def _stream_seed(seed: int) -> int:
    """Return the seed that grain derives for a shuffle right after `.seed(seed)`."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint32)[0])


def _permuted(indices: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Return a permutation of [0, length) at `indices`.

    The cipher permutes a power of two; an index sent outside [0, length) is enciphered again until
    it lies inside (cycle walking).

    References:
      Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """
    if length == 1:
        return np.zeros_like(indices)
    bits = max(math.ceil(math.log2(length - 1)), _SMALLEST_BLOCK)
    bits += bits % 2
    if bits == _SMALLEST_BLOCK:  # few inside: walks are long, so all are taken together
        return _walked_table(length, seed)[indices & 0xFFFF]
    keys = _round_keys(seed)
    places = _enciphered(indices, bits // 2, keys)
    outside = np.flatnonzero(places >= length)
    while len(outside):
        again = _enciphered(places[outside], bits // 2, keys)
        places[outside] = again
        outside = outside[again >= length]
    return places


@functools.lru_cache(maxsize=4)
def _walked_table(length: int, seed: int) -> np.ndarray:
    """Return the permutation of [0, length) at every index of the smallest block."""
    every = np.arange(1 << _SMALLEST_BLOCK)
    once = _enciphered(every, _SMALLEST_BLOCK // 2, _round_keys(seed))
    steps = np.where(every < length, every, once)
    starts = once[:length]
    while (steps[starts] >= length).any():
        steps = steps[steps]  # twice as many steps at once, until all walks have come inside
    return steps[once]


def _enciphered(values: np.ndarray, word: int, keys: tuple[int, ...]) -> np.ndarray:
    """Return `values` [n] int64 under the cipher on blocks of two words of `word` bits.

    References:
      Beaulieu et al., The Simon and Speck Families of Lightweight Block Ciphers, 2013: its round.
    """
    mask = np.uint32((1 << word) - 1)
    left = (values >> word).astype(np.uint32) & mask
    right = values.astype(np.uint32) & mask
    for number, key in enumerate(keys):
        source = left if number % 2 else right
        mixed = _rotated(source, 1, word) & _rotated(source, 8, word) ^ _rotated(source, 2, word)
        mixed = (mixed ^ np.uint32(key)) & mask
        if number % 2:
            right = right ^ mixed
        else:
            left = left ^ mixed
    return left.astype(np.int64) << word | right


def _rotated(words: np.ndarray, by: int, word: int) -> np.ndarray:
    """Return `words` rotated to the left; bits above the word are left for a mask to remove."""
    return words << np.uint32(by) | words >> np.uint32(word - by)


@functools.lru_cache(maxsize=4)
def _round_keys(seed: int) -> tuple[int, ...]:
    """Return the keys of the rounds: the first words of C++'s `std::seed_seq{seed}`."""
    count, near, far = _ROUNDS, 1, 2  # distances that the standard derives from the count
    words, added = [0x8B8B8B8B] * count, [1, 1 + seed, 2, 3]
    for k in range(2 * count):
        here, one, two = k % count, (k + near) % count, (k + far) % count
        before = words[here - 1]
        if k < count:
            mixed = words[here] ^ words[one] ^ before
            first = 1664525 * (mixed ^ mixed >> 27) & _WORD
            second = first + added[k] & _WORD
            words[one], words[two] = words[one] + first & _WORD, words[two] + second & _WORD
        else:
            mixed = words[here] + words[one] + before & _WORD
            first = 1566083941 * (mixed ^ mixed >> 27) & _WORD
            second = first - here & _WORD
            words[one], words[two] = words[one] ^ first, words[two] ^ second
        words[here] = second
    return tuple(words)
