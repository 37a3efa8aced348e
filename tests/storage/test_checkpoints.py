"""Checkpoints: exact round trips, damage found, what is kept and what is refused."""

import json
import logging
import math
import os
import resource
import shutil
import signal
import threading
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from other_formats import all_bytes

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.checkpoint_folder import make_folder
from jaxmorph.storage.checkpoints import (
    CheckpointError,
    Checkpoints,
    CorruptCheckpointsError,
    state_sha256,
)
from jaxmorph.storage.run_lock import RunLock, RunLockLostError

META = {"config": {"n_layers": 2, "eps": 1e-8}, "examples": 2**40, "loss": None}


def arrays_of(step, rows=4):
    """A small state with every dtype and shape a real one has; different at each step."""
    rng = np.random.default_rng(step)
    return {
        "step": np.asarray(step, np.int32),
        "params/blocks/query": rng.normal(size=(2, rows, 8)).astype(np.float32),
        "params/embed": jnp.asarray(rng.normal(size=(rows, 8)), jnp.bfloat16),
        "opt_state/0/mu/embed": jnp.asarray(rng.normal(size=(rows, 8)), jnp.float32),
        "opt_state/0/nu/frozen": jnp.zeros((0, 8), jnp.float32),
        "opt_state/0/count": jnp.asarray(step, jnp.int32),
        "gates": np.asarray([True, False]),
        "rng": np.asarray([0, step], np.uint32),
    }


def abstract_of(arrays, sharding=None):
    return {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        for path, array in arrays.items()
    }


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", keep=2, keep_best=False)
    yield made
    made.close()


def reopened(checkpoints, **changes):
    """Another process's view of the same folder."""
    return Checkpoints(checkpoints.folder, **{"keep": 2, "keep_best": False} | changes)


def names(checkpoints):
    return sorted(os.listdir(checkpoints.folder))


def assert_restores(checkpoints, step):
    arrays = arrays_of(step)
    restored = checkpoints.restore(step, abstract_of(arrays))
    chex.assert_trees_all_equal(restored, arrays)
    chex.assert_trees_all_equal_dtypes(restored, arrays)


def test_round_trip_is_exact_quiet_and_asynchronous(checkpoints, capfd, caplog):
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        checkpoints.save(7, arrays_of(7), META, score=1.5)
        checkpoints.wait()
        assert checkpoints.latest_sound() == checkpoints.newest() == 7
        assert checkpoints.read_meta(7) == META
        assert_restores(checkpoints, 7)
        reader = reopened(checkpoints)
        assert reader.latest_sound() == 7
        assert_restores(reader, 7)
        reader.close()
    assert [str(each.message) for each in warned] == []
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name == "absl"] == []


def test_empty_folder_has_no_checkpoint(checkpoints):
    assert checkpoints.latest_sound() is None
    checkpoints.folder.mkdir()
    (checkpoints.folder / "12.partial").mkdir()
    (checkpoints.folder / "notes").mkdir()
    assert checkpoints.latest_sound() is None
    checkpoints.remove_partial()
    assert names(checkpoints) == ["notes"]


def test_donated_and_changed_buffers_do_not_reach_the_checkpoint(checkpoints, monkeypatch):
    """The save is held back until the caller has overwritten everything it passed."""
    begin, held = checkpoints._begin, threading.Event()

    def begin_late(*arguments):
        assert held.wait(20)
        return begin(*arguments)

    monkeypatch.setattr(checkpoints, "_begin", begin_late)
    overwrite = jax.jit(lambda x: x * jnp.zeros((), x.dtype), donate_argnums=0)
    device, host = jnp.arange(10_000, dtype=jnp.float32), np.arange(5)
    meta = {"list": [1]}
    address = device.unsafe_buffer_pointer()
    checkpoints.save(1, {"device": device, "host": host}, meta, score=None)
    replaced = overwrite(device).block_until_ready()
    assert device.is_deleted()
    assert replaced.unsafe_buffer_pointer() == address  # the very memory was written over
    host[:] = 0
    meta["list"].clear()
    held.set()
    checkpoints.wait()
    expected = {"device": np.arange(10_000, dtype=np.float32), "host": np.arange(5)}
    written = json.loads((checkpoints.folder / "1" / "manifest.json").read_text())
    assert written["state_sha256"] == state_sha256(expected)
    with jax.enable_x64(True):
        chex.assert_trees_all_equal(checkpoints.restore(1, abstract_of(expected)), expected)
    assert checkpoints.read_meta(1) == {"list": [1]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": np.zeros((), np.int64)}, r"step: got 'int32 \(\)', expected int64 \(\)"),
        ({"params/embed": np.zeros((4, 8), np.float32)}, "got 'bfloat16.*expected float32"),
        ({"params/embed": jnp.zeros((8, 4), jnp.bfloat16)}, r"\(4, 8\)', expected .*\(8, 4\)"),
        ({"opt_state/0/nu/frozen": np.zeros((0, 4), np.float32)}, r"\(0, 8\)', .*\(0, 4\)"),
        ({"params/new": np.zeros(2, np.float32)}, "params/new: got 'no such array'"),
        ({"gates": None}, "gates: got 'bool.*expected no such array"),
    ],
)
def test_other_names_shapes_or_dtypes_are_refused(checkpoints, change, said):
    checkpoints.save(1, arrays_of(1), META, score=None, wait=True)
    wanted = arrays_of(1) | change
    wanted = {path: array for path, array in wanted.items() if array is not None}
    with pytest.raises(InputError, match=said):
        checkpoints.restore(1, abstract_of(wanted))


def spread_over(mesh, array, rows, columns):
    """Where an array lies when its last two axes lie on these mesh axes; others are replicated."""
    spec = (None,) * (np.ndim(array) - 2) + (rows, columns) if np.ndim(array) > 1 else ()
    return NamedSharding(mesh, PartitionSpec(*spec))


def test_restores_onto_another_mesh(checkpoints):
    """Saved from 4 x 2 devices, restored onto 2 x 4, onto other axes of the same, and onto one."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    wide = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=auto)
    tall = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=auto)
    arrays = arrays_of(1, rows=8)
    spread = {
        path: jax.device_put(array, spread_over(wide, array, "data", "fsdp"))
        for path, array in arrays.items()
    }
    assert state_sha256(spread) == state_sha256(arrays)
    checkpoints.save(1, spread, META, score=None, wait=True)
    for mesh, *axes in ((tall, "data", "fsdp"), (wide, "fsdp", None), (wide, None, "data")):
        wanted = {
            path: jax.ShapeDtypeStruct(
                array.shape, array.dtype, sharding=spread_over(mesh, array, *axes)
            )
            for path, array in arrays.items()
        }
        restored = checkpoints.restore(1, wanted)
        chex.assert_trees_all_equal(restored, arrays)
        for path, leaf in wanted.items():
            assert restored[path].sharding == leaf.sharding, path
    alone = checkpoints.restore(1, abstract_of(arrays))
    assert all(len(array.devices()) == 1 for array in alone.values())


def test_one_flipped_bit_in_any_file_is_found(checkpoints):
    checkpoints.save(1, arrays_of(1), META, score=2.0, wait=True)
    checkpoints.save(2, arrays_of(2), META, score=2.0, wait=True)
    folder = checkpoints.folder / "2"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) >= 8
    rng = np.random.default_rng(0)
    for path in files:
        data = path.read_bytes()
        places = {0, len(data) - 1, *rng.integers(len(data), size=4).tolist()}
        for place in places:
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            told = {}
            assert reopened(checkpoints).latest_sound(told.__setitem__) == 1, (path, place)
            assert list(told) == [2]
            assert path.relative_to(folder).as_posix() in told[2]
        path.write_bytes(data)
    assert reopened(checkpoints).latest_sound() == 2


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    made = Checkpoints(folder, keep=2, keep_best=False)
    for step in (1, 2):
        made.save(step, arrays_of(step), META, score=None)
    made.close()
    return folder


def test_damage_is_named_and_the_one_before_is_used(two_checkpoints, tmp_path, capsys):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    (tmp_path / "copy" / "2" / "meta.json").unlink()
    made = Checkpoints(tmp_path / "copy", keep=2, keep_best=False)
    assert made.latest_sound() == made.newest() == 1
    assert capsys.readouterr().err == "checkpoint 2 is corrupt: meta.json is missing\n"
    told = {}
    made.latest_sound(told.__setitem__)
    assert told == {2: "meta.json is missing"}
    assert names(made) == ["1", "2"]  # left where it was
    with pytest.raises(CorruptCheckpointsError, match=r"2: got 'meta\.json is missing'"):
        made.read_meta(2)
    with pytest.raises(CorruptCheckpointsError, match=r"2: got 'meta\.json is missing'"):
        made.restore(2, {})


def test_all_corrupt_is_an_error_never_a_fresh_start(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    made = Checkpoints(tmp_path / "copy", keep=2, keep_best=False)
    (made.folder / "1" / "meta.json").unlink()
    (made.folder / "2" / "manifest.json").unlink()
    said = r"all 2 checkpoints corrupt \(2: manifest.json cannot.*; 1: meta.json is missing\)"
    with pytest.raises(CorruptCheckpointsError, match=said):
        made.latest_sound(lambda step, problem: None)
    shutil.rmtree(made.folder / "1")
    (made.folder / "2").rename(made.folder / "2.corrupt")
    with pytest.raises(CorruptCheckpointsError, match=r"2\.corrupt: moved aside"):
        made.latest_sound(lambda step, problem: None)


def test_rerun_that_reaches_a_corrupt_step_saves_it_anew(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    (tmp_path / "copy" / "2" / "meta.json").unlink()
    made = Checkpoints(tmp_path / "copy", keep=1, keep_best=False)
    assert made.latest_sound(lambda step, problem: None) == 1
    made.save(2, arrays_of(2), META, score=None, wait=True)
    assert names(made) == ["2", "2.corrupt"]
    assert not (made.folder / "2.corrupt" / "meta.json").exists()
    os.truncate(made.folder / "2" / "meta.json", 0)
    again = reopened(made)
    again.save(2, arrays_of(2), META, score=None, wait=True)
    assert names(made) == ["2", "2.corrupt", "2.corrupt2"]
    assert reopened(made).latest_sound() == 2
    made.close()
    again.close()


def test_sound_checkpoint_of_the_same_step_is_left_alone(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    made = Checkpoints(tmp_path / "copy", keep=2, keep_best=False)
    inode = (made.folder / "2").stat().st_ino
    for _ in range(2):
        made.save(2, arrays_of(99), {}, score=None, wait=True)
    assert (made.folder / "2").stat().st_ino == inode
    assert_restores(made, 2)
    made.close()


@pytest.mark.parametrize(
    ("keep", "keep_best", "scores", "kept"),
    [
        (1, False, [3, 1, 2, 4], [4]),
        (2, False, [3, 1, 2, 4], [3, 4]),
        (9, False, [3, 1, 2, 4], [1, 2, 3, 4]),
        (1, True, [3, 1, 2, 4], [2, 4]),
        (2, True, [1, 1, 3, 4], [2, 3, 4]),
        (1, True, [None, 5, None, float("nan")], [2, 4]),
        (1, True, [float("nan"), None, float("-inf"), None], [4]),
        (1, True, [4, 3, 2, 1], [4]),
    ],
)
def test_newest_and_best_are_kept(tmp_path, keep, keep_best, scores, kept):
    made = Checkpoints(tmp_path, keep=keep, keep_best=keep_best)
    for step, score in enumerate(scores, start=1):
        made.save(step, {"a": np.zeros(1, np.float32)}, {}, score=score)
    made.close()
    assert made.steps() == kept
    assert names(made) == [str(step) for step in kept]
    finite = {s: score for s in kept if (score := scores[s - 1]) is not None and abs(score) < 9}
    assert made.best() == min(finite, key=lambda s: (finite[s], -s), default=None)


def test_corrupt_newer_checkpoints_do_not_push_out_the_sound(checkpoints):
    for step in (1, 20, 30):
        checkpoints.save(step, arrays_of(step), META, score=-step, wait=True)
    for step in (20, 30):
        os.truncate(checkpoints.folder / str(step) / "meta.json", 0)
    checkpoints.save(1, arrays_of(1), META, score=None, wait=True)
    made = reopened(checkpoints, keep=1, keep_best=True)
    told = {}
    assert made.latest_sound(told.__setitem__) == 1
    assert set(told) == {20, 30}
    made.save(10, arrays_of(10), META, score=0, wait=True)
    assert names(made) == ["10", "20", "30"]
    made.save(25, arrays_of(25), META, score=1, wait=True)
    assert names(made) == ["10", "20", "25", "30"]
    made.close()


def test_failed_write_is_raised_once_with_its_reason_and_leaves_the_rest(checkpoints):
    """The process may write no file over 4 kB for the while: as good as a full disk."""
    checkpoints.save(1, arrays_of(1), META, score=None, wait=True)
    big = {"a": np.random.default_rng(0).normal(size=100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        checkpoints.save(2, big, META, score=None)
        checkpoints._thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = f"checkpoint 2 could not be written to {checkpoints.folder}: .*File too large"
    with pytest.raises(CheckpointError, match=said):
        checkpoints.save(3, big, META, score=None)
    checkpoints.wait()
    assert names(checkpoints) == ["1"]
    checkpoints.save(3, big, META, score=None, wait=True)
    assert reopened(checkpoints).latest_sound() == 3


def test_a_save_under_way_does_not_commit_once_the_lock_is_lost(tmp_path, monkeypatch):
    """It leaves its unfinished folder: by then another process may write one of that name."""
    with RunLock(tmp_path) as lock:
        made = Checkpoints(tmp_path / "checkpoints", keep=1, keep_best=False, check_lock=lock.check)
        made.save(1, arrays_of(1), META, score=None, wait=True)
        save, begun, held = made._files.save, threading.Event(), threading.Event()

        def save_late(*arguments):
            begun.set()
            assert held.wait(20)
            save(*arguments)

        monkeypatch.setattr(made._files, "save", save_late)
        made.save(2, arrays_of(2), META, score=None)
        assert begun.wait(20)
        (tmp_path / "lock").unlink()
        held.set()
        with pytest.raises(RunLockLostError):
            made.wait()
        assert names(made) == ["1", "2.partial"]
        with pytest.raises(RunLockLostError):
            made.save(3, arrays_of(3), META, score=None, wait=True)
        assert names(made) == ["1", "2.partial"]
        made.close()


def test_linked_checkpoints_are_read_and_only_the_links_removed(two_checkpoints, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(two_checkpoints, elsewhere)
    before = all_bytes(elsewhere)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2):
        (folder / str(step)).symlink_to(elsewhere / str(step))
    (folder / "3").symlink_to(tmp_path / "nothing")
    (folder / "4").symlink_to("4")
    (folder / "5.partial").symlink_to(elsewhere / "1")
    made = Checkpoints(folder, keep=1, keep_best=False)
    made.remove_partial()
    assert made.latest_sound() == 2
    assert_restores(made, 2)
    made.save(3, arrays_of(3), META, score=None, wait=True)
    assert names(made) == ["3", "3.corrupt", "4"]
    made.discard(3)
    made.save(4, arrays_of(4), META, score=None, wait=True)
    assert names(made) == ["3.corrupt", "4", "4.corrupt"]
    assert all_bytes(elsewhere) == before
    made.close()


def test_files_in_the_way_are_moved_aside_or_named(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    made = Checkpoints(tmp_path / "copy", keep=2, keep_best=False)
    (made.folder / "3").write_text("mine")
    (made.folder / "notes.partial").mkdir()
    assert made.latest_sound() == 2
    made.save(3, arrays_of(3), META, score=None, wait=True)
    assert (made.folder / "3.corrupt").read_text() == "mine"
    (made.folder / "4.partial").write_text("mine")
    (made.folder / "5.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint 4 could.*: Not a directory"):
        made.save(4, arrays_of(4), META, score=None, wait=True)
    with pytest.raises(
        InputError, match=r"4\.partial: got 'a file', expected a folder that a save"
    ):
        made.remove_partial()
    assert (made.folder / "4.partial").read_text() == "mine"
    (made.folder / "4.partial").unlink()
    made.remove_partial()
    assert names(made) == ["2", "3", "3.corrupt", "notes.partial"]
    made.close()


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda path: path.write_text("mine"), "a file"),
        (lambda path: path.symlink_to(path.parent), "a link"),
        (lambda path: path.symlink_to("nothing"), "a link"),
    ],
)
def test_what_is_no_folder_of_checkpoints_is_refused(tmp_path, make, got):
    make(tmp_path / "checkpoints")
    with pytest.raises(InputError, match=f"checkpoints: got '{got}', expected a folder"):
        make_folder(tmp_path / "checkpoints")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_what_json_cannot_say_is_raised_at_once(checkpoints):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, arrays_of(1), {"bad": np.zeros(1)}, score=None)
    assert checkpoints.latest_sound() is None


def test_the_last_good_one_is_sound(checkpoints):
    for step, score in ((1, 3.0), (2, 2.0), (3, math.nan)):
        checkpoints.save(step, arrays_of(step), META, score=score, provisional=True, wait=True)
    assert checkpoints.last_good() == 2
    (checkpoints.folder / "2" / "meta.json").write_text("{}")
    other = reopened(checkpoints)
    assert other.last_good() == 1
    assert other.set_aside(1) == [2, 3]
    assert names(checkpoints) == ["1", "2.diverged", "3.diverged"]
    assert other.latest_sound() == 1


def test_a_provisional_save_prunes_nothing_and_can_be_replaced(checkpoints):
    for step in range(4):
        checkpoints.save(step, arrays_of(step), META, score=None, provisional=True, wait=True)
    assert names(checkpoints) == ["0", "1", "2", "3"]
    checkpoints.discard(3)
    checkpoints.save(3, arrays_of(30) | {"step": np.asarray(3)}, META, score=None, wait=True)
    assert names(checkpoints) == ["0", "2", "3"]
    assert checkpoints.latest_sound() == 3
