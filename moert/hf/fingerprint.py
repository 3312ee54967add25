"""What tells one checkpoint from another, and one revision of it from the next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from moert.errors import TransferError
from moert.tiers.safetensors_file import read_entries

SAMPLES = 4096
SAMPLE_BYTES = 4096


def fingerprint(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """The identity of the checkpoint in `folder` whose weights are in `files`. Reads headers and some of the data.

    Returns:
        "fingerprint": a hash of config.json, of the names, headers and sizes of the files, of bytes from the middle of
        its tensors (of each, or of thousands evenly spread), and of the commit where it is in the hub's cache; a copy
        of the checkpoint has the same. "commit" and "files", the latter with sizes and times, for a look at whether
        the very same files have been touched.

    Raises:
        TransferError: a file cannot be read.
    """
    commit = folder.name if folder.parent.name == "snapshots" else None
    state = xxhash.xxh3_128()
    names = {}
    try:
        _add(state, (folder / "config.json").read_bytes())
        _add(state, (commit or "").encode())
        for path in sorted(files):
            status = os.stat(path)
            name = os.path.relpath(path, folder)
            names[name] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
            _add(state, f"{name} {status.st_size}".encode())
            _add_samples(state, path, max(1, SAMPLES // len(files)))
    except OSError as error:
        raise TransferError(error.errno, f"{error.strerror}; cannot read it", str(error.filename or folder)) from error
    return {"fingerprint": state.hexdigest(), "commit": commit, "files": names}


def _add(state: xxhash.xxh3_128, data: bytes) -> None:
    state.update(len(data).to_bytes(8, "little"))
    state.update(data)


def _add_samples(state: xxhash.xxh3_128, path: str, count: int) -> None:
    entries = [entry for entry in read_entries(path).values() if entry.nbytes]
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        _add(state, file.read(header_bytes))
        for entry in entries[:: max(1, -(-len(entries) // count))]:
            file.seek(entry.offset + max(0, entry.nbytes - SAMPLE_BYTES) // 2)
            _add(state, file.read(min(SAMPLE_BYTES, entry.nbytes)))
