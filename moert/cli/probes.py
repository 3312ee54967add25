"""What this machine has, part by part, for `moert doctor`. A probe measures or reads; what it cannot, it says."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

Finding = dict[str, Any]

SAMPLE_BYTES = 64 << 20
ARENA_BYTES = 256 << 20
DEFAULT_RECORD_BYTES = 4 << 20
READ_SECONDS = 1.0
READ_DEPTH = 4
STREAM_PASSES = 8
_PACKAGES = ("torch", "transformers", "safetensors", "triton")


def probe(find: Callable[..., Finding], *args: Any, **kwargs: Any) -> Finding:
    """What `find` finds, or `{"problem": why}` where it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a fall-back is part of what is found
            return find(*args, **kwargs)
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}" if str(error) else type(error).__name__}


def versions() -> Finding:
    """Versions of what decides how moert runs; None for what is not installed."""
    from moert import __version__

    found: Finding = {"moert": __version__, "python": platform.python_version(), "system": platform.platform()}
    return {**found, **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu(root: Path = Path("/")) -> Finding:
    """Model, cores and instruction sets; `root` stands for "/"."""
    from moert import _C

    text = (root / "proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    affinity = len(os.sched_getaffinity(0))
    quota = cpu_quota_cores(root)
    threads = _C.pool_info()
    return {
        "model": fields.get("model name") or fields.get("CPU implementer") or platform.machine(),
        "cores_machine": os.cpu_count(),
        "cores_affinity": affinity,
        "cores_quota": quota,
        "cores_usable": affinity if quota is None else max(1, min(affinity, int(quota + 0.5))),
        "features": _C.cpu_features(),
        "kernel": _C.isa(),
        "kernels": _C.isa_names(True).split(),
        "compute_threads": {"count": threads["threads"], "why": threads["why"]},
    }


def cpu_quota_cores(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process's cgroups allow it, the least over all levels; None without a limit."""
    from moert import _C

    quota: float | None = _C.cpu_limits(str(root), sorted(os.sched_getaffinity(0)))["quota_cpus"]
    return quota


def memory(cores: int) -> Finding:
    """What may be taken and which limit binds, whether an arena gets huge pages, and how fast it is read."""
    from moert import _C
    from moert.tiers.arena import HostArena
    from moert.tiers.memory import memory_report

    report = memory_report()
    limits = [
        {
            "source": limit.source,
            "limit_bytes": limit.limit_bytes,
            "used_bytes": limit.used_bytes,
            "reclaimable_bytes": limit.reclaimable_bytes,
            "available_bytes": limit.available_bytes,
        }
        for limit in report.limits
    ]
    setting = _text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    found: Finding = {
        "total_bytes": report.limits[0].limit_bytes,
        "available_bytes": report.available_bytes,
        "binding": report.binding.source,
        "limits": limits,
        "huge_pages": setting[setting.find("[") + 1 : setting.find("]")] if "[" in setting else None,
        "locked_limit_bytes": _locked_limit_bytes(),
    }
    arena = HostArena(min(ARENA_BYTES, max(1 << 20, report.available_bytes // 8)))
    try:
        # The best of several: other work on the machine can only slow a pass down.
        taken_s = min(_C.stream_read(arena.address, arena.nbytes, cores, 1) for _ in range(STREAM_PASSES))
        found["arena_bytes"] = arena.nbytes
        found["arena_huge_bytes"] = _huge_bytes_at(arena.address)
        found["read_bytes_per_s"] = arena.nbytes / taken_s
    finally:
        arena.close()
    return found


def _locked_limit_bytes() -> int | None:
    """How much memory the process may lock; None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _huge_bytes_at(address: int) -> int | None:
    """Bytes in huge pages of the mapping that holds `address`; None where the kernel does not tell."""
    inside = False
    for line in _text(Path("/proc/self/smaps")).splitlines():
        first = line.split(None, 1)[0]
        if "-" in first and not first.endswith(":"):
            begin, _, end = first.partition("-")
            inside = int(begin, 16) <= address < int(end, 16)
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1]) << 10
    return None


def folder_disk(folder: str, record_bytes: int = DEFAULT_RECORD_BYTES) -> Finding:
    """The disk below a folder, measured on a file of 64 MiB that has no name and is gone afterwards.

    The folder need not exist yet; the nearest one above it that does is measured.
    """
    nearest = Path(folder).absolute()
    while not nearest.is_dir() and nearest != nearest.parent:
        nearest = nearest.parent
    found = _file_system(nearest)
    with tempfile.TemporaryFile(dir=nearest) as file:
        piece = os.urandom(1 << 20)
        for _ in range(SAMPLE_BYTES >> 20):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        found.update(_reads([f"/proc/self/fd/{file.fileno()}"], record_bytes))
    return found


def checkpoint_disk(files: Iterable[str], record_bytes: int) -> Finding:
    """The disk below a checkpoint, measured on its own files."""
    paths = list(files)
    sizes = [os.path.getsize(path) for path in paths]
    found = _file_system(Path(paths[0]).resolve().parent)
    found.update(_reads(paths, min(record_bytes, max(sizes))))
    return found


def _reads(paths: list[str], record_bytes: int) -> Finding:
    from moert.tiers.arena import HostArena
    from moert.tiers.disk import BLOCK_BYTES, ShardFile, measure_read_bandwidth

    record_bytes = max(BLOCK_BYTES, record_bytes // BLOCK_BYTES * BLOCK_BYTES)
    arena = HostArena(BLOCK_BYTES)
    try:
        with ShardFile(paths[0]) as file:
            file.read(0, min(BLOCK_BYTES, file.size), arena.view(0, BLOCK_BYTES))
            direct = file.direct
    finally:
        arena.close()
    return {
        "direct": direct,
        "record_bytes": record_bytes,
        "depth": READ_DEPTH,
        "read_bytes_per_s": measure_read_bandwidth(paths, record_bytes, READ_DEPTH, READ_SECONDS),
    }


def _file_system(folder: Path) -> Finding:
    """Kind, device and room of the file system that `folder` is on."""
    place = os.path.realpath(folder)
    best: tuple[str, str, str] = ("", "unknown", "")
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        left, separator, right = line.partition(" - ")
        if separator:
            at = left.split()[4].replace("\\040", " ")
            kind, device, *_ = right.split()
            inside = place == at or place.startswith(at.rstrip("/") + "/")
            if inside and len(at) >= len(best[0]):
                best = (at, kind, device)
    return {
        "path": str(folder),
        "mount": best[0],
        "file_system": best[1],
        "device": best[2],
        "free_bytes": shutil.disk_usage(folder).free,
    }


def devices() -> Finding:
    """The CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this build of torch has no CUDA" if built is None else f"torch (CUDA {built}) finds no device or driver"
        return {"devices": [], "why": why}
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "total_bytes": total,
                "free_bytes": free,
            }
        )
    return {"devices": found, "why": None}


def torch_threads() -> Finding:
    """How many threads torch has, how long they spin after an operation, and what the environment says of it."""
    import torch

    from moert.torch_threads import settings, spinning_s

    return {"count": torch.get_num_threads(), "spinning_s": spinning_s(), "settings": settings()}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
