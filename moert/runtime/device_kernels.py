"""How a device computes a layer's experts out of rows of a bank: what every such way can do, and the plainest one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch

from moert.device.base import Device
from moert.kernels.cpu_ffn import Expert
from moert.runtime.compute import Compute, add_weighted
from moert.runtime.device_rows import RowBank
from moert.runtime.layer import LayerSpec, Weights
from moert.runtime.routing import Group, group_by_expert

Work = Callable[[], object]
"""Starts kernels and waits for none of them."""


class Inputs:
    """What a step of a layer is given, on the device, and its routing turned round, on the host."""

    def __init__(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        host_ids: torch.Tensor,
        host_weights: torch.Tensor,
        spec: LayerSpec,
        compute: Compute,
    ) -> None:
        """
        Args:
            hidden: [T, D], contiguous.
            ids, weights: [T, K], contiguous; the weights as the router gave them.
            host_ids, host_weights: copies of them in host memory.
            compute: an expert's own tensors and rows -> its output, wherever they are.
        """
        self.compute = compute
        self.hidden, self.ids, self.weights, self.host_ids, self.host_weights = (
            hidden,
            ids,
            weights,
            host_ids,
            host_weights,
        )
        wide = host_weights.to(torch.promote_types(hidden.dtype, torch.float32))
        groups = group_by_expert(host_ids, wide, spec.num_experts + spec.num_identity)
        self.groups = [group for group in groups if group.expert < spec.num_experts]
        """Those of experts with weights, on the host, by ascending expert."""
        self.identity = groups[len(self.groups) :]
        begins = [0]
        for group in self.groups:
            begins.append(begins[-1] + group.weights.shape[0])
        self.begins = begins
        """Where each group's rows begin when they lie one after the other, and how many there are."""

    @property
    def n_rows(self) -> int:
        """Picks of all real experts."""
        return self.begins[-1]


class OpenStep(ABC):
    """One step in the middle: outputs of experts come from the device and from the CPU, in any order, and are added up
    in an order that does not depend on it. Each method returns what is to be launched next, in the compute stream."""

    can_split: bool
    """Whether experts may be computed a few at a time with the same result to the last bit."""

    @abstractmethod
    def compute(self, rows: Mapping[int, int]) -> Work:
        """Compute these groups of the step; `rows` are where their experts are in the bank."""

    @abstractmethod
    def take_in(self, turns: Sequence[int], outputs: torch.Tensor) -> Work:
        """Groups that the CPU has computed: `outputs` [rows, D] on the device, not weighted, one after the other."""

    @abstractmethod
    def finish(self) -> Callable[[], torch.Tensor]:
        """The sum: [T, D] in the dtype of the hidden states, new memory."""


class LayerKernels(ABC):
    """A layer's experts on one kind of device."""

    name: str
    """For people."""

    @abstractmethod
    def open(self, inputs: Inputs, *, whole: bool) -> OpenStep:
        """Begin a step; takes all the memory it needs.

        Args:
            whole: the device computes all of it, and all of its experts can be there at once.

        Raises:
            OutOfDeviceMemoryError: there is not so much; nothing has happened.
        """

    @abstractmethod
    def bank_goes(self) -> None:
        """Let go of the bank's memory, between steps."""

    @abstractmethod
    def bank_comes(self) -> None:
        """The bank has other memory now."""


class RowByRow(LayerKernels):
    """Each expert's rows computed for themselves, through a callback in torch or by the fused CPU kernels, and added up
    by token and then by expert: to the last bit what a step on the CPU gives, if the same kernels compute it."""

    def __init__(self, device: Device, spec: LayerSpec, bank: RowBank, *, fused: bool) -> None:
        """`fused`: have the kernels of csrc/ compute, in host memory, if the layer has some."""
        self.device, self.spec, self.bank = device, spec, bank
        self.is_fused = fused and spec.fused is not None
        self.name = "the CPU's kernels" if self.is_fused else "the model's own code, one expert after the other"
        self._experts: dict[int, Expert] = {}

    def open(self, inputs: Inputs, *, whole: bool) -> OpenStep:
        return _RowByRowStep(self, inputs)

    def bank_goes(self) -> None:
        self._experts.clear()

    def bank_comes(self) -> None:
        """Rows are looked up as they are needed."""

    def expert(self, row: int) -> Expert:
        """The fused expert in a row."""
        assert self.spec.fused is not None
        if row not in self._experts:
            self._experts[row] = self.spec.fused.expert(self.bank.views(row))
        return self._experts[row]

    def weights(self, row: int) -> Weights:
        """The expert's own tensors in a row, decoded if they are stored in another way."""
        weights, storage = self.bank.views(row), self.spec.storage
        return weights if storage is None else storage.decode(weights)


class _RowByRowStep(OpenStep):
    can_split = True

    def __init__(self, kernels: RowByRow, inputs: Inputs) -> None:
        self._kernels, self._inputs = kernels, inputs
        hidden = inputs.hidden
        self._dtype = torch.promote_types(hidden.dtype, torch.float32)
        shape = (inputs.n_rows, hidden.shape[1])
        self._memory = kernels.device.allocate(max(1, inputs.n_rows * hidden.shape[1]) * self._dtype.itemsize)
        self._rows = self._memory.view(self._dtype)[: inputs.n_rows * hidden.shape[1]].view(shape)

    def compute(self, rows: Mapping[int, int]) -> Work:
        return lambda: self._compute(rows)

    def _compute(self, rows: Mapping[int, int]) -> None:
        groups = {turn: self._inputs.groups[turn] for turn in rows}
        if not self._kernels.is_fused:
            for turn, row in rows.items():
                given = self._group_on_device(groups[turn]).rows(self._inputs.hidden)
                self._of(turn).copy_(self._inputs.compute(given, self._kernels.weights(row)))
            return
        fused = self._kernels.spec.fused
        assert fused is not None
        for turn in rows:
            self._of(turn).zero_()
        fused.ffn.run(
            self._inputs.hidden,
            [self._kernels.expert(row) for row in rows.values()],
            [group.tokens for group in groups.values()],
            [None] * len(groups),
            self._rows,
            out_rows=[self._inputs.begins[turn] for turn in rows],
        )

    def _of(self, turn: int) -> torch.Tensor:
        begins = self._inputs.begins
        return self._rows[begins[turn] : begins[turn + 1]]

    def take_in(self, turns: Sequence[int], outputs: torch.Tensor) -> Work:
        return lambda: self._take_in(turns, outputs)

    def _take_in(self, turns: Sequence[int], outputs: torch.Tensor) -> None:
        at = 0
        for turn in turns:
            of_turn = self._of(turn)
            of_turn.copy_(outputs[at : at + len(of_turn)])
            at += len(of_turn)

    def finish(self) -> Callable[[], torch.Tensor]:
        return self._finish

    def _finish(self) -> torch.Tensor:
        hidden = self._inputs.hidden
        out = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        for turn, group in enumerate(self._inputs.groups):
            add_weighted(self._group_on_device(group), self._of(turn), out)
        for group in self._inputs.identity:
            here = self._group_on_device(group)
            add_weighted(here, here.rows(hidden), out)
        return out.to(hidden.dtype)

    def _group_on_device(self, group: Group) -> Group:
        device = self._inputs.hidden.device
        tokens = None if group.tokens is None else group.tokens.to(device, non_blocking=True)
        return group._replace(tokens=tokens, weights=group.weights.to(device, self._dtype, non_blocking=True))
