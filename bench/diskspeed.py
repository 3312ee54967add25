"""The disk's own limit: random reads past the page cache over the files a benchmark reads, by no part of moert."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 4096


@dataclass(frozen=True)
class DiskSpeed:
    """What a measurement found."""

    bytes_per_s: float
    direct: bool
    """False where the file system has no O_DIRECT: the reads then went through the page cache, emptied before."""


def drop_page_cache(paths: list[Path]) -> None:
    """Take the files' clean pages out of the page cache, dirty ones after writing them. Blocks.

    Pages that another process has mapped stay; nothing tells of them.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(paths: list[Path], record_bytes: int, *, depth: int = 4, seconds: float = 3.0) -> DiskSpeed:
    """Read whole records of `record_bytes` at random places, `depth` at once, for about `seconds`.

    Takes `depth` records of memory. Blocks.

    Raises:
        ValueError: no file is as large as a record.
        OSError: a read failed.
    """
    length = -(-record_bytes // BLOCK_BYTES) * BLOCK_BYTES
    sizes = {path: path.stat().st_size for path in paths}
    large = {path: size for path, size in sizes.items() if size >= length}
    if not large:
        raise ValueError(f"no file of {len(paths)} holds a record of {record_bytes} bytes")
    with contextlib.ExitStack() as cleanup:
        direct = all(_can_read_directly(path) for path in large)
        if not direct:
            drop_page_cache(list(large))
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        files = {path: os.open(path, flags) for path in large}
        for descriptor in files.values():
            cleanup.callback(os.close, descriptor)

        read_bytes = [0] * depth
        errors: list[BaseException] = []
        started = time.perf_counter()

        def read_on(worker: int) -> None:
            pick = random.Random(worker)
            try:
                # Private pages, or there are no huge ones, and scattered small ones halve what this disk gives.
                with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer:
                    with contextlib.suppress(OSError):
                        buffer.madvise(mmap.MADV_HUGEPAGE)
                    while time.perf_counter() - started < seconds and not errors:
                        (path,) = pick.choices(list(large), list(large.values()))
                        offset = pick.randint(0, (large[path] - length) // BLOCK_BYTES) * BLOCK_BYTES
                        read_bytes[worker] += _read_whole(files[path], buffer, offset)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=read_on, args=(number,)) for number in range(depth)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        elapsed_s = time.perf_counter() - started
    if errors:
        raise errors[0]
    return DiskSpeed(sum(read_bytes) / elapsed_s, direct)


def _can_read_directly(path: Path) -> bool:
    """Some file systems refuse O_DIRECT when the file is opened, some only when it is read."""
    with mmap.mmap(-1, BLOCK_BYTES) as block:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                return False
            raise
        try:
            return os.preadv(descriptor, [block], 0) > 0
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                return False
            raise
        finally:
            os.close(descriptor)


def _read_whole(descriptor: int, buffer: mmap.mmap, offset: int) -> int:
    done = 0
    with memoryview(buffer) as view:
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"end of file after {done} of {len(view)} bytes at {offset}")
            done += count
    return done
