"""A disk that is held to so many bytes a second for this process: an I/O cgroup of our own, version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cgroup import folders

from moert.errors import CapacityError, ConfigError

_FILES = {1: ("blkio.throttle.read_bps_device", "{disk} {rate}"), 2: ("io.max", "{disk} rbps={rate}")}


def disk_of(path: Path) -> str:
    """The numbers, `MAJOR:MINOR`, of the whole disk that holds `path`.

    Raises:
        ConfigError: its file system is on no disk of its own.
    """
    device = os.stat(path).st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    known = Path("/sys/dev/block") / numbers
    if not known.exists():
        raise ConfigError(f"{path} is on device {numbers}, which is no disk whose reads can be limited")
    if (known / "partition").exists():
        numbers = (known.resolve().parent / "dev").read_text().strip()
    return numbers


@contextlib.contextmanager
def slow_disk(path: Path, bytes_per_s: int) -> Iterator[None]:
    """Until the end this process, all of its threads, reads the disk of `path` at so many bytes a second at most.

    Reads past the page cache are held to it, those through it where the kernel counts them.

    Raises:
        CapacityError: this process may make no such group anywhere; the reasons are listed.
        ConfigError: see `disk_of`.
    """
    disk, reasons = disk_of(path), []
    for version, parent in folders("blkio"):
        group = parent / f"moert-bench-{os.getpid()}-{time.monotonic_ns()}"
        name, line = _FILES[version]
        try:
            group.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        try:
            (group / name).write_text(line.format(disk=disk, rate=bytes_per_s))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            group.rmdir()
            reasons.append(f"{group}/{name}: {error.strerror}")
            continue
        try:
            yield
        finally:
            (parent / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()
        return
    raise CapacityError(f"no group that limits reads can be made here ({'; '.join(reasons) or 'none is mounted'})")
