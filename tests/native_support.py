"""Records that the extension's own threads read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from moert import _C
from moert.tiers.disk import ReadHandle, ShardFile
from moert.tiers.native_reads import NativeHandle


@contextlib.contextmanager
def unreadable(file: ShardFile) -> Iterator[None]:
    """Its descriptor cannot be read from meanwhile."""
    good, bad = os.dup(file._fd), os.open(file.path.with_suffix(".bad"), os.O_WRONLY | os.O_CREAT)
    os.dup2(bad, file._fd, inheritable=False)
    try:
        yield
    finally:
        os.dup2(good, file._fd, inheritable=False)
        os.close(good)
        os.close(bad)


def await_native(handle: ReadHandle) -> None:
    """Until the extension is done with it."""
    assert isinstance(handle, NativeHandle)
    while _C.record_state(handle._record) == 0:
        pass
