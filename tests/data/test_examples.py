import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.data.examples import ExampleStream, validation_batches

T = 7
TOKENS = np.arange(1003, dtype=np.uint16)  # every token is its own position


def stream(tokens: np.ndarray = TOKENS, **changes):
    return ExampleStream(tokens, **({"seq_len": T, "seed": 5} | changes))


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


@pytest.mark.parametrize("length", [T + 1, T + 2, 2 * T, 2 * T + 1, 3 * T, 99, 1003])
def test_an_epoch_predicts_no_token_twice_and_uses_every_window(length):
    examples = stream(TOKENS[:length])
    n = examples.examples_per_epoch
    assert n >= max(1, (length - 1) // T - 1)  # at most one window is given up for the shift
    for epoch in range(4):
        rows = examples.batch(epoch * n, n)
        assert rows.dtype == np.int32
        assert rows.shape == (n, T + 1)
        np.testing.assert_array_equal(rows - rows[:, :1], np.tile(np.arange(T + 1), (n, 1)))
        predicted = np.sort(rows[:, 1:].ravel())
        np.testing.assert_array_equal(predicted, predicted[0] + np.arange(n * T))
        ids = examples.example_ids(epoch * n, n)
        assert set(ids[:, 0]) == {epoch}
        assert sorted(ids[:, 1]) == list(range(n))


def test_epochs_differ_in_order_and_in_cut():
    examples = stream()
    n = examples.examples_per_epoch
    orders = [tuple(examples.example_ids(e * n, n)[:, 1]) for e in range(6)]
    assert len(set(orders)) == 6
    cuts = {int(examples.batch(e * n, n).min()) for e in range(60)}
    assert cuts == set(range(T))


def test_the_seed_decides_everything():
    first, again, other = (take(stream(seed=s).batches(0, 12), 30) for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(processes):
    whole = take(stream().batches(24, 12), 20)
    parts = [
        take(stream(process_index=p, process_count=processes).batches(24, 12), 20)
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([p[step] for p in parts]), batch)


def test_changing_the_batch_size_changes_no_example():
    rows, position = [], 0
    for size, count in ((4, 10), (12, 9), (1, 5), (50, 3), (8, 4)):
        rows += take(stream().batches(position, size), count)
        position += size * count
    np.testing.assert_array_equal(np.concatenate(rows), stream().batch(0, position))
    assert position > stream().examples_per_epoch  # an epoch ends on the way


def test_resuming_gives_the_batches_that_would_have_come():
    examples = stream()
    straight = take(examples.batches(0, 12), 40)
    np.testing.assert_array_equal(take(stream().batches(25 * 12, 12), 15), straight[25:])
    far = 10**12
    np.testing.assert_array_equal(
        take(stream().batches(far, 12), 3), [stream().batch(far + 12 * i, 12) for i in range(3)]
    )


def test_two_iterators_do_not_disturb_each_other():
    examples = stream()
    one, two = examples.batches(0, 12), examples.batches(0, 12)
    for _ in range(20):
        np.testing.assert_array_equal(next(one), next(two))
    one.close()
    two.close()


def grain_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain")]


@pytest.mark.parametrize("end", ["close", "forget"])
def test_threads_end_with_their_iterator(end):
    iterator = stream().batches(0, 12)
    next(iterator)
    assert grain_threads()
    if end == "close":
        iterator.close()
    del iterator
    gc.collect()
    deadline = time.monotonic() + 5
    while grain_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not grain_threads()


def test_an_open_iterator_does_not_hold_up_the_exit():
    code = (
        "import numpy as np; from jaxmorph.data.examples import ExampleStream;"
        "i = ExampleStream(np.arange(10**6), seq_len=64, seed=0).batches(0, 64); next(i)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(InputError, match=r"--batch_size: got 13.*multiple of the 4 processes"):
        stream(process_count=4).batches(0, 13)
    with pytest.raises(ValueError, match="7 tokens"):
        stream(TOKENS[:T])


def test_short_windows_are_read_in_bulk():
    """20 million tokens in a second of processor time; looked up one by one, 3 million."""
    batches = stream(np.arange(10**6) % 256, seq_len=64).batches(0, 16)
    next(batches)
    started = time.process_time()
    for _ in range(4_000_000 // (64 * 16)):
        next(batches)
    used = time.process_time() - started
    batches.close()
    assert used < 4 / 20


# --- validation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "batch_size", "n_batches", "shape"),
    [
        (1003, 4, 5, (5, 4)),
        (141, 4, 5, (5, 4)),  # exactly enough
        (140, 4, 5, (4, 4)),
        (30, 4, 5, (1, 4)),
        (27, 4, 5, (1, 3)),  # not one whole batch
        (T + 1, 4, 5, (1, 1)),
        (1003, 1, 1, (1, 1)),
    ],
)
def test_validation_windows_are_spread_and_do_not_overlap(length, batch_size, n_batches, shape):
    arguments = {"seq_len": T, "batch_size": batch_size, "n_batches": n_batches}
    batches = validation_batches(TOKENS[:length], **arguments)
    assert (len(batches), *batches[0].shape) == (*shape, T + 1)
    rows = np.concatenate(batches)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows - rows[:, :1], np.tile(np.arange(T + 1), (len(rows), 1)))
    gaps = np.diff(rows[:, 0])
    assert (gaps >= T).all()
    assert rows[0, 0] == 0
    if len(rows) > 1:
        assert rows[-1, -1] == length - 1
        assert gaps.max() - gaps.min() <= 1
    np.testing.assert_array_equal(validation_batches(TOKENS[:length], **arguments), batches)


def test_validation_needs_one_window():
    with pytest.raises(ValueError, match="7 tokens"):
        validation_batches(TOKENS[:T], seq_len=T, batch_size=1, n_batches=1)
