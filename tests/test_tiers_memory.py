from __future__ import annotations

import gc
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from moert.tiers.memory import available_bytes, memory_report, peak_rss_bytes, rss_bytes, why_no_reservation

GIB = 1 << 30
V1_UNLIMITED = "9223372036854771712"
V2_MOUNT = "25 24 0:22 {mounted} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {mounted} {at} rw,relatime - cgroup cgroup rw,memory\n"
OTHER_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
)


class FakeMachine:
    """A tree that stands for "/": /proc as one process sees it, and cgroup folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {40 * GIB >> 10} kB\n")
        self.write("proc/self/cgroup", "")
        self.write("proc/self/mountinfo", "")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def process(self, cgroup: str, mountinfo: str) -> None:
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", OTHER_MOUNTS + mountinfo)

    def v2(self, folder: str, *, maximum: str = "max", high: str = "max", used: int = 0, stat: str = "") -> None:
        self.write(f"{folder}/memory.max", f"{maximum}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{used}\n")
        self.write(f"{folder}/memory.stat", stat)

    def v1(self, folder: str, *, limit: int | str = V1_UNLIMITED, used: int = 0, stat: str = "") -> None:
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{folder}/memory.stat", stat)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_without_cgroups_the_machine_binds(machine: FakeMachine) -> None:
    report = memory_report(machine.root)
    assert report.available_bytes == available_bytes(machine.root) == 40 * GIB
    assert report.binding.limit_bytes == 64 * GIB
    assert report.binding.used_bytes == 24 * GIB
    assert report.binding.source.endswith("proc/meminfo")


def test_own_v2_group_binds_and_its_clean_cache_counts_as_free(machine: FakeMachine) -> None:
    machine.process("0::/user/job\n", V2_MOUNT.format(mounted="/", at="/sys/fs/cgroup"))
    stat = f"anon {2 * GIB}\ninactive_file {3 * GIB}\nactive_file {1 * GIB}\nfile_dirty {GIB // 2}\nfile_writeback 0\n"
    machine.v2("sys/fs/cgroup/user/job", maximum=str(10 * GIB), used=8 * GIB, stat=stat)
    binding = memory_report(machine.root).binding
    assert binding.source.endswith("sys/fs/cgroup/user/job/memory.max")
    assert binding.reclaimable_bytes == 4 * GIB - GIB // 2
    assert binding.available_bytes == 10 * GIB - (8 * GIB - (4 * GIB - GIB // 2))


def test_the_tightest_ancestor_binds(machine: FakeMachine) -> None:
    machine.process("0::/a/b/c\n", V2_MOUNT.format(mounted="/", at="/sys/fs/cgroup"))
    machine.v2("sys/fs/cgroup/a/b/c", maximum=str(30 * GIB))
    machine.v2("sys/fs/cgroup/a/b")
    machine.v2("sys/fs/cgroup/a", maximum=str(20 * GIB), used=17 * GIB)
    report = memory_report(machine.root)
    assert report.available_bytes == 3 * GIB
    assert report.binding.source.endswith("sys/fs/cgroup/a/memory.max")
    assert len(report.limits) == 3


def test_memory_high_counts_as_a_limit(machine: FakeMachine) -> None:
    machine.process("0::/job\n", V2_MOUNT.format(mounted="/", at="/sys/fs/cgroup"))
    machine.v2("sys/fs/cgroup/job", maximum=str(9 * GIB), high=str(7 * GIB), used=GIB)
    binding = memory_report(machine.root).binding
    assert binding.available_bytes == 6 * GIB
    assert binding.source.endswith("memory.high")


def test_v1_limit_of_an_ancestor_uses_hierarchical_counts(machine: FakeMachine) -> None:
    machine.process(
        "9:name=systemd:/\n4:memory:/box/inner\n0::/\n", V1_MOUNT.format(mounted="/", at="/sys/fs/cgroup/memory")
    )
    machine.v1("sys/fs/cgroup/memory/box/inner")
    stat = f"inactive_file 7\ntotal_inactive_file {2 * GIB}\ntotal_active_file 0\ntotal_dirty 0\n"
    machine.v1("sys/fs/cgroup/memory/box", limit=12 * GIB, used=11 * GIB, stat=stat)
    machine.v1("sys/fs/cgroup/memory")
    report = memory_report(machine.root)
    assert report.available_bytes == 3 * GIB
    assert report.binding.source.endswith("box/memory.limit_in_bytes")
    assert len(report.limits) == 2, "unlimited groups are no bounds"


def test_hybrid_reads_the_hierarchy_that_has_the_memory_controller(machine: FakeMachine) -> None:
    mounts = V1_MOUNT.format(mounted="/", at="/sys/fs/cgroup/memory") + V2_MOUNT.format(
        mounted="/", at="/sys/fs/cgroup/unified"
    )
    machine.process("4:cpu,memory:/job\n0::/job\n", mounts)
    machine.v1("sys/fs/cgroup/memory/job", limit=5 * GIB, used=GIB)
    machine.write("sys/fs/cgroup/unified/job/cgroup.procs", "1\n")
    assert available_bytes(machine.root) == 4 * GIB


@pytest.mark.parametrize(
    ("path", "mounted"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../other", "/"), ("/elsewhere", "/docker/abc")],
    ids=["host namespace", "own namespace", "outside of the namespace", "unrelated mount"],
)
@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_the_mount_point_is_the_group(
    machine: FakeMachine, path: str, mounted: str, version: int
) -> None:
    if version == 1:
        machine.process(f"4:memory:{path}\n", V1_MOUNT.format(mounted=mounted, at="/sys/fs/cgroup/memory"))
        machine.v1("sys/fs/cgroup/memory", limit=2 * GIB, used=GIB)
    else:
        machine.process(f"0::{path}\n", V2_MOUNT.format(mounted=mounted, at="/sys/fs/cgroup"))
        machine.v2("sys/fs/cgroup", maximum=str(2 * GIB), used=GIB)
    assert available_bytes(machine.root) == GIB


def test_a_mount_point_with_a_blank_is_found(machine: FakeMachine) -> None:
    machine.process("0::/job\n", V2_MOUNT.format(mounted="/", at=r"/my\040groups"))
    machine.v2("my groups/job", maximum=str(GIB))
    assert available_bytes(machine.root) == GIB


STALLS = "some avg10={avg10} avg60=99.00 avg300=99.00 total=1\nfull avg10=77.00 avg60=0.00 avg300=0.00 total=0\n"


def test_stalls_are_read_where_the_bound_is(machine: FakeMachine) -> None:
    machine.process("0::/a/b\n", V2_MOUNT.format(mounted="/", at="/sys/fs/cgroup"))
    machine.v2("sys/fs/cgroup/a/b", maximum=str(30 * GIB))
    machine.v2("sys/fs/cgroup/a", maximum=str(20 * GIB))
    machine.write("proc/pressure/memory", STALLS.format(avg10="12.50"))
    machine.write("sys/fs/cgroup/a/memory.pressure", STALLS.format(avg10="0.00"))
    assert [limit.stalled for limit in memory_report(machine.root).limits] == [0.125, None, 0.0]
    machine.write("proc/pressure/memory", "")
    assert memory_report(machine.root).limits[0].stalled is None


@pytest.mark.parametrize(("overcommit", "free"), [("0\n", True), ("1\n", True), ("2\n", False)])
def test_address_space_is_not_free_where_it_counts_as_memory(machine: FakeMachine, overcommit: str, free: bool) -> None:
    machine.write("proc/sys/vm/overcommit_memory", overcommit)
    assert (why_no_reservation(machine.root) is None) == free


def test_address_space_is_not_free_where_it_is_limited() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30));"
        "from moert.tiers.memory import why_no_reservation; print(why_no_reservation())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "limited to 8.0 GiB (ulimit -v)" in child.stdout


def test_an_overdrawn_group_leaves_nothing(machine: FakeMachine) -> None:
    machine.process("0::/job\n", V2_MOUNT.format(mounted="/", at="/sys/fs/cgroup"))
    machine.v2("sys/fs/cgroup/job", maximum=str(GIB), used=2 * GIB)
    assert available_bytes(machine.root) == 0


def test_a_report_names_numbers_for_people(machine: FakeMachine) -> None:
    machine.process("0::/job\n", V2_MOUNT.format(mounted="/", at="/sys/fs/cgroup"))
    machine.v2("sys/fs/cgroup/job", maximum=str(8 * GIB), used=5 * GIB)
    text = str(memory_report(machine.root).binding)
    assert "3.0 GiB available" in text
    assert "8.0 GiB" in text
    assert "job/memory.max" in text


def test_without_proc_another_source_answers(tmp_path: Path) -> None:
    assert 0 < available_bytes(tmp_path) < 1 << 50


def test_on_this_machine_never_more_than_the_kernel_says() -> None:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(fields["MemTotal"].split()[0]) << 10
    assert 0 < available_bytes() <= total


def test_resident_bytes_follow_what_is_touched() -> None:
    gc.collect()
    before = rss_bytes()
    nbytes = 64 << 20
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for offset in range(0, nbytes, 4096):
            block[offset] = 1
        during = rss_bytes()
    assert 0.9 * nbytes < during - before < 1.5 * nbytes
    # The kernel counts pages per CPU and adds them up lazily.
    assert peak_rss_bytes() >= during - (4 << 20)


def test_the_peak_is_not_inherited_from_the_parent() -> None:
    """ru_maxrss would be: it survives fork and exec."""
    nbytes = 256 << 20
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for offset in range(0, nbytes, 4096):
            block[offset] = 1
        code = "from moert.tiers.memory import peak_rss_bytes; print(peak_rss_bytes())"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(child.stdout) < nbytes
