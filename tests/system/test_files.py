"""Files replaced in one piece."""

import errno
import os
import re
from pathlib import Path

import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.system import files
from jaxmorph.system.files import replace_file


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_file_is_replaced_whole_or_left_as_it_was(tmp_path, monkeypatch, step):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "no space")

    path = tmp_path / "a.txt"
    replace_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, step, full_disk)
        with pytest.raises(OSError, match="no space"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_content_and_name_are_on_the_disk_before_it_returns(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda file: (synced.append(os.fstat(file)), fsync(file))
    )
    replace_file(tmp_path / "a.txt", b"new")
    inodes = [(tmp_path / "a.txt").stat().st_ino, tmp_path.stat().st_ino]
    assert [stat.st_ino for stat in synced] == inodes


@pytest.mark.parametrize(
    ("call", "fails"),
    [
        (lambda path: replace_file(path, b"new"), ("write", "fsync", "replace")),
        (lambda path: files.write_new(path, b"new"), ("write",)),
        (lambda path: files.rename_folder(path.parent / "folder", path), ("rename",)),
        (files.sync_file, ("fsync",)),
        (lambda path: os.close(files.open_to_append(path, 1)), ("ftruncate",)),
    ],
)
def test_whatever_fails_names_the_file(tmp_path, monkeypatch, call, fails):
    path = tmp_path / "a.txt"
    (tmp_path / "folder").mkdir()

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    for name in fails:
        path.write_text("old")
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, broken)
            with pytest.raises(OSError, match="Input/output error") as failure:
                call(path)
        assert failure.value.filename == str(path), name


def test_only_a_bad_path_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    said = r"a\.txt: expected a writable file \(Not a directory\)"
    with pytest.raises(InputError, match=said), files.refusing_bad_paths():
        replace_file(tmp_path / "file" / "a.txt", b"")
    with pytest.raises(OSError, match="No space"), files.refusing_bad_paths():
        raise OSError(errno.ENOSPC, "No space")


def test_all_that_a_run_writes_it_writes_here():
    """No other module writes, syncs or renames, so that a fault there reaches all of it."""
    writing = re.compile(
        r"\.write_(text|bytes)\(|os\.(replace|rename|fsync|write|link)\(|\.(rename|touch|replace)\(\w+\)"
        r"|open\([^)]*\"[wax+]b?\+?\""
    )
    package = Path(files.__file__).parents[1]
    found = {
        str(path.relative_to(package)): lines
        for path in package.rglob("*.py")
        if (lines := [x for x in path.read_text().splitlines() if writing.search(x)])
    }
    # the cache of tokenised text is not part of a run; a lock names its holder, or not
    others = {"data/cache.py", "storage/run_lock.py"}
    assert found.pop("system/files.py")
    assert {name: lines for name, lines in found.items() if name not in others} == {}


def test_file_in_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "none" / "a.txt", b"")
