"""The lock of a run folder, held by real processes."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.run_lock import RunLock, RunLockLostError

HOLD = """
import sys, time
from pathlib import Path
from jaxmorph.storage.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path until its stdin closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_second_process_is_refused_with_the_first_ones_name(tmp_path, holder):
    with pytest.raises(InputError) as refusal, RunLock(tmp_path):
        pass
    message = str(refusal.value)
    assert str(tmp_path) in message
    assert f"process {holder.pid} on {socket.gethostname()}, started 20" in message
    holder.communicate()  # ends normally
    with RunLock(tmp_path) as lock:
        assert lock.taken_over_from == ""


def test_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path) as lock:
        assert f"process {holder.pid} " in lock.taken_over_from
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
        with pytest.raises(InputError, match=f"process {os.getpid()} "), RunLock(tmp_path):
            pass
    with RunLock(tmp_path) as lock:
        assert lock.taken_over_from == ""


def test_lock_is_released_when_the_body_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / "new" / "run"):
        raise ZeroDivisionError
    with RunLock(tmp_path / "new" / "run"):
        pass


def replaced_by_a_copy(lock):
    content = lock.read_bytes()
    lock.unlink()
    lock.write_bytes(content)


LOSSES = {
    "removed": (lambda lock: lock.unlink(), "cannot be found (No such file or directory)"),
    "replaced": (replaced_by_a_copy, "was replaced by another file"),
    "run folder moved": (
        lambda lock: lock.parent.rename(lock.parent.with_name("moved")),
        "cannot be found (No such file or directory)",
    ),
    "run folder a file": (
        lambda lock: (lock.parent.rename(lock.parent.with_name("moved")), lock.parent.touch()),
        "cannot be found (Not a directory)",
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_holder_notices_that_its_lock_is_gone_and_leaves_the_file_alone(tmp_path, loss):
    lose, said = LOSSES[loss]
    file = tmp_path / "run" / "lock"
    with RunLock(file.parent) as lock:
        lock.check()
        name = file.read_bytes()
        lose(file)
        with pytest.raises(RunLockLostError) as noticed:
            lock.check()
    assert str(noticed.value).startswith(f"{file}, which this process has locked, {said}; another")
    for left in (file, tmp_path / "moved" / "lock"):
        assert not left.is_file() or left.read_bytes() == name


def test_a_second_process_gets_in_where_the_lock_was_removed_and_the_first_one_notices(tmp_path):
    with RunLock(tmp_path) as first:
        (tmp_path / "lock").unlink()
        with RunLock(tmp_path) as second:
            with pytest.raises(RunLockLostError):
                first.check()
            second.check()
        second_name = (tmp_path / "lock").read_bytes()
    assert second_name == (tmp_path / "lock").read_bytes() == b""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("elsewhere"), "Too many levels of symbolic links"),
        (lambda path: os.mkfifo(path), "Invalid argument"),
    ],
)
def test_a_lock_that_is_no_plain_file_is_refused(tmp_path, make, said):
    make(tmp_path / "lock")
    with pytest.raises(InputError, match=rf"can be written and locked \({said}\)"):
        RunLock(tmp_path).__enter__()
    assert sorted(os.listdir(tmp_path)) == ["lock"]


def test_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--run_dir: got '.*file'.*\(File exists\)"):
        RunLock(tmp_path / "file").__enter__()
