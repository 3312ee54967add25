"""The CPU's share of a step: hidden states come down from the device, the outputs of its experts go back up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.device.base import Device, Event, PinningRefusedError
from moert.runtime.device_kernels import Inputs
from moert.tiers.read import Priority


class Mailbox:
    """Page-locked memory of a device's steps, the same in each; used by one step at a time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._down = _Box(device)
        self._up = _Box(device)

    def open(self, inputs: Inputs, turns: Sequence[int]) -> CpuShare:
        """Start bringing a step's hidden states down, for the CPU to compute these of its groups; does not block unless
        an earlier step's are still on their way."""
        return CpuShare(self._device, inputs, turns, self._down, self._up)

    def forget(self) -> None:
        """The device has done everything."""
        self._down.until = self._up.until = None

    def close(self) -> None:
        """Drop the memory; nothing uses it any more."""
        self._down, self._up = _Box(self._device), _Box(self._device)


class _Box:
    """Host memory for one direction."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.pageable = False
        self.until: Event | None = None
        """After the last copy to or from it."""

    def take(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width] of any contents."""
        if self.until is not None:
            self.until.wait()
            self.until = None
        nbytes = max(1, rows * width * dtype.itemsize)
        if self._memory.nbytes < nbytes:
            try:
                self._memory = self._device.allocate_pinned(nbytes)
                self.pageable = False
            except PinningRefusedError:
                with torch.inference_mode(False):
                    self._memory = torch.empty(nbytes, dtype=torch.uint8)
                self.pageable = True
        return self._memory[: rows * width * dtype.itemsize].view(dtype).view(rows, width)


class CpuShare:
    """The groups of one step that the CPU computes."""

    def __init__(self, device: Device, inputs: Inputs, turns: Sequence[int], down: _Box, up: _Box) -> None:
        self._device, self._inputs, self.turns = device, inputs, tuple(turns)
        self._down, self._up = down, up
        hidden = inputs.hidden
        self._hidden = down.take(hidden.shape[0], hidden.shape[1], hidden.dtype)
        # The device's side of it is taken now, so that a step fails before anything has been moved.
        sizes = [inputs.groups[turn].weights.shape[0] for turn in self.turns]
        self._begins = {turn: sum(sizes[:place]) for place, turn in enumerate(self.turns)}
        self._dtype = torch.promote_types(hidden.dtype, torch.float32)
        width = hidden.shape[1]
        self._outputs = up.take(sum(sizes), width, self._dtype)
        self._staged_memory = device.allocate(max(1, sum(sizes) * width) * self._dtype.itemsize)
        self.staged = self._staged_memory.view(self._dtype)[: sum(sizes) * width].view(sum(sizes), width)
        """[rows, D] on the device, once `send` has been waited for."""
        device.back.wait(device.compute.record())
        device.back.copy(self._hidden, hidden, pageable=down.pageable)
        self._arrived = down.until = device.back.record()

    def hidden(self) -> torch.Tensor:
        """The step's hidden states in host memory; blocks until they are there."""
        self._arrived.wait()
        return self._hidden

    def put(self, turn: int, output: torch.Tensor) -> None:
        """What the CPU has computed for one of the groups, [rows, D], not weighted."""
        begin = self._begins[turn]
        self._outputs[begin : begin + len(output)].copy_(output)

    def send(self) -> Event:
        """All groups have been put: start their way up."""
        stream = self._device.copies[Priority.DEMAND]
        # Memory that is taken for a step may have been another's whose work is not over.
        stream.wait(self._device.compute.record())
        stream.copy(self.staged, self._outputs, pageable=self._up.pageable)
        self._up.until = stream.record()
        return self._up.until
