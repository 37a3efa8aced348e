"""Which checkpoints stay, whatever their scores."""

import itertools

import pytest

from jaxmorph.storage.retention import best, kept, last_good, prune, set_aside

# scores by step, how many of the newest, whether the best too; what stays
CASES = {
    "the newest two and the first": ({0: 9, 1: 8, 2: 7, 3: 6}, 2, False, {0, 2, 3}),
    "the best": ({0: 9, 1: 1, 2: 7, 3: 6}, 1, True, {0, 1, 3}),
    "the newest of two that are best": ({0: 9, 1: 1, 2: 1, 3: 6, 4: 6}, 1, True, {0, 2, 4}),
    "the last good one below worse ones": (
        {0: 9, 1: 8, 2: 7, 3: None, 4: None, 5: None}, 2, False, {0, 2, 4, 5},
    ),
    "the last good one and the best": ({0: 9, 1: 1, 2: 7, 3: None, 4: None}, 1, True, {0, 1, 2, 4}),
    "none is good": ({0: None, 1: None, 2: None}, 1, True, {0, 2}),
    "none at all": ({}, 1, True, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept(name):
    scores, keep, keep_best, expected = CASES[name]
    assert kept(scores, keep, keep_best) == expected


def test_a_good_checkpoint_stays_until_there_is_a_newer_one():
    """Saved and pruned one by one, as a run does it: every history of seven saves."""
    for history in itertools.product([None, 1.0, 2.0], repeat=7):
        stays: dict[int, float | None] = {}
        for step, score in enumerate(history):
            stays[step] = score
            stays = {each: stays[each] for each in kept(stays, 1, False)}
            good = [each for each in range(step + 1) if history[each] is not None]
            assert last_good(stays) == (good[-1] if good else None)
        assert len(stays) <= 3


def test_those_set_aside_stay_until_a_good_one_takes_their_place(tmp_path):
    for name in ("0", "4", "6", "7", "6.diverged", "notes.diverged"):
        (tmp_path / name).mkdir()
    (tmp_path / "6.diverged" / "old").mkdir()
    assert set_aside(tmp_path, [6, 7]) == 2
    assert not (tmp_path / "6.diverged" / "old").exists()
    assert prune(tmp_path, {0: 3.0, 4: 2.0}, 1, True) == set()
    (tmp_path / "6").mkdir()
    assert prune(tmp_path, {0: 3.0, 4: 2.0, 6: None}, 1, True) == set()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"0", "4", "6", "6.diverged", "7.diverged", "notes.diverged"}
    assert prune(tmp_path, {0: 3.0, 4: 2.0, 6: 2.5}, 1, False) == {4}
    assert {path.name for path in tmp_path.iterdir()} == {"0", "6", "7.diverged", "notes.diverged"}


def test_best_is_the_newest_of_the_lowest():
    assert best({0: 2.0, 3: 1.0, 5: 1.0, 6: None}) == 5
    assert best({0: None}) is None
