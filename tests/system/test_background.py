"""Work ahead of time: each piece once, whoever asks first, and whatever is forgotten meanwhile."""

import threading

import pytest

from jaxmorph.system.background import Background


def test_each_piece_is_done_once_and_results_are_shared():
    done = []
    background = Background(lambda key: done.append(key) or 2 * key)
    background.want([1, 2])
    assert [background.result(key) for key in (2, 1, 3, 1)] == [4, 2, 6, 2]
    background.close()
    assert sorted(done) == [1, 2, 3]


def test_what_a_piece_raises_is_raised_to_all_who_ask():
    def fail(key):
        raise MemoryError(f"no memory for {key}")

    background = Background(fail)
    background.want([1])
    for key in (1, 1, 2):
        with pytest.raises(MemoryError, match=f"no memory for {key}"):
            background.result(key)
    background.close()


def test_what_was_forgotten_and_asked_for_again_is_done_and_the_thread_lives_on():
    held, done = threading.Event(), []

    def work(key):
        if key == "held":
            held.wait()
        done.append(key)
        return key

    background = Background(work)
    background.want(["held", "a"])
    background.forget(lambda key: key == "a")
    assert background.result("a") == "a"  # here, while the thread is held up
    held.set()
    background.want(["b"])
    assert background.result("b") == "b"
    background.close()
    assert sorted(done) == ["a", "b", "held"]


def test_two_threads_forgetting_and_wanting_do_not_meet():
    background = Background(lambda key: background.forget(lambda other: other == ("not", key)))
    for start in range(0, 3000, 30):
        background.want(range(start, start + 30))
        background.forget(lambda key, start=start: key < start - 60)
    background.wait()
    background.want(["last"])
    assert background._thread is not None
    assert background._thread.is_alive()
    background.close()
