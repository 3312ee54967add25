"""The dense weights after HuggingFace's loader: out of the mapped files, into memory of their own."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import nn

_LIBC = ctypes.CDLL(None, use_errno=True)


def own_memory(model: nn.Module) -> None:
    """Copy every parameter and buffer that is a view of a mapped checkpoint file into memory of its own.

    The loader leaves such views behind. Truncating the file would then kill the process, and under memory pressure the
    kernel would drop dense weights, which every token needs, to read them again. One tensor is copied at a time and its
    mapped pages are let go, so the memory in use is never more than the dense weights and one tensor. Blocks.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and not storage.resizable() and storage.nbytes():
            mapped = tensor.data
            _advise(mapped, mmap.MADV_WILLNEED)
            tensor.data = mapped.clone()
            _advise(mapped, mmap.MADV_DONTNEED)


def _advise(tensor: torch.Tensor, advice: int) -> None:
    """Advise on the whole pages within a tensor; a refusal costs speed or memory, never correctness."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(advice))
