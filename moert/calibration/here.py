"""What this machine is, as far as its times depend on it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from moert import _C
from moert.calibration.result import Fingerprint
from moert.errors import TransferError


def fingerprint(folder: Path) -> Fingerprint:
    """This machine, with the disk that `folder` is on.

    Raises:
        TransferError: there is no such folder.
    """
    return Fingerprint(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        kernels=_C.isa(),
        threads=_C.threads(),
        memory_bytes=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)) << 30,
        disk=_disk(folder),
        moert=_version("moert"),
        torch=_version("torch"),
        transformers=_version("transformers"),
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "CPU implementer"):
            return value.strip()
    return platform.machine()


def _disk(folder: Path) -> str:
    try:
        device = os.stat(folder).st_dev
    except OSError as error:
        raise TransferError(error.errno, f"{error.strerror}; cannot tell its disk", str(folder)) from error
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == number:
            kind, name, *_ = right.split()
            return f"{kind} on {name}"
    return f"device {number}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
