"""Arrays out of .npy, .npz, .safetensors and .pt files, one by one."""

from __future__ import annotations

import errno
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.errors import CorruptFileError
from moert.trace.importers.base import beginning, cannot_read, malformed

ZIP_MAGIC = b"PK\x03\x04"


def archive_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz file; none if it is something else."""
    return [name.removesuffix(".npy") for name in _zip_names(path) if name.endswith(".npy")]


def pickled_words(path: Path) -> bytes:
    """The pickle inside a file of `torch.save`, as bytes, in which its texts can be found without running it."""
    for name in _zip_names(path):
        if name.endswith("/data.pkl"):
            try:
                with zipfile.ZipFile(path) as archive, archive.open(name) as file:
                    return file.read(1 << 16)
            except (OSError, zipfile.BadZipFile):
                return b""
    return b""


def _zip_names(path: Path) -> list[str]:
    if beginning(path, 4) != ZIP_MAGIC:
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []


class Archive:
    """An .npz file, of which an array is read when asked for.

    Raises:
        CorruptFileError: it is no such file.
        TransferError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path, "archive"):
            loaded = np.load(path, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise malformed(path, "file", "is no .npz archive")
            self._file = loaded
        self.names = list(self._file.files)

    def read(self, name: str) -> npt.NDArray[Any]:
        """One array, which is the caller's.

        Raises:
            CorruptFileError: it is damaged, or holds Python objects.
        """
        with _reading(self.path, f"array {name!r}"):
            return np.asarray(self._file[name])


def read_npy(path: Path) -> npt.NDArray[Any]:
    """The array of an .npy file.

    Raises:
        CorruptFileError: it is damaged, or holds Python objects.
        TransferError: it cannot be read.
    """
    with _reading(path, "array"):
        return np.asarray(np.load(path, allow_pickle=False))


def load_pt(path: Path) -> Any:
    """What `torch.save` wrote: tensors, lists, dicts, numbers and texts.

    Tensors are mapped from the file, which may be larger than memory, where it is of the kind that allows that. Nothing
    in the file is executed: anything but these types is refused.

    Raises:
        CorruptFileError: it is damaged, or holds other objects.
        TransferError: it cannot be read.
    """
    import torch

    with _reading(path, "file"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=beginning(path, 4) == ZIP_MAGIC)


def read_safetensors(path: Path, name: str) -> npt.NDArray[Any]:
    """A tensor of a safetensors file; bfloat16, which numpy lacks, comes as float32."""
    from safetensors import SafetensorError, safe_open

    with _reading(path, f"tensor {name!r}"):
        try:
            with safe_open(path, framework="np") as file:
                if file.get_slice(name).get_dtype() != "BF16":
                    return np.asarray(file.get_tensor(name))
            with safe_open(path, framework="pt") as file:
                return np.asarray(file.get_tensor(name).float().numpy())
        except SafetensorError as error:
            raise malformed(path, f"tensor {name!r}", str(error)) from error


def safetensors_names(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file.

    Raises:
        CorruptFileError: it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    with _reading(path, "file"):
        try:
            with safe_open(path, framework="np") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise malformed(path, "header", str(error)) from error


@contextmanager
def _reading(path: Path, where: str) -> Iterator[None]:
    try:
        yield
    except CorruptFileError:
        raise
    except OSError as error:
        # How torch puts it that the file is no whole archive.
        if error.errno == errno.EINVAL:
            raise malformed(path, where, "cannot be read: it is cut off or damaged") from error
        raise cannot_read(error, path) from error
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError, pickle.UnpicklingError, RuntimeError) as error:
        raise malformed(path, where, f"cannot be read: {' '.join(str(error).split())[:300]}") from error
