"""Files replaced in one piece."""

import errno
import os

import pytest

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


def test_file_in_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "none" / "a.txt", b"")
