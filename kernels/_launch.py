"""Launching a Triton kernel, or describing the launch so that it can be compiled where no GPU is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from triton.runtime import JITFunction

from moert.errors import KernelUnavailableError
from moert.kernels import launching

OLDEST_CAPABILITY = (8, 0)
"""Before it there are no bf16 and no asynchronous copies."""


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with all its arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """By the kernel's names; tensors, numbers and what is known when it is compiled."""
    options: Mapping[str, int]
    """num_warps and num_stages."""

    def run(self, device: torch.device) -> None:
        """Put it into `device`'s current stream and return; under the interpreter, run it. Nothing for an empty grid.

        Raises:
            KernelUnavailableError: see `capability`.
        """
        capability(device, self.kernel)
        if not all(self.grid):
            return
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.kernel[self.grid](**self.arguments, **self.options)
        else:
            launching.launch(
                (each for each in self.arguments.values() if isinstance(each, torch.Tensor)),
                lambda: self.kernel[self.grid](**self.arguments, **self.options),
            )


@dataclass(frozen=True, eq=False)
class CompileSpec:
    """A launch that the compile check compiles, on tensors of the "meta" device, and what it expects of the result."""

    name: str
    launch: Launch
    needs: tuple[str, ...] = ()
    """Names of instructions in bench/kernel_check.py that must be in it; of "a|b", one of the two."""
    lacks: tuple[str, ...] = ("atomic",)
    """Those that must not be in it. Atomic sums would be in any order, and so of any bits."""


def is_interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs it, on the CPU, as it does if TRITON_INTERPRET=1 when triton is imported."""
    return not isinstance(kernel, JITFunction)


def capability(device: torch.device, kernel: Any) -> int:
    """The compute capability of `device`, 90 for 9.0; under the interpreter, and for "meta" tensors, 90.

    Raises:
        KernelUnavailableError: the device cannot run Triton kernels.
    """
    if device.type == "meta" or (device.type == "cpu" and is_interpreted(kernel)):
        return 90
    if device.type != "cuda" or is_interpreted(kernel):
        raise KernelUnavailableError(
            f"Triton kernels run on CUDA devices, and on the CPU if TRITON_INTERPRET=1 before triton is imported; the "
            f"tensors are on {device} and the interpreter is {'on' if is_interpreted(kernel) else 'off'}"
        )
    return _cuda_capability(device)


@cache
def _cuda_capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or (major, minor) < OLDEST_CAPABILITY:
        raise KernelUnavailableError(
            f"{torch.cuda.get_device_name(device)} is of compute capability {major}.{minor}; the kernels need NVIDIA's "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer"
        )
    return 10 * major + minor


def power_of_2_from(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
