"""The lock of a run folder, held by real processes."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.storage.run_lock import RunLock

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


def test_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--run_dir: got '.*file'.*\(File exists\)"):
        RunLock(tmp_path / "file").__enter__()
