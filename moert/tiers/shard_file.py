"""One checkpoint file, read past the page cache where the file system can."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moert.errors import CorruptFileError, MoertError, TransferError

BLOCK_BYTES = 4096
"""Alignment of O_DIRECT offsets, lengths and addresses: enough for 512-byte and 4Kn drives."""

_NO_DIRECT = (errno.EINVAL, errno.ENOTSUP)


class FileIdentity(NamedTuple):
    """What tells one state of a file from another. Times are as fine as the file system's clock, often 1 to 4 ms."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _clear_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


@dataclass(frozen=True)
class FileCalls:
    """The operating system as a `ShardFile` sees it; tests put their own in."""

    open: Callable[[str, int], int] = os.open
    preadv: Callable[[int, Sequence[memoryview], int], int] = os.preadv
    fstat: Callable[[int], os.stat_result] = os.fstat
    clear_direct: Callable[[int], None] = _clear_direct


OS_CALLS = FileCalls()


class DirectWindow(NamedTuple):
    """A read that the system can be asked for as it is: `nbytes` at `begin` of `fd` to `address`, all in whole blocks.

    At the file's end fewer bytes come, but no fewer than `needed`. `memory` keeps the address valid.
    """

    fd: int
    begin: int
    nbytes: int
    needed: int
    address: int
    memory: object


def window_bytes(offset: int, nbytes: int) -> int:
    """Buffer bytes that a read of `nbytes` at `offset` needs: the record, rounded out to whole blocks on both sides."""
    return _round_up(offset + nbytes) - offset // BLOCK_BYTES * BLOCK_BYTES


class ShardFile:
    """A file open for positional reads of records; many threads may read at once.

    Opened with O_DIRECT. Where the file system refuses that, at the opening or at the first read, the file is read
    through the page cache and dropped from it again; `direct` tells which, and a RuntimeWarning says so once per file
    system. Never mapped: a truncated file under a mapping kills the process.

    The file's identity at the opening is remembered, and every read checks it, so a file that is truncated or
    overwritten in place while in use raises. A file replaced by rename stays readable here as it was.

    Raises:
        TransferError: the file cannot be opened; `errno` and `filename` say why.
    """

    def __init__(self, path: str | os.PathLike[str], *, direct: bool = True, calls: FileCalls = OS_CALLS) -> None:
        self.path = Path(path)
        self.direct = direct
        self._calls = calls
        self._own_calls = calls != OS_CALLS
        self._lock = threading.Lock()
        self._readers = 0
        self._closed = False
        try:
            self._fd = self._open()
            self._owner = _owner(self._fd)
        except OSError as error:
            raise TransferError(error.errno, f"cannot open: {error.strerror}", str(self.path)) from error
        self.identity = FileIdentity.of(calls.fstat(self._fd))
        if not self.direct:
            self._advise(os.POSIX_FADV_RANDOM)
        if direct and not self.direct:
            _warn_buffered(self)

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self.identity.size

    @property
    def closed(self) -> bool:
        return self._closed

    window_bytes = staticmethod(window_bytes)

    def read(self, offset: int, nbytes: int, buffer: memoryview) -> int:
        """Read bytes [offset, offset + nbytes) of the file and return where they start in `buffer`.

        `buffer` is writable, owned by the caller, starts at a multiple of 4096 and has at least `window_bytes(offset,
        nbytes)` bytes. The record starts at `offset % 4096` in it; the bytes around the record are undefined. Blocks,
        without the GIL while the disk works. Either the whole record is there on return, or this raises.

        Raises:
            CorruptFileError: the file is shorter than the record asks for, or was changed since it was opened.
            TransferError: the disk failed (an EIO is tried once more first).
            MoertError: the file is closed.
            ValueError: `buffer` is too small or misaligned, or the range cannot be.
        """
        if offset < 0 or nbytes <= 0:
            raise ValueError(f"{self.path}: {nbytes} bytes at {offset} are no record")
        if offset + nbytes > self.size:
            raise CorruptFileError(
                f"{self.path}: a record of {nbytes} bytes at {offset} ends at {offset + nbytes}, the file has "
                f"{self.size} bytes; it is incomplete or its index belongs to another file"
            )
        if len(buffer) < window_bytes(offset, nbytes):
            raise ValueError(
                f"{self.path}: {nbytes} bytes at {offset} need a buffer of {window_bytes(offset, nbytes)} bytes, "
                f"not {len(buffer)}"
            )
        begin = offset // BLOCK_BYTES * BLOCK_BYTES
        self.begin_use()
        try:
            self._read_window(begin, offset + nbytes, buffer)
            self._check_unchanged()
        finally:
            self.end_use()
        return offset - begin

    def direct_window(self, offset: int, nbytes: int, buffer: memoryview) -> DirectWindow | None:
        """What `read` would ask the system for, for somebody who asks it himself; None where it takes more than that.

        He does so between `begin_use` and `end_use`, checks that the file is still `identity` when he has the bytes,
        and leaves it to `read` if anything goes wrong.
        """
        if self._own_calls or not self.direct or self._closed or offset < 0 or nbytes <= 0:
            return None
        window = window_bytes(offset, nbytes)
        if offset + nbytes > self.size or len(buffer) < window:
            return None
        try:
            memory = ctypes.c_char.from_buffer(buffer)
        except (TypeError, ValueError, BufferError):
            return None
        address = ctypes.addressof(memory)
        if address % BLOCK_BYTES:
            return None
        begin = offset // BLOCK_BYTES * BLOCK_BYTES
        return DirectWindow(self._fd, begin, window, offset + nbytes - begin, address, memory)

    def begin_use(self) -> None:
        """Keep the descriptor open until `end_use`, whoever closes the file.

        Raises:
            MoertError: it is closed.
        """
        with self._lock:
            if self._closed:
                raise MoertError(f"{self.path} is closed; load or patch the model again")
            self._readers += 1

    def end_use(self) -> None:
        """Once for each `begin_use`."""
        with self._lock:
            self._readers -= 1
            last = self._closed and self._readers == 0
        if last:
            self._owner.close()

    def close(self) -> None:
        """Close the file, once the reads in flight have ended. Does not wait for them. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle = self._readers == 0
        # The number of a closed descriptor may belong to another file a moment later, so the last reader closes.
        if idle:
            self._owner.close()

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ShardFile({str(self.path)!r}, {self.size} bytes, {'direct' if self.direct else 'buffered'})"

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.direct:
            try:
                return self._calls.open(str(self.path), flags | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
                self.direct = False
        return self._calls.open(str(self.path), flags)

    def _read_window(self, begin: int, end: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `begin` (a block's start) to at least `end`."""
        got = 0
        need = end - begin
        retried = False
        while got < need:
            direct = self.direct
            want = _round_up(need) if direct else need
            try:
                count = self._calls.preadv(self._fd, [buffer[got:want]], begin + got)
            except InterruptedError:
                continue
            except OSError as error:
                if direct and error.errno in _NO_DIRECT:
                    self._fall_back(buffer)
                elif error.errno == errno.EIO and not retried:
                    retried = True
                else:
                    raise self._failed(error, begin + got, want - got) from error
                continue
            # A direct read resumes at a block's start only; what was read of the block before is read again.
            reached = got + count
            if direct and reached < need:
                reached -= reached % BLOCK_BYTES
            if reached <= got:
                self._check_unchanged()
                raise TransferError(
                    errno.EIO,
                    f"short read: {got + count} of {need} bytes at {begin}, in a file of {self.size} bytes",
                    str(self.path),
                )
            got = reached
        if not self.direct:
            self._advise(os.POSIX_FADV_DONTNEED, begin, need)

    def _fall_back(self, buffer: memoryview) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        if address % BLOCK_BYTES:
            raise ValueError(f"{self.path}: buffer address {address:#x} is not a multiple of {BLOCK_BYTES}")
        with self._lock:
            first = self.direct
            if first:
                # On the open descriptor, not by opening the path again: that may name another file by now.
                self._calls.clear_direct(self._fd)
                self._advise(os.POSIX_FADV_RANDOM)
                self.direct = False
        if first:
            _warn_buffered(self)

    def _advise(self, advice: int, offset: int = 0, nbytes: int = 0) -> None:
        # Experts come in no order, so what the kernel reads ahead or keeps is only memory taken from the arena.
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, offset, nbytes, advice)

    def _check_unchanged(self) -> None:
        now = FileIdentity.of(self._calls.fstat(self._fd))
        if now != self.identity:
            raise CorruptFileError(
                f"{self.path} was changed while it was in use: {_changes(self.identity, now)}; "
                "restore the file and load the model again"
            )

    def _failed(self, error: OSError, offset: int, nbytes: int) -> TransferError:
        return TransferError(error.errno, f"{error.strerror} reading {nbytes} bytes at {offset}", str(self.path))


def _owner(fd: int) -> io.FileIO:
    """What closes a descriptor when it is forgotten, whatever interrupted who should have closed it."""
    try:
        return io.FileIO(fd)
    except OSError:  # a folder
        os.close(fd)
        raise


def _round_up(nbytes: int) -> int:
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def _changes(old: FileIdentity, new: FileIdentity) -> str:
    changes = []
    for name, before, after in zip(old._fields, old, new, strict=True):
        if before != after:
            if name == "mtime_ns":
                changes.append(f"modified {_timestamp(before)} -> {_timestamp(after)}")
            else:
                changes.append(f"{name} {before} -> {after}")
    return ", ".join(changes)


def _timestamp(mtime_ns: int) -> str:
    seconds, nanoseconds = divmod(mtime_ns, 10**9)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{nanoseconds:09d}"


_warned_devices: set[int] = set()
_warned_lock = threading.Lock()


def _warn_buffered(file: ShardFile) -> None:
    with _warned_lock:
        if file.identity.device in _warned_devices:
            return
        _warned_devices.add(file.identity.device)
    warnings.warn(
        f"{file.path}: this file system cannot read past the page cache (O_DIRECT); reading through it costs more CPU. "
        "Put the checkpoint on a local ext4, xfs or btrfs disk for full speed",
        RuntimeWarning,
        stacklevel=2,
    )
