"""A disk that a benchmark holds to a rate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import mmap, os, sys, time
sys.path.insert(0, sys.argv[1])
from cgroup import folders
from slow_disk import slow_disk

def groups():
    name = f"moert-bench-{os.getpid()}-*"
    return [group for _, parent in folders("blkio") for group in parent.glob(name)]

def seconds(path, size=8 << 20):
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, size)
    begin = time.perf_counter()
    assert os.preadv(file, [buffer], 0) == size
    os.close(file)
    return time.perf_counter() - begin

with slow_disk(sys.argv[2], 8 << 20):
    slow, inside = seconds(sys.argv[2]), len(groups())
print(slow > 0.5, inside, len(groups()), seconds(sys.argv[2]) < slow / 2)
"""


def skip_unless_reads_can_be_limited(path: Path) -> None:
    """Asked of the system itself: whatever else goes wrong is no reason to skip."""
    device = os.stat(path).st_dev
    if not Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").exists():
        pytest.skip(f"{path} is on no disk")
    probe = Path(f"/sys/fs/cgroup/blkio/moert-test-{os.getpid()}")
    try:
        probe.mkdir()
    except OSError as error:
        pytest.skip(f"{probe.parent}, of cgroups of version 1: {error.strerror}")
    rate = probe / "blkio.throttle.read_bps_device"
    try:
        rate.write_text(f"{os.major(device)}:{os.minor(device)} {1 << 40}")
    except OSError as error:
        pytest.skip(f"{rate}: {error.strerror}")
    finally:
        probe.rmdir()


def test_reads_are_held_to_the_rate_until_the_end(tmp_path: Path) -> None:
    skip_unless_reads_can_be_limited(tmp_path)
    (tmp_path / "file").write_bytes(bytes(8 << 20))
    bench = str(Path(__file__).parents[1] / "bench")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, bench, str(tmp_path / "file")], capture_output=True, text=True, timeout=120
    )
    assert (child.returncode, child.stdout) == (0, "True 1 0 True\n"), child.stderr


def test_what_is_on_no_disk_is_refused(bench_on_path: None) -> None:
    import slow_disk

    from moert.errors import ConfigError

    with pytest.raises(ConfigError, match=r"/proc is on device \d+:\d+, which is no disk"):
        slow_disk.disk_of(Path("/proc"))
