"""The order of examples is grain's, to the index."""

import grain
import numpy as np
import pytest

from jaxmorph.data.shuffle import shuffled

# Around the sizes at which the cipher's block grows, and where grain needs more than 32 bits.
LENGTHS = [1, 2, 3, 8, 142, 1000, 65535, 65536, 65537, 65538, 70001, 2**18, 2**18 + 1, 10**6]
LENGTHS += [2**24 + 1, 2**32 - 1, 2**32 + 5, 2**33, 3 * 10**11]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_order_is_grains(length):
    draw = np.random.default_rng(length)
    draws = 100 if length > 100 else 4  # grain needs milliseconds where few indices are inside
    edges = [epoch * length + place for epoch in (0, 2**20) for place in (0, length - 1)]
    for seed in (5, 2**32 - 1):
        order = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
        indices = np.concatenate([draw.integers(0, 4 * length, draws), edges])
        expected = [order[int(index)] for index in indices]
        np.testing.assert_array_equal(shuffled(indices, length, seed), expected)


@pytest.mark.parametrize("length", [1, 9, 5000, 70001])
def test_an_epoch_holds_every_element_once(length):
    for epoch in (0, 3):
        found = shuffled(np.arange(length) + epoch * length, length, seed=2)
        np.testing.assert_array_equal(np.sort(found), np.arange(length))
