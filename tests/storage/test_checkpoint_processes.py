"""Checkpoints of real processes: killed at every point of a save, and two that write together."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys

import chex
import jax
import numpy as np

from jaxmorph.storage.checkpoints import Checkpoints

SAVE_POINTS = ("before_save", "during_save", "after_arrays", "after_manifest", "after_save")

SAVE_TWICE = """
import os, sys
from pathlib import Path
import numpy as np
from jaxmorph.storage.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1, keep_best=False)
arrays = {"a": np.arange(200_000, dtype=np.float32), "b": np.ones(3, np.int32)}
checkpoints.save(10, arrays, {"at": 10}, score=None, wait=True)
os.environ["JAXMORPH_CRASH_AT"] = sys.argv[2]
checkpoints.save(20, arrays, {"at": 20}, score=None, wait=True)
print("unreachable")
"""


def killed_at(folder, point):
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-c", SAVE_TWICE, str(folder), point],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_killed_at_every_point_of_a_save_nothing_is_lost(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = dict(
            zip(
                SAVE_POINTS,
                pool.map(lambda point: killed_at(tmp_path / point, point), SAVE_POINTS),
                strict=True,
            )
        )
    left = {
        "before_save": ["10"],
        "during_save": ["10", "20.partial"],
        "after_arrays": ["10", "20.partial"],
        "after_manifest": ["10", "20.partial"],
        "after_save": ["10", "20"],
    }
    arrays = {"a": np.arange(200_000, dtype=np.float32), "b": np.ones(3, np.int32)}
    abstract = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in arrays.items()}
    for point, end in ends.items():
        assert (end.returncode, end.stdout, end.stderr) == (-signal.SIGKILL, "", ""), point
        made = Checkpoints(tmp_path / point, keep=1, keep_best=False)
        assert sorted(os.listdir(made.folder)) == left[point], point
        committed = 20 if point == "after_save" else 10
        assert made.latest_sound() == committed, point
        assert made.read_meta(committed) == {"at": committed}
        chex.assert_trees_all_equal(made.restore(committed, abstract), arrays)
        made.remove_partial()
        made.save(20, arrays, {"at": 20}, score=None, wait=True)
        made.save(30, arrays, {"at": 30}, score=None)
        made.close()
        assert os.listdir(made.folder) == ["30"], point


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import jax
index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxmorph.storage.checkpoints import CheckpointError, Checkpoints, state_sha256
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
def spread(array, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda piece: array[piece])
whole = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "step": np.asarray(3, np.int32)}
arrays = {"w": spread(whole["w"], "fsdp"), "step": spread(whole["step"])}
assert state_sha256(arrays) == state_sha256(whole)
checkpoints = Checkpoints(folder, keep=2, keep_best=True)
assert checkpoints.latest_sound() is None
for step in (1, 2, 3, 4, 4):
    checkpoints.save(step, arrays, {"step": step}, score=step)
assert (checkpoints.steps(), checkpoints.latest_sound()) == ([1, 3, 4], 4)
columns = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
wanted = {
    "w": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=columns),
    "step": jax.ShapeDtypeStruct((), np.int32, sharding=arrays["step"].sharding),
}
restored = checkpoints.restore(4, wanted)
assert restored["w"].sharding == columns
assert state_sha256(restored) == state_sha256(whole)
if index == 0:
    os.truncate(folder / "4" / "meta.json", 0)
told = {}
assert Checkpoints(folder, keep=2, keep_best=True).latest_sound(told.__setitem__) == 3
assert list(told) == ([4] if index == 0 else [])
def full(*arguments):
    raise OSError(28, "No space left on device")
checkpoints._begin = full
try:
    checkpoints.save(5, arrays, {}, score=None)
except CheckpointError as error:
    print(error)
checkpoints.close()
"""


def test_two_processes_write_one_checkpoint_and_fail_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONWARNINGS": "error"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(index), str(port), str(tmp_path / "made")],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ends = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ends
    assert "checkpoint 5 could not be written" in ends[0][0]
    assert "No space left on device" in ends[0][0]
    assert ends[1][0].splitlines()[-1].startswith("process 0 failed on ")
