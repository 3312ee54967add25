"""What the tests of the Triton kernels share. They run on a GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence

import torch
import triton_shim

from moert.formats import FormatChoice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:
    triton_shim.install()

FORMATS = (
    "plain",
    "int8",
    "int4",
    "int4,group=128",
    "int4,symmetric=false",
    "int4,group=128,symmetric=false",
    "fp8",
    "mxfp4",
)
"""Every way in which a weight may be stored, as `FormatChoice` reads it."""


def poison(tensor: torch.Tensor) -> None:
    """Fill with what makes any result that depends on it NaN, as far as the dtype can say so: e8m0 and e4m3 can."""
    tensor.view(torch.uint8).fill_(0xFF)


def stored(choice: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One expert's weight in a format, under the name "w"; new memory."""
    return FormatChoice.parse(choice).make().encode({"w": weight})


def in_slots(
    experts: Sequence[Mapping[str, torch.Tensor]], slots: Sequence[int], slot_count: int, *, apart: int = 0
) -> dict[str, torch.Tensor]:
    """Tensors [S, ...] with each expert's in its slot and the others poisoned; `apart` numbers between the rows."""
    bank = {}
    for name, sample in experts[0].items():
        space = torch.empty(slot_count, sample.numel() + apart, dtype=sample.dtype)
        poison(space)
        bank[name] = space[:, : sample.numel()].view(slot_count, *sample.shape)
        for expert, slot in zip(experts, slots, strict=True):
            bank[name][slot] = expert[name]
        # One that lies on the device as it does here, gaps and all.
        bank[name] = space.to(DEVICE)[:, : sample.numel()].view(slot_count, *sample.shape)
    return bank


def guarded(tensor: torch.Tensor, *, at_end: bool) -> torch.Tensor:
    """A copy of a CPU tensor, its strides kept, that ends just before (or begins just after) a page of no access."""
    page = mmap.PAGESIZE
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = span * tensor.element_size()
    inner = -(-nbytes // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for guard in (0, page + inner):
        assert protect(buffer.data_ptr() + guard, page, 0) == 0
    begin = page + inner - nbytes if at_end else page
    copy = buffer[begin : begin + nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor)


def survives(work: Callable[..., None], *arguments: object) -> bool:
    """Whether a process that calls `work`, a function of a module, ends well; a stray access kills it."""
    child = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    child.start()
    child.join(120)
    code = child.exitcode
    child.kill()
    return code == 0
