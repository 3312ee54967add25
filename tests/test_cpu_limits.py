"""How many CPUs this process may compute on, read from trees that stand for machines."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from moert import _C

V2_MOUNT = "25 24 0:22 {mounted} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {mounted} {at} rw,relatime - cgroup cgroup rw,{controllers}\n"
OTHER_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "33 31 0:33 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n"
)


class FakeMachine:
    """A tree that stands for "/": sysfs with CPUs and nodes, /proc as one process sees it, and cgroup folders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def cores(self, *siblings: str, name: str = "core_cpus_list") -> None:
        """One physical core for each argument, written as the kernel lists its CPUs; only "0,4" and "0-1" forms."""
        for core in siblings:
            first, _, last = core.replace(",", "-").partition("-")
            for cpu in (first, last or first):
                self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/{name}", f"{core}\n")

    def nodes(self, online: str, **cpulists: str) -> None:
        self.write("sys/devices/system/node/online", f"{online}\n")
        for node, cpulist in cpulists.items():
            self.write(f"sys/devices/system/node/{node}/cpulist", f"{cpulist}\n")

    def process(self, cgroup: str, mountinfo: str) -> None:
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", OTHER_MOUNTS + mountinfo)

    def v2(self, folder: str, text: str) -> None:
        self.write(f"{folder}/cpu.max", f"{text}\n")

    def v1(self, folder: str, quota: int, period: int = 100_000) -> None:
        self.write(f"{folder}/cpu.cfs_quota_us", f"{quota}\n")
        self.write(f"{folder}/cpu.cfs_period_us", f"{period}\n")

    def limits(self, cpus: Iterable[int] = range(8)) -> dict:
        return _C.cpu_limits(str(self.root), list(cpus))


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_a_machine_that_tells_nothing_has_a_core_for_each_cpu(machine: FakeMachine) -> None:
    assert machine.limits([5, 3]) == {
        "threads": 2,
        "why": "2 physical cores behind the 2 CPUs that this process may run on",
        "allowed_cpus": [3, 5],
        "physical_cores": 2,
        "quota_cpus": None,
        "quota_source": None,
        "numa_nodes": [[3, 5]],
    }


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_one_thread_for_each_physical_core_that_may_be_used(machine: FakeMachine, name: str) -> None:
    machine.cores("0,4", "1,5", "2,6", "3,7", name=name)
    assert machine.limits()["threads"] == 4
    assert machine.limits([0, 4])["threads"] == 1
    assert machine.limits([1, 4, 5])["threads"] == 2
    assert machine.limits([6, 3])["physical_cores"] == 2


def test_neighbours_that_share_a_core(machine: FakeMachine) -> None:
    machine.cores("0-1", "2-3", "4-5", "6-7")
    assert machine.limits()["threads"] == 4
    assert machine.limits([0, 2, 4])["threads"] == 3


@pytest.mark.parametrize("text", ["", "\n", "nonsense", "0-", "-3", "0,,4", "0-99999999999999999999", "4-0x7"])
def test_a_list_that_makes_no_sense_joins_no_cpus(machine: FakeMachine, text: str) -> None:
    for cpu in range(2):
        machine.write(f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list", text)
    assert machine.limits(range(2))["threads"] == 2


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="compares with /proc/cpuinfo")
def test_cores_of_this_machine_agree_with_proc_cpuinfo() -> None:
    cores = {}
    for block in Path("/proc/cpuinfo").read_text().strip().split("\n\n"):
        fields = dict(line.replace("\t", "").split(":", 1) for line in block.splitlines() if ":" in line)
        if "core id" in fields:
            cores[int(fields["processor"])] = (fields["physical id"], fields["core id"])
    allowed = sorted(os.sched_getaffinity(0))
    if not set(allowed) <= cores.keys():
        pytest.skip("/proc/cpuinfo names no cores here")
    limits = _C.cpu_limits("/", allowed)
    assert limits["allowed_cpus"] == allowed
    assert limits["physical_cores"] == len({cores[cpu] for cpu in allowed})
    assert sorted(cpu for node in limits["numa_nodes"] for cpu in node) == allowed


@pytest.mark.parametrize(
    ("text", "quota", "threads"),
    [
        ("max 100000", None, 8),
        ("300000 100000", 3.0, 3),
        ("150000 100000", 1.5, 2),
        ("310000 100000", 3.1, 4),
        ("1000 100000", 0.01, 1),
        ("1600000 100000", 16.0, 8),
        ("70000 10000", 7.0, 7),
        ("300000 0", None, 8),
        ("300000", None, 8),
        ("", None, 8),
    ],
)
def test_quota_of_the_own_v2_group(machine: FakeMachine, text: str, quota: float | None, threads: int) -> None:
    machine.process("0::/user/job\n", V2_MOUNT.format(mounted="/", at="/sys/fs/cgroup"))
    machine.v2("sys/fs/cgroup/user/job", text)
    limits = machine.limits()
    assert (limits["quota_cpus"], limits["threads"]) == (quota, threads)
    if quota is not None:
        assert limits["quota_source"] == f"{machine.root}/sys/fs/cgroup/user/job/cpu.max"
    if threads < 8:
        assert limits["why"] == f"a quota of {quota:g} CPUs in {limits['quota_source']}"


@pytest.mark.parametrize("tightest", ["sys/fs/cgroup/a/b/c", "sys/fs/cgroup/a/b", "sys/fs/cgroup/a", "sys/fs/cgroup"])
def test_the_tightest_ancestor_binds(machine: FakeMachine, tightest: str) -> None:
    machine.process("0::/a/b/c\n", V2_MOUNT.format(mounted="/", at="/sys/fs/cgroup"))
    for folder in ("sys/fs/cgroup", "sys/fs/cgroup/a", "sys/fs/cgroup/a/b", "sys/fs/cgroup/a/b/c"):
        machine.v2(folder, "200000 100000" if folder == tightest else "500000 100000")
    limits = machine.limits()
    assert limits["threads"] == 2
    assert limits["quota_source"] == f"{machine.root}/{tightest}/cpu.max"


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_quota_of_v1(machine: FakeMachine, controllers: str) -> None:
    at = f"/sys/fs/cgroup/{controllers}"
    machine.process(
        f"9:name=systemd:/x\n4:{controllers}:/job/part\n3:cpuset:/job/part\n0::/job/part\n",
        V1_MOUNT.format(mounted="/", at=at, controllers=controllers),
    )
    machine.v1(f"{at[1:]}/job/part", -1)
    assert machine.limits()["quota_cpus"] is None
    machine.v1(f"{at[1:]}/job", 25_000, 10_000)
    assert machine.limits()["quota_cpus"] == 2.5
    machine.v1(f"{at[1:]}/job/part", 120_000)
    assert machine.limits()["threads"] == 2
    # A sibling's limit, and one of another controller, are not ours.
    machine.v1(f"{at[1:]}/other", 1000)
    machine.v1("sys/fs/cgroup/cpuset/job/part", 1000)
    assert machine.limits()["quota_cpus"] == 1.2


def test_inside_a_container_the_mount_is_the_own_group(machine: FakeMachine) -> None:
    machine.process("0::/docker/abc/inner\n", V2_MOUNT.format(mounted="/docker/abc", at="/sys/fs/cgroup"))
    machine.v2("sys/fs/cgroup/inner", "300000 100000")
    assert machine.limits()["threads"] == 3
    machine.v2("sys/fs/cgroup", "200000 100000")
    assert machine.limits()["threads"] == 2


@pytest.mark.parametrize("path", ["/docker/abcdef", "/elsewhere", "/../other"])
def test_a_path_of_another_namespace_leaves_the_mount_point(machine: FakeMachine, path: str) -> None:
    machine.process(f"0::{path}\n", V2_MOUNT.format(mounted="/docker/abc", at="/sys/fs/cgroup"))
    machine.v2("sys/fs/cgroup", "200000 100000")
    machine.v2("sys/fs/cgroup/def", "100000 100000")
    machine.v2("sys/fs/other", "100000 100000")
    assert machine.limits()["threads"] == 2


def test_names_with_spaces_and_colons(machine: FakeMachine) -> None:
    machine.process("0::/a b:c\n", V2_MOUNT.format(mounted="/", at="/mnt/my\\040groups"))
    machine.v2("mnt/my groups/a b:c", "200000 100000")
    assert machine.limits()["threads"] == 2


def test_mangled_proc_files_limit_nothing(machine: FakeMachine) -> None:
    machine.process("\n0\n0:\n::\n", "no separator\na - b\n - cgroup2 c rw\n1 2 3 4 5 - cgroup\n")
    assert machine.limits()["quota_cpus"] is None


def test_nodes_have_the_allowed_cpus_only(machine: FakeMachine) -> None:
    machine.cores("0,8", "1,9", "2,10", "3,11", "4,12", "5,13", "6,14", "7,15")
    machine.nodes("0-2", node0="0-3,8-11", node1="", node2="4-7,12-15")
    assert machine.limits(range(16))["numa_nodes"] == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    assert machine.limits([2, 4, 12])["numa_nodes"] == [[2], [4, 12]]
    assert machine.limits([5])["numa_nodes"] == [[5]]


def test_nodes_that_do_not_add_up_count_as_one(machine: FakeMachine) -> None:
    machine.nodes("0-1", node0="0-3")
    assert machine.limits()["numa_nodes"] == [list(range(8))]
