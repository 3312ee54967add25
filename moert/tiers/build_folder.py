"""A folder of files that takes its name only once it is complete, and that a later process can go on with."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moert.errors import ConfigError, CorruptFileError, MoertError, TransferError
from moert.tiers.durable import UNFINISHED, cannot_write, sync_folder, write_whole

PARTIAL = ".partial"
REPLACED = ".replaced"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class BuildFolder:
    """A folder on its way to being `target`; made by `building`."""

    def __init__(self, target: Path, manifest_name: str) -> None:
        self.target = target
        self.path = target.with_name(target.name + PARTIAL)
        """Where its files are until it is complete."""
        self._manifest = manifest_name

    def begin(self, manifest: dict[str, Any]) -> None:
        """Take up what an earlier process left, if that was making the same, else start.

        Raises:
            ConfigError: what is there was to become something else, or is not ours.
        """
        found = read_manifest(self.path / self._manifest)
        if found is None:
            strange = [name for name in os.listdir(self.path) if not name.endswith(UNFINISHED)]
            if strange:
                raise ConfigError(
                    f"{self.path} holds {strange[0]!r} and no {self._manifest}, so moert did not make it: move it away"
                )
            write_whole(self.path / self._manifest, manifest_bytes(manifest))
        elif found != manifest:
            differing = ", ".join(sorted(key for key in {*found, *manifest} if found.get(key) != manifest.get(key)))
            raise ConfigError(
                f"{self.path} was begun with other settings or from another model or revision (different: "
                f"{differing}); go on with what it was begun with, or start anew with --restart"
            )

    def discard(self) -> None:
        """Remove all that has been built so far."""
        with contextlib.suppress(OSError):
            _empty(self.path, self._manifest)

    def finish(self) -> None:
        """Put the folder in its place, at once and for good; what was there is removed. Blocks.

        Raises:
            TransferError: it could not be; the folder is complete under its unfinished name.
        """
        try:
            sync_folder(self.path)
            if _is_vacant(self.target):
                os.rename(self.path, self.target)
            else:
                self._remove_replaced()
                _exchange(self.path, self.target, self._replaced)
                os.rename(self.path, self._replaced)
            sync_folder(self.target.parent)
            self._remove_replaced()
        except OSError as error:
            raise TransferError(
                error.errno, f"{error.strerror}: cannot give it the name {self.target}; it is complete", str(self.path)
            ) from error

    @property
    def _replaced(self) -> Path:
        return self.target.with_name(self.target.name + REPLACED)

    def _remove_replaced(self) -> None:
        """Remove the former folder, that of a process which was stopped before it could included."""
        if (self._replaced / self._manifest).is_file():
            _empty(self._replaced, self._manifest)
            os.rmdir(self._replaced)


@contextmanager
def building(
    target: Path, manifest_name: str, *, overwrite: bool = False, restart: bool = False
) -> Iterator[BuildFolder]:
    """A `BuildFolder` for `target` that no other process builds meanwhile.

    Args:
        manifest_name: the file that tells folders of this kind, and what they hold.
        overwrite: a complete folder of the same kind may be there already; it stays until the new one is complete.
        restart: throw away what an earlier process left.

    Raises:
        ConfigError: something is there that is in the way.
        MoertError: another process builds the same.
        TransferError: the place cannot be written.
    """
    # Where the name is a link, the folder behind it is the one to replace.
    folder = BuildFolder(Path(os.path.realpath(target)), manifest_name)
    _check_target(folder.target, manifest_name, overwrite)
    try:
        folder.target.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder.path)
    except OSError as error:
        raise cannot_write(error, folder.path, 0) from error
    try:
        # Another process may have finished since.
        _check_target(folder.target, manifest_name, overwrite)
        if restart:
            _empty(folder.path, manifest_name)
        yield folder
    finally:
        with contextlib.suppress(OSError):
            # Where nothing has been put into it. Once it has its name, another process may have begun anew.
            if os.path.samestat(os.fstat(lock), os.stat(folder.path)):
                os.rmdir(folder.path)
        os.close(lock)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest's contents; None where there is no such file.

    Raises:
        CorruptFileError: it is not JSON.
        TransferError: it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TransferError(error.errno, f"{error.strerror}; cannot read it", str(path)) from error
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} is a JSON {type(found).__name__}, not an object")
    return found


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """A manifest as it is written."""
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def _check_target(target: Path, manifest_name: str, overwrite: bool) -> None:
    if os.path.ismount(target):
        raise ConfigError(
            f"{target} is where a file system is mounted, and cannot be given to a folder that is built beside it; "
            f"give the name of a folder in it, as {target / 'pack'}"
        )
    if _is_vacant(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; give the name of a folder to make")
    if not (target / manifest_name).is_file():
        raise ConfigError(f"{target} is there already and is no pack (it has no {manifest_name}); give another name")
    if not overwrite:
        raise ConfigError(f"{target} is there already; give another name, or --overwrite to replace it")


def _is_vacant(target: Path) -> bool:
    """Whether a folder can be renamed to `target`."""
    if target.is_dir():
        return not os.listdir(target)
    return not os.path.lexists(target)


def _locked(path: Path) -> int:
    """Make the folder if need be and lock it; the descriptor that holds the lock."""
    while True:
        os.makedirs(path, exist_ok=True)
        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _lock(fd, path)
            # Whoever held it may have given the folder another name in the meantime.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        if fd >= 0:
            os.close(fd)


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MoertError(f"another process is writing {path}; wait for it, or give another name") from None
    except OSError as error:
        warnings.warn(
            f"{path}: this file system cannot lock a folder ({error.strerror}); make sure that no other process writes "
            "to it",
            RuntimeWarning,
            stacklevel=4,
        )


def _empty(path: Path, manifest_name: str) -> None:
    names = os.listdir(path)
    if names and manifest_name not in names and not all(name.endswith(UNFINISHED) for name in names):
        raise ConfigError(f"{path} holds {names[0]!r} and no {manifest_name}: moert did not make it, move it away")
    # The manifest goes last: without it, what is left over would be nobody's.
    for name in sorted(names, key=lambda name: name == manifest_name):
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _exchange(one: Path, other: Path, aside: Path) -> None:
    """Swap two folders' names in one step; over a third name where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)
    if swap is not None:
        if swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(other))
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)
