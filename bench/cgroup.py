"""A hard memory limit for one child process: a memory cgroup of our own, version 1 or 2, made and removed here."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moert.errors import CapacityError

JOIN_THEN_RUN = 'echo $$ > "$0"/cgroup.procs && exec "$@"'


@dataclass(frozen=True)
class _Files:
    """Where one version of the controller keeps its numbers."""

    limit: str
    swap_limit: str
    peak: str
    events: str


FILES = {
    1: _Files(
        "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"
    ),
    2: _Files("memory.max", "memory.swap.max", "memory.peak", "memory.events"),
}


@dataclass(frozen=True)
class MemoryGroup:
    """A group whose processes together get `limit_bytes` of memory, page cache included, and no swap."""

    path: Path
    version: int
    limit_bytes: int

    def command(self, arguments: list[str]) -> list[str]:
        """`arguments`, run inside the group from its first instruction on (the process id stays the child's)."""
        return ["/bin/sh", "-c", JOIN_THEN_RUN, str(self.path), *arguments]

    @property
    def peak_bytes(self) -> int | None:
        """The most the group has used, page cache included; None where the kernel does not tell (before 5.19 on v2)."""
        try:
            return int((self.path / FILES[self.version].peak).read_text())
        except FileNotFoundError:
            return None

    @property
    def oom_kills(self) -> int:
        """Processes of the group that the kernel killed for going over the limit."""
        lines = (self.path / FILES[self.version].events).read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def memory_folders() -> list[tuple[int, Path]]:
    """`folders` of memory."""
    return folders("memory")


def folders(controller: str) -> list[tuple[int, Path]]:
    """(version, folder) of every group a sub-group may be made in: our own group first, then its ancestors.

    Args:
        controller: what version 1 calls it; version 2 has all of them in one place.
    """
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own[2] = path
        elif controller in controllers.split(","):
            own[1] = path
    folders = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split()[:3]
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version is None or version not in own or (version == 1 and controller not in options.split(",")):
            continue
        inside = os.path.relpath(own[version], root) if own[version].startswith(root) else "."
        folder = Path(os.path.normpath(os.path.join(mount, inside)))
        folders += [(version, place) for place in (folder, *folder.parents) if place.is_relative_to(mount)]
    return folders


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group limited to `limit_bytes`; at the end its processes are killed and it is removed.

    Raises:
        CapacityError: this process may not make a limited group anywhere; the reasons are listed.
    """
    reasons = []
    for version, parent in memory_folders():
        path = parent / f"moert-bench-{os.getpid()}-{time.monotonic_ns()}"
        try:
            path.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        try:
            (path / FILES[version].limit).write_text(str(limit_bytes))
            _forbid_swap(path, version, limit_bytes)
        except OSError as error:
            path.rmdir()
            reasons.append(f"{path}/{FILES[version].limit}: {error.strerror}")
            continue
        try:
            yield MemoryGroup(path, version, limit_bytes)
        finally:
            _remove(path)
        return
    raise CapacityError(f"no memory cgroup can be made here ({'; '.join(reasons) or 'none is mounted'})")


def _forbid_swap(path: Path, version: int, limit_bytes: int) -> None:
    file = path / FILES[version].swap_limit
    if file.exists():
        # Version 1 limits memory and swap together, version 2 swap alone.
        file.write_text(str(limit_bytes if version == 1 else 0))


def _remove(path: Path, patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        for process in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
