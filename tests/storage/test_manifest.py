"""The manifest against sums computed here, and against every kind of damage, on plain files."""

import hashlib
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from other_formats import OTHER_TYPES, at, places, replaced, rewrite

import jaxmorph
from jaxmorph.storage.manifest import (
    describe_leaves,
    problem_of,
    read_manifest,
    state_sha256,
    write_manifest,
)

LEAVES = {"w": jnp.zeros((2, 3), jnp.bfloat16), "step": np.asarray(2, np.int32)}


def make(folder, step, score=0.25):
    """A folder with the files of a checkpoint, and their manifest."""
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"step": step, "text": "é" * 20}))
    (folder / "state" / "manifest.ocdbt").write_bytes(bytes(range(256)))
    (folder / "state" / "d" / "empty").write_bytes(b"")
    write_manifest(folder, step, describe_leaves(LEAVES), state_sha256(LEAVES), score, 7)
    return folder


def test_digest_is_of_path_dtype_shape_and_bytes():
    """Against the definition written out by hand."""
    b = np.asarray([[1, 2]], np.int32)
    a = jnp.asarray([0.5, 1, -2], jnp.bfloat16)
    by_hand = hashlib.sha256(
        b"a\0bfloat16\0(3,)\0" + b"\x00\x3f\x80\x3f\x00\xc0"
        b"b\0int32\0(1, 2)\0" + b"\x01\0\0\0\x02\0\0\0"
    )
    assert state_sha256({"b": b, "a": a}) == by_hand.hexdigest()
    changed = [
        {"b": b, "c": a},
        {"b": b.T, "a": a},
        {"b": b.view(np.uint32), "a": a},
        {"b": b + np.int32(1), "a": a},
        {"b": b},
    ]
    assert len({state_sha256(each) for each in changed} | {by_hand.hexdigest()}) == 6
    assert state_sha256({"x": b.T}) == state_sha256({"x": np.asarray([[1], [2]], np.int32)})


def test_manifest_holds_what_other_programs_compute(tmp_path):
    folder = make(tmp_path / "2", 2)
    read = json.loads((folder / "manifest.json").read_text())
    assert read["leaves"] == {"w": ["bfloat16", [2, 3]], "step": ["int32", []]}
    assert (read["format"], read["jaxmorph"]) == (7, jaxmorph.__version__)
    assert (read["step"], read["score"], read["state_sha256"]) == (2, 0.25, state_sha256(LEAVES))
    assert set(read["files"]) == {"meta.json", "state/manifest.ocdbt", "state/d/empty"}
    for name, sums in read["files"].items():
        data = (folder / name).read_bytes()
        assert sums == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert problem_of(folder) is None
    del read["manifest_sha256"]
    assert read_manifest(folder) == read


@pytest.mark.parametrize("score", [None, float("nan"), float("inf"), float("-inf")])
def test_score_that_is_no_number_is_none(tmp_path, score):
    assert read_manifest(make(tmp_path / "2", 2, score))["score"] is None


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = make(tmp_path / "2", 2) / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            read_manifest(path.parent)


def damage_manifest_consistently(folder):
    """The work of a bug rather than of a disk: fields and digest changed, the form kept."""
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step":2', '"step":3'))


def in_place_of(path, make):
    path.unlink()
    make(path)


DAMAGES = {
    "truncated": (lambda f: os.truncate(f / "meta.json", 10), "meta.json has 10 bytes, not"),
    "emptied": (lambda f: os.truncate(f / "state/manifest.ocdbt", 0), "has 0 bytes, not"),
    "longer": (lambda f: os.truncate(f / "meta.json", 999), "meta.json has 999 bytes"),
    "missing": (lambda f: (f / "meta.json").unlink(), "meta.json is missing"),
    "extra": (lambda f: (f / "state/x").write_text("x"), "state/x is not in its manifest"),
    "extra link": (lambda f: (f / "x").symlink_to("state"), "x is not in its manifest"),
    "arrays gone": (lambda f: shutil.rmtree(f / "state"), "is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    "no bytes": (lambda f: os.truncate(f / "manifest.json", 0), "damaged (not JSON)"),
    "half a manifest": (lambda f: os.truncate(f / "manifest.json", 50), "damaged (not JSON)"),
    "manifest of another kind": (lambda f: (f / "manifest.json").write_text("[]"), "canonical"),
    "same words, other spaces": (
        lambda f: (f / "manifest.json").write_text(
            json.dumps(json.loads((f / "manifest.json").read_text()), sort_keys=True)
        ),
        "canonical",
    ),
    "a folder for a file": (lambda f: in_place_of(f / "meta.json", os.mkdir), "is missing"),
    "a file for a folder": (
        lambda f: (shutil.rmtree(f / "state"), (f / "state").touch()),
        "state/d/empty is missing",
    ),
    "a link to nothing": (
        lambda f: in_place_of(f / "meta.json", lambda path: path.symlink_to("nothing")),
        "meta.json cannot be read (No such file or directory)",
    ),
    "a link to itself": (
        lambda f: in_place_of(f / "meta.json", lambda path: path.symlink_to("meta.json")),
        "meta.json cannot be read (Too many levels of symbolic links)",
    ),
    "a pipe": (lambda f: in_place_of(f / "meta.json", os.mkfifo), "meta.json is not a plain file"),
    "a pipe for a manifest": (
        lambda f: in_place_of(f / "manifest.json", os.mkfifo),
        "manifest.json is not a plain file",
    ),
    "a device": (
        lambda f: in_place_of(f / "meta.json", lambda path: path.symlink_to("/dev/zero")),
        "meta.json is not a plain file",
    ),
    "a folder for a manifest": (
        lambda f: in_place_of(f / "manifest.json", os.mkdir),
        "manifest.json is not a plain file",
    ),
    "a name with an escape": (
        lambda f: (f / "\x1b[31mred").touch(),
        r"\x1b[31mred is not in its manifest",
    ),
    "a manifest too deep": (
        lambda f: (f / "manifest.json").write_text("[" * 100_000),
        "manifest.json is damaged (not JSON)",
    ),
    "other step": (damage_manifest_consistently, "its digest differs"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "manifest.json cannot be read"),
    "another's folder": (
        lambda f: (shutil.rmtree(f), shutil.copytree(f.with_name("1"), f)),
        "manifest.json is of step 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(tmp_path, damage):
    make(tmp_path / "1", 1)
    inflict, said = DAMAGES[damage]
    inflict(make(tmp_path / "2", 2))
    assert said in str(problem_of(tmp_path / "2"))
    assert problem_of(tmp_path / "1") is None


def test_a_value_of_another_type_in_a_manifest_is_damage(tmp_path):
    """Written soundly, digest and form: what a bug or another program might leave."""
    folder = make(tmp_path / "2", 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    also: dict[tuple, tuple[type, ...]] = {
        ("score",): (int, type(None)),
        ("format",): (type(None),),  # absent from format 1, and so is the next
        ("jaxmorph",): (type(None),),
    }
    tried = 0
    for path in places(manifest):
        for new in OTHER_TYPES:
            meant = (type(at(manifest, path)), *also.get(path, ()))
            if path[0] == "manifest_sha256" or type(new) in meant:
                continue
            changed = replaced(manifest[path[0]], path[1:], new)
            rewrite(folder, **manifest | {str(path[0]): changed})
            assert str(problem_of(folder)).startswith("manifest.json is damaged ("), (path, new)
            tried += 1
    assert tried > 150
    rewrite(folder, **manifest)
    assert problem_of(folder) is None
