"""The dense weights after HuggingFace's loader: out of the mapped files, into memory of their own."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
from torch import nn

from moert.formats.base import ALIGNMENT_BYTES

_LIBC = ctypes.CDLL(None, use_errno=True)


def own_memory(model: nn.Module) -> None:
    """Copy every parameter and buffer that is a view of a mapped checkpoint file into memory of its own.

    The loader leaves such views behind. Truncating the file would then kill the process, and under memory pressure the
    kernel would drop dense weights, which every token needs, to read them again. The copies are in huge pages where the
    kernel has them, which kernels read faster. One tensor is copied at a time and its mapped pages are let go, so the
    memory in use is never more than the dense weights and one tensor. Blocks.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    mapped = [tensor for tensor in tensors.values() if _is_mapped(tensor)]
    region = _Region(sum(_room(tensor) for tensor in mapped))
    for tensor in mapped:
        source = tensor.data
        _advise(source, mmap.MADV_WILLNEED)
        tensor.data = region.copy(source)
        _advise(source, mmap.MADV_DONTNEED)


def _is_mapped(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    return tensor.device.type == "cpu" and not storage.resizable() and storage.nbytes() > 0


class _Region:
    """Private memory for tensors, which keep it alive; its pages come as they are written."""

    def __init__(self, nbytes: int) -> None:
        self._end = 0
        if nbytes:
            self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, contiguous, in this memory."""
        raw = torch.frombuffer(self._memory, dtype=torch.uint8, count=tensor.nbytes, offset=self._end)
        self._end += _room(tensor)
        return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _advise(tensor: torch.Tensor, advice: int) -> None:
    """Advise on the whole pages within a tensor; a refusal costs speed or memory, never correctness."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(advice))
