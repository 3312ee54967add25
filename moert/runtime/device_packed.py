"""Small tensors on a device that cross the link together: one copy, however many they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.device.base import Device

_ALIGNMENT = 256
"""In bytes: as if each were memory of its own."""


class PackedTensors:
    """Tensors in one piece of a device's memory, with a twin of it in host memory.

    The twin is what was last sent or fetched, and what has been written to it since.
    """

    def __init__(self, device: Device, tensors: Sequence[torch.Tensor]) -> None:
        """`tensors` are contiguous, of the device; they are moved into the piece, contents and all, and stay the same
        objects."""
        self._device = device
        begins, end = [], 0
        for tensor in tensors:
            begins.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        with torch.inference_mode(False):
            self._there = torch.zeros(end, dtype=torch.uint8, device=device.torch_device)
            for tensor, begin in zip(tensors, begins, strict=True):
                place = self._there[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                place.copy_(tensor)
                tensor.set_(place.untyped_storage(), place.storage_offset(), place.shape, place.stride())
            self._here = self._there.cpu().clone()

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        """The twin, in host memory, of one of the tensors or of a view of one."""
        begin = tensor.data_ptr() - self._there.data_ptr()
        assert 0 <= begin <= self._there.nbytes - tensor.nbytes, "this tensor is not packed"
        return self._here[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def send(self) -> None:
        """Have all the device's tensors be as their twins, before whatever comes next in its compute stream."""
        self._device.compute.launch(lambda: self._there.copy_(self._here))
        self._device.join(self._device.compute.record())

    def fetch(self) -> None:
        """Have all twins be as the device's tensors; blocks until the device has got there."""
        self._here.copy_(self._device.to_host(self._there))
