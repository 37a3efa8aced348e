"""What limits the memory of a process, read from files as Linux writes them."""

import pytest

from jaxmorph.system import host_memory
from jaxmorph.system.host_memory import available_memory, memory_limits

GB = 1 << 30
# /proc/self/cgroup; limits and uses by folder below /sys/fs/cgroup; the limit, and what is left
GROUPS = {
    "version 2, a limit on the way": (
        "0::/user/run\n", {"user": ("6442450944", 2 * GB), "user/run": ("max", GB)}, 6, 4,
    ),
    "version 2, of a container": ("0::/\n", {".": (str(3 * GB), GB)}, 3, 2),
    "version 2, none": ("0::/\n", {".": ("max", GB)}, None, 8),
    "version 1": (
        "4:cpu:/a\n3:memory:/a/b\n", {"memory/a/b": (str(5 * GB), GB), "cpu/a": ("1", 1)}, 5, 4,
    ),
    "version 1, none": ("3:memory:/a\n", {"memory/a": (str((1 << 63) - 4096), GB)}, None, 8),
    "not mounted": ("0::/gone\n", {}, None, 8),
}  # fmt: skip


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 16 GB, 8 of them available, and no address limit."""
    monkeypatch.setattr(host_memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "_addresses_left", lambda: None)
    (tmp_path / "proc/self").mkdir(parents=True)
    lines = [f"MemTotal: {16 * GB >> 10} kB", f"MemAvailable: {8 * GB >> 10} kB"]
    (tmp_path / "proc/meminfo").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("name", GROUPS)
def test_control_groups_limit_what_there_is_and_what_is_free(name, machine):
    group, folders, limit, left = GROUPS[name]
    (machine / "proc/self/cgroup").write_text(group)
    for place, (most, used) in folders.items():
        folder = machine / "groups" / place
        folder.mkdir(parents=True, exist_ok=True)
        for file, value in (
            *(("memory.max", most), ("memory.current", used)),
            *(("memory.limit_in_bytes", most), ("memory.usage_in_bytes", used)),
        ):
            (folder / file).write_text(f"{value}\n")
    expected = {"this machine's memory": 16 * GB}
    expected |= {} if limit is None else {"the control group's limit": limit * GB}
    assert memory_limits() == expected
    assert available_memory() == left * GB


def test_a_machine_that_does_not_tell_is_of_unknown_memory(machine):
    (machine / "proc/meminfo").unlink()
    assert memory_limits() == {}
    assert available_memory() is None
