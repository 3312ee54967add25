"""Calibrations in the user's cache folder: found by machine and shape, and used only if both are the right ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from moert.calibration.result import Calibration, Fingerprint, Shape, difference, from_dict
from moert.errors import CorruptFileError, TransferError
from moert.tiers.durable import write_whole


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/moert/calibration`, or below `~/.cache`; it need not be there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moert" / "calibration"


def path_of(fingerprint: Fingerprint, shape: Shape, folder: Path | None = None) -> Path:
    """Where the calibration of a shape on a machine is, if there is one."""
    keys = [
        hashlib.sha256(json.dumps(asdict(one), sort_keys=True).encode()).hexdigest() for one in (fingerprint, shape)
    ]
    return (folder or default_folder()) / f"{shape.architecture}-{keys[0][:8]}-{keys[1][:8]}.json"


def make_folder(folder: Path | None = None) -> Path:
    """Make the folder of calibrations unless it is there, and return it.

    Raises:
        TransferError: it cannot be made, or nothing can be written into it.
    """
    path = folder or default_folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TransferError(error.errno, f"{error.strerror}; cannot make the folder", str(path)) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise TransferError(errno.EACCES, f"{os.strerror(errno.EACCES)}; cannot write into the folder", str(path))
    return path


def save(calibration: Calibration, folder: Path | None = None) -> Path:
    """Write it where `load` looks, in the place of what was there; blocks until it would outlast a power failure.

    Raises:
        TransferError: it cannot be written; what was there before still is.
    """
    path = path_of(calibration.fingerprint, calibration.shape, make_folder(folder))
    write_whole(path, (json.dumps(calibration.as_dict(), indent=1) + "\n").encode())
    return path


def read(path: Path, fingerprint: Fingerprint, shape: Shape) -> Calibration:
    """The calibration in a file.

    Raises:
        CorruptFileError: it is broken or partial, or of another machine or another model; it says which.
        TransferError: it cannot be read.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise TransferError(error.errno, f"{error.strerror}; cannot read it", str(path)) from error
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON, or only a part of it ({error}); calibrate again") from error
    try:
        found = from_dict(document)
    except CorruptFileError as error:
        raise CorruptFileError(f"{path} {error}; calibrate again") from error
    other = difference(fingerprint, found.fingerprint)
    if other:
        raise CorruptFileError(f"{path} is of another machine ({other}); calibrate on this one")
    other = difference(shape, found.shape)
    if other:
        raise CorruptFileError(f"{path} is of another model ({other}); calibrate with this one")
    return found


def load(fingerprint: Fingerprint, shape: Shape, folder: Path | None = None) -> Calibration | None:
    """The calibration of a shape on a machine; None: there is none yet.

    Raises:
        CorruptFileError, TransferError: as `read`.
    """
    path = path_of(fingerprint, shape, folder)
    return read(path, fingerprint, shape) if path.exists() else None


def find(expert_bytes: int, fingerprint: Fingerprint, folder: Path | None = None) -> Calibration | None:
    """The latest calibration on this machine of any model whose experts are so large; files that are broken or of
    other machines are passed over.

    Args:
        fingerprint: its disk is not looked at: a trace does not say where its model is.
    """
    place = folder or default_folder()
    try:
        paths = sorted(place.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return None
    for path in paths:
        try:
            found = from_dict(json.loads(path.read_bytes()))
        except (CorruptFileError, OSError, ValueError):
            continue
        here = asdict(fingerprint) | {"disk": found.fingerprint.disk}
        if found.shape.expert_bytes == expert_bytes and here == asdict(found.fingerprint):
            return found
    return None
