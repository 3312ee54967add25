"""Files that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from moert.config import format_bytes
from moert.errors import TransferError

UNFINISHED = ".unfinished"
"""What the name of a file ends in until it is complete."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DurableFile:
    """A file of known size, written in any order under an unfinished name; `commit` gives it its own.

    Its room on disk is taken when it is made, so a full disk is met there. Not thread-safe.

    Raises:
        TransferError: it cannot be made, or the disk is full.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._unfinished = unfinished(path)
        self._fd = -1
        try:
            self._fd = os.open(self._unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, nbytes)
            if nbytes:
                os.posix_fallocate(self._fd, 0, nbytes)
        except OSError as error:
            self.close()
            raise cannot_write(error, path, nbytes) from error

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`. Blocks.

        Raises:
            TransferError: the disk failed.
        """
        left = memoryview(data)
        try:
            while left:
                count = os.pwrite(self._fd, left, offset)
                left, offset = left[count:], offset + count
        except OSError as error:
            raise cannot_write(error, self.path, self.nbytes) from error

    def commit(self) -> None:
        """Make what was written last through a power failure, then give the file its name. Blocks.

        Raises:
            TransferError: the disk failed; the file does not have its name.
        """
        try:
            os.fsync(self._fd)
            # The pages are of no more use here, and a container pays for them.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self.close()
            os.rename(self._unfinished, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(error, self.path, self.nbytes) from error

    def close(self) -> None:
        """Close the file and leave it as it is. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def unfinished(path: Path) -> Path:
    """The name of a file before it is complete."""
    return path.with_name(path.name + UNFINISHED)


def write_whole(path: Path, data: bytes) -> None:
    """Put a small file in the place of whatever has its name; blocks until it would outlast a power failure.

    Raises:
        TransferError: it cannot be written; what was there before still is.
    """
    with DurableFile(path, len(data)) as file:
        file.write(data, 0)
        file.commit()


def reserve(folder: Path, sizes: Mapping[str, int]) -> None:
    """Take the room for files that `DurableFile` will write into `folder`; all of it or none.

    Raises:
        TransferError: the disk is full, with the numbers, or the folder cannot be written.
    """
    wanted = sum(sizes.values())
    had = sum(_allocated_bytes(unfinished(folder / name)) for name in sizes)
    room = _free_bytes(folder)
    try:
        if wanted - had > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, nbytes in sizes.items():
            try:
                DurableFile(folder / name, nbytes).close()
            except TransferError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0)) from error
    except OSError as error:
        release(folder, sizes)
        raise cannot_write(error, folder, wanted) from error


def release(folder: Path, names: Iterable[str]) -> None:
    """Remove what is unfinished of these files."""
    for name in names:
        with contextlib.suppress(OSError):
            unfinished(folder / name).unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power failure. Blocks; raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def cannot_write(error: OSError, path: Path, nbytes: int) -> TransferError:
    """What a user is told where `nbytes` could not be written to `path`."""
    folder = path if path.is_dir() else path.parent
    hint = "give another place, or make this one writable"
    if error.errno in _FULL:
        hint = f"{format_bytes(_free_bytes(folder))} are free: make room, or give a place on another disk"
        if error.errno == errno.EFBIG:
            hint = "files here may not be that large (file system, or `ulimit -f`): give another place"
    return TransferError(error.errno, f"{error.strerror}: cannot write {format_bytes(nbytes)}; {hint}", str(path))


def _free_bytes(folder: Path) -> int:
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _allocated_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
