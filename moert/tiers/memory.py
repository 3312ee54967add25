"""How much memory this process may still take: the machine's and that of every cgroup above the process."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moert.config import format_bytes

# What a v1 file reads where no limit is set is 2^63 rounded down to a page; nothing real comes near half of that.
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class MemoryLimit:
    """One bound on this process's memory.

    `source` is the file that states it. Of the `used_bytes` counted against `limit_bytes`, `reclaimable_bytes` are
    clean file cache, which the kernel gives up before it kills anything.
    """

    source: str
    limit_bytes: int
    used_bytes: int
    reclaimable_bytes: int
    stalled: float | None = None
    """Share of the last 10 s in which some task under this bound waited for memory; None where the kernel does not
    tell."""

    @property
    def available_bytes(self) -> int:
        """What can still be taken under this bound, never negative."""
        return max(0, self.limit_bytes - max(0, self.used_bytes - self.reclaimable_bytes))

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.available_bytes)} available: {self.source} allows {format_bytes(self.limit_bytes)}, "
            f"{format_bytes(self.used_bytes)} used, {format_bytes(self.reclaimable_bytes)} of it reclaimable cache"
        )


@dataclass(frozen=True)
class MemoryReport:
    """Every bound found, the machine's own first."""

    limits: tuple[MemoryLimit, ...]

    @property
    def binding(self) -> MemoryLimit:
        """The bound that leaves least."""
        return min(self.limits, key=lambda limit: limit.available_bytes)

    @property
    def available_bytes(self) -> int:
        """What the binding bound leaves."""
        return self.binding.available_bytes


def available_bytes(root: Path | str = "/") -> int:
    """Bytes this process can still take: the least over MemAvailable and every cgroup from its own up to the root.

    It is a moment's reading and holds no head-room; callers keep a share free. `root` stands for "/" and lets a test
    offer its own `proc` and `sys/fs/cgroup`.
    """
    return memory_report(root).available_bytes


def memory_report(root: Path | str = "/") -> MemoryReport:
    """All bounds behind `available_bytes`, with their numbers, for `moert doctor`."""
    base = Path(root)
    return MemoryReport((_machine_limit(base), *_cgroup_limits(base)))


def why_no_reservation(root: Path | str = "/") -> str | None:
    """Why address space that holds no memory would cost something here; None where it is free, as it mostly is."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"the address space of this process is limited to {format_bytes(limit)} (ulimit -v)"
    if _read_text(Path(root) / "proc/sys/vm/overcommit_memory").strip() == "2":
        return "this machine counts address space as memory (vm.overcommit_memory is 2)"
    return None


def rss_bytes() -> int:
    """Resident bytes of this process now."""
    return _own_status_bytes("VmRSS") or _psutil_rss_bytes()


def peak_rss_bytes() -> int:
    """Most resident bytes this process has had since it started its program."""
    # Not ru_maxrss first: it survives exec, so a small program started by a big one would inherit the big one's peak.
    return _own_status_bytes("VmHWM") or _ru_maxrss_bytes()


def _machine_limit(root: Path) -> MemoryLimit:
    path = root / "proc/meminfo"
    fields = _read_fields(path)
    if "MemAvailable" not in fields:
        import psutil

        memory = psutil.virtual_memory()
        return MemoryLimit("psutil.virtual_memory", memory.total, memory.total - memory.available, 0)
    # MemAvailable counts reclaimable cache as free already.
    total, available = (fields[name] << 10 for name in ("MemTotal", "MemAvailable"))
    return MemoryLimit(str(path), total, total - available, 0, _read_stalled(root / "proc/pressure/memory"))


def _cgroup_limits(root: Path) -> Iterator[MemoryLimit]:
    mounts = _cgroup_mounts(root)
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        for mount in mounts:
            if mount.version == version:
                for folder in mount.folders_up_from(path):
                    limit = _limit_v1(folder) if version == 1 else _limit_v2(folder)
                    if limit is not None:
                        yield limit


@dataclass(frozen=True)
class _CgroupMount:
    version: int
    mounted: str
    """Path within the hierarchy that is mounted: "/", or the container's own group."""
    at: Path

    def folders_up_from(self, path: str) -> Iterator[Path]:
        """The folders of the group `path` and of all its visible ancestors, innermost first."""
        mounted = self.mounted.rstrip("/")
        inside = path == mounted or path.startswith(f"{mounted}/")
        # A path from another cgroup namespace cannot be found here; the mount point is then the nearest known ancestor.
        parts = [part for part in path[len(mounted) :].split("/") if part] if inside else []
        for depth in range(len(parts), -1, -1):
            yield self.at.joinpath(*parts[:depth])


def _cgroup_mounts(root: Path) -> list[_CgroupMount]:
    mounts = []
    for line in _read_text(root / "proc/self/mountinfo").splitlines():
        # 36 35 98:0 /mounted/path /mount/point rw,noatime master:1 - cgroup cgroup rw,memory
        left, separator, right = line.partition(" - ")
        if not separator:
            continue
        mounted, at = (_unescape(field) for field in left.split()[3:5])
        kind, _, options = right.split(" ", 2)
        place = root / at.lstrip("/")
        if kind == "cgroup2":
            mounts.append(_CgroupMount(2, mounted, place))
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts.append(_CgroupMount(1, mounted, place))
    return mounts


def _limit_v2(folder: Path) -> MemoryLimit | None:
    # Above memory.high the kernel throttles rather than kills, which for a pre-faulted arena is no better.
    bounds = [
        (value, name) for name in ("memory.max", "memory.high") if (value := _read_int(folder / name)) is not None
    ]
    used = _read_int(folder / "memory.current")
    if not bounds or used is None:
        return None
    limit, name = min(bounds)
    stat = _read_fields(folder / "memory.stat")
    reclaimable = _clean_file_cache_bytes(stat, "file_dirty", "file_writeback")
    return MemoryLimit(str(folder / name), limit, used, reclaimable, _read_stalled(folder / "memory.pressure"))


def _limit_v1(folder: Path) -> MemoryLimit | None:
    limit = _read_int(folder / "memory.limit_in_bytes")
    used = _read_int(folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    # usage_in_bytes counts the groups below too, and so do the total_ fields.
    fields = _read_fields(folder / "memory.stat")
    stat = {name.removeprefix("total_"): value for name, value in fields.items() if name.startswith("total_")}
    reclaimable = _clean_file_cache_bytes(stat, "dirty", "writeback")
    return MemoryLimit(str(folder / "memory.limit_in_bytes"), limit, used, reclaimable)


def _clean_file_cache_bytes(stat: dict[str, int], dirty: str, writeback: str) -> int:
    # The active list counts too, as it does in MemAvailable: weights just read through a mapping land there, and not
    # counting them would refuse memory that the kernel hands over at once. tmpfs pages are on neither list.
    cached = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return max(0, cached - stat.get(dirty, 0) - stat.get(writeback, 0))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdigit() else None


def _read_fields(path: Path) -> dict[str, int]:
    """`name value` and `name: value kB` lines."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", _read_text(path), re.MULTILINE)}


def _read_stalled(path: Path) -> float | None:
    """`some avg10=1.23 ...`, in percent."""
    match = re.search(r"^some avg10=(\d+(?:\.\d+)?)", _read_text(path), re.MULTILINE)
    return float(match[1]) / 100 if match else None


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _own_status_bytes(name: str) -> int:
    return _read_fields(Path("/proc/self/status")).get(name, 0) << 10


def _psutil_rss_bytes() -> int:
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)


def _ru_maxrss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
