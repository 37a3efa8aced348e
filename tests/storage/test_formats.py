"""Checkpoints of other formats: migrated by a table, or refused by name and left as they are."""

import json
import os

import jax
import numpy as np
import pytest
from other_formats import all_bytes, rewrite

import jaxmorph
from jaxmorph.storage.checkpoints import Checkpoints, CorruptCheckpointsError
from jaxmorph.storage.formats import MIGRATIONS, FormatError, current_format

ARRAYS = {"w": np.arange(6, dtype=np.float32), "step": np.asarray(3, np.int32)}
ABSTRACT = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in ARRAYS.items()}


FORMAT_2 = {1: MIGRATIONS[1]}  # the table of migrations when format 2 was the newest


def opened(folder, migrations=FORMAT_2):
    return Checkpoints(folder, keep=2, keep_best=True, migrations=migrations)


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints of format 2."""
    made = opened(tmp_path)
    for step in (1, 3):
        made.save(step, ARRAYS, {"at": step}, score=step)
    made.close()
    return tmp_path


def of_format_1(folder, **meta):
    rewrite(folder, meta or None, format=None, jaxmorph=None)


def reads_of(checkpoints):
    """Every way to read of step 3."""
    return (
        checkpoints.latest_sound,
        lambda: checkpoints.read_meta(3),
        lambda: checkpoints.restore(3, ABSTRACT),
        lambda: checkpoints.restore(3, {"w": ABSTRACT["w"]}, part=True),
    )


def assert_refused(folder, migrations, words):
    before = all_bytes(folder)
    for read in reads_of(opened(folder, migrations)):
        with pytest.raises(FormatError) as refusal:
            read()
        message = str(refusal.value)
        assert "\n" not in message
        assert [
            word for word in [f"{folder / '3'}: format: got ", *words] if word not in message
        ] == []
    assert all_bytes(folder) == before


def test_what_is_written_names_its_format_and_the_version(folder):
    manifest = json.loads((folder / "3" / "manifest.json").read_text())
    assert (manifest["format"], manifest["jaxmorph"]) == (2, jaxmorph.__version__)
    assert current_format(FORMAT_2) == 2


def test_format_1_is_refused_with_the_fix(folder):
    of_format_1(folder / "3")
    words = ["got 1, expected 2", "the arrays of the state had other names", "--run_dir"]
    assert_refused(
        folder, {1: MIGRATIONS[1]}, [*words, "with the jaxmorph that wrote it (format 1)"]
    )


def test_an_older_format_names_the_version_that_wrote_it(folder):
    rewrite(folder / "3", jaxmorph="0.0.7", format=2)
    words = ["got 2, expected 3", "two became one", "(format 2, version 0.0.7)"]
    assert_refused(folder, {1: lambda meta: meta, 2: "two became one"}, words)


def test_a_newer_format_is_refused_whatever_else_its_manifest_holds(folder):
    rewrite(folder / "3", format=99, jaxmorph="9.1", chunks={"later": 1})
    words = ["got 99, expected at most 2", "a newer jaxmorph (format 99, version 9.1); update"]
    assert_refused(folder, {1: MIGRATIONS[1]}, words)


def test_a_migration_makes_the_present_meta_of_an_older_one(folder):
    of_format_1(folder / "3", at=3, speed=2)
    migrations = {1: lambda meta: {"at": meta["at"], "tempo": meta["speed"]}}
    made = opened(folder, migrations)
    assert made.latest_sound() == 3
    assert made.read_meta(3) == {"at": 3, "tempo": 2}
    np.testing.assert_array_equal(made.restore(3, ABSTRACT)["w"], ARRAYS["w"])
    made.save(4, ARRAYS, {"at": 4, "tempo": 5}, score=0.5, wait=True)
    assert json.loads((folder / "4" / "manifest.json").read_text())["format"] == 2
    assert opened(folder, migrations).read_meta(4) == {"at": 4, "tempo": 5}  # as it stands
    assert made.best() == 4
    made.close()


def test_one_more_line_is_one_more_format_and_lines_are_followed_in_turn(folder):
    of_format_1(folder / "1", at=1)
    migrations = {
        1: lambda meta: meta | {"path": "one"},
        2: lambda meta: meta | {"path": f"{meta.get('path', 'none')}, two"},
    }
    made = opened(folder, migrations)
    assert made.read_meta(1) == {"at": 1, "path": "one, two"}
    assert made.read_meta(3) == {"at": 3, "path": "none, two"}
    made.save(4, ARRAYS, {"at": 4}, score=None, wait=True)
    assert made.read_meta(4) == {"at": 4}
    made.close()
    with pytest.raises(FormatError, match="format: got 3, expected at most 2"):
        opened(folder, {1: migrations[1]}).latest_sound()


def test_damage_is_found_before_any_migration(folder):
    of_format_1(folder / "3", at=3)
    os.truncate(folder / "3" / "meta.json", 0)

    def never(meta):
        raise AssertionError("read what is damaged")

    made, told = opened(folder, {1: never}), {}
    assert made.latest_sound(told.__setitem__) == 1
    assert "meta.json has 0 bytes" in told[3]
    with pytest.raises(CorruptCheckpointsError, match=r"meta\.json has 0 bytes"):
        made.read_meta(3)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("2", "'2', not a whole number"),
        (0, "0, not from 1 on"),
        (2.0, "2.0, not a whole number"),
        (True, "True, not a whole number"),
    ],
)
def test_a_format_that_is_no_number_is_damage(folder, number, said):
    rewrite(folder / "3", format=number)
    told = {}
    assert opened(folder).latest_sound(told.__setitem__) == 1
    assert told == {3: f"manifest.json is damaged (format is {said})"}
