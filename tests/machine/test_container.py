"""What control groups let this process take."""

import os

import pytest

from fastdreamer.config import ConfigError, preset
from fastdreamer.machine import container, doctor
from fastdreamer.machine.container import cpu_quota, memory, memory_limit
from fastdreamer.training import preflight


def system(root, groups, files):
    """The root of a file system that tells of control groups."""
    told = {"sys/fs/cgroup/" + name: text for name, text in files.items()}
    if groups is not None:
        told["proc/self/cgroup"] = groups
    for name, text in told.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "4:memory:/job\n3:cpu,cpuacct:/docker/a:b\n0::/job\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # a container of its own
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),  # the root of a machine
        (
            "0::/pods/one/main\n",  # the least of it and its parents
            {
                "pods/one/main/cpu.max": "max 100000",
                "pods/one/cpu.max": "200000 100000",
                "pods/cpu.max": "800000 100000",
            },
            2.0,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        (
            V1,
            {
                "cpu/docker/a:b/cpu.cfs_quota_us": "300000",
                "cpu/docker/a:b/cpu.cfs_period_us": "100000",
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        ("5:memory:/\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "9"}, None),
        (None, {"cpu.max": "150000 100000\n"}, None),
    ],
)
def test_the_quota_of_a_container(groups, files, quota, tmp_path):
    assert cpu_quota(system(tmp_path, groups, files)) == quota


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "8589934592\n"}, 8 << 30),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "4096"}, 4096),
        (V1, {"memory/job/memory.limit_in_bytes": "1024\n"}, 1024),
        (V1, {"cpu/docker/a:b/memory.limit_in_bytes": "1024\n", "memory.max": "max"}, None),
        (None, {"memory.max": "4096"}, None),
    ],
)
def test_the_memory_of_a_container(groups, files, limit, tmp_path):
    assert memory_limit(system(tmp_path, groups, files)) == limit


def test_the_lesser_of_limit_and_machine(monkeypatch, tmp_path):
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (None, (1 << 63) - 4096):  # the first version's "none"
        monkeypatch.setattr(container, "memory_limit", lambda limit=limit: limit)
        assert memory() == (there, "this machine")
    monkeypatch.setattr(container, "memory_limit", lambda: 1 << 20)
    assert memory() == (1 << 20, "this container")
    told = dict(doctor._machine())
    assert told["memory"] == "0.000977 GiB, of this container"
    with pytest.raises(ConfigError, match=r"this container has 1 MiB"):
        preflight.check(preset("walker"), tmp_path / "run", print)
