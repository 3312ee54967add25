"""Experts computed by the Triton kernels out of rows of a bank, a row of output for each pick."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from moert.device.base import Device
from moert.kernels.bank import Bank, bank_matrix
from moert.runtime.device_kernels import Inputs, LayerKernels, OpenStep, Work
from moert.runtime.device_rows import RowBank
from moert.runtime.device_table import SlotTable
from moert.runtime.layer import LayerSpec


class RowByPick(LayerKernels):
    """The kernels of `moert.kernels`: sums are fp32, by token and then by the order of its picks.

    A step that the device computes alone, of few tokens and with room for all of its experts, is two launches once they
    are all there. Any other is computed expert by expert as they come, into rows that are added up at the end, the
    CPU's among them. Both are the same to the last bit whichever rows the experts are in; they are not the same as each
    other, so a token may differ in the last bits where the CPU takes a share of it.
    """

    name = "moert's Triton kernels"

    def __init__(self, device: Device, spec: LayerSpec, bank: RowBank, table: SlotTable) -> None:
        """Raises ValueError if the kernels cannot read the layer's tensors, and ImportError without triton."""
        if spec.fused is None:
            raise ValueError(spec.unfused_reason or "the kernels do not know its experts")
        from moert.kernels.device_experts import is_few

        self.is_few = is_few
        self.device, self.spec, self.table, self._rows = device, spec, table, bank
        self.bank_comes()

    def bank_goes(self) -> None:
        vars(self).pop("bank", None)

    def bank_comes(self) -> None:
        assert self.spec.fused is not None
        layout, storage, tensors = self.spec.fused.layout, self.spec.storage, self._rows.tensors
        name = "plain" if storage is None or storage.choice is None else storage.choice.name
        transposed = layout.transposed and name == "plain"
        self.bank = Bank(
            bank_matrix(name, tensors, layout.up, transposed=transposed),
            bank_matrix(name, tensors, layout.down, transposed=transposed),
            self.spec.fused.ffn.gate,
        )

    def open(self, inputs: Inputs, *, whole: bool) -> OpenStep:
        (tokens, picks), experts = inputs.ids.shape, self.spec.num_experts
        if whole and self.is_few(tokens, picks, experts):
            return _WholeStep(self, inputs)
        return _SplitStep(self, inputs)

    def add_identity(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Add what experts without weights give, their input."""
        if not self.spec.num_identity:
            return out
        first = self.spec.num_experts
        is_identity = (ids >= first) & (ids < first + self.spec.num_identity)
        share = torch.where(is_identity, weights, 0).sum(1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(out.float(), hidden.float(), share).to(out.dtype)


class _WholeStep(OpenStep):
    can_split = False

    def __init__(self, kernels: RowByPick, inputs: Inputs) -> None:
        self._kernels, self._inputs = kernels, inputs
        self._out: torch.Tensor | None = None

    def compute(self, rows: Mapping[int, int]) -> Work:
        from moert.kernels.device_experts import device_experts

        kernels, inputs = self._kernels, self._inputs
        of_expert = {inputs.groups[turn].expert: row for turn, row in rows.items()}
        slot_of = kernels.table.whole(kernels.spec.index, of_expert, kernels.device.compute)

        def work() -> None:
            self._out = device_experts(kernels.bank, inputs.hidden, inputs.ids, inputs.weights, slot_of)

        return work

    def take_in(self, turns: Sequence[int], outputs: torch.Tensor) -> Work:
        raise AssertionError("the device computes all of this step")

    def finish(self) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            inputs = self._inputs
            out = torch.zeros_like(inputs.hidden) if self._out is None else self._out
            return self._kernels.add_identity(inputs.hidden, inputs.ids, inputs.weights, out)

        return work


class _SplitStep(OpenStep):
    can_split = True

    def __init__(self, kernels: RowByPick, inputs: Inputs) -> None:
        self._kernels, self._inputs = kernels, inputs
        picks, bank, device = inputs.ids.numel(), kernels.bank, kernels.device
        number = inputs.hidden.dtype
        self._memory = (
            device.allocate(max(1, picks * bank.hidden) * 4),
            device.allocate(max(1, picks * bank.width) * number.itemsize),
        )
        rows, inner = self._memory
        self._rows = rows.view(torch.float32)[: picks * bank.hidden].view(picks, bank.hidden)
        self._inner = inner.view(number)[: picks * bank.width].view(picks, bank.width)

    def compute(self, rows: Mapping[int, int]) -> Work:
        from moert.kernels.dispatch import dispatch
        from moert.kernels.grouped_configs import block_m_for
        from moert.kernels.grouped_down import grouped_down
        from moert.kernels.grouped_gate_up import grouped_gate_up, runs_on

        kernels, inputs, bank = self._kernels, self._inputs, self._kernels.bank
        of_expert = {inputs.groups[turn].expert: row for turn, row in rows.items()}
        slot_of = kernels.table.only(kernels.spec.index, of_expert, kernels.device.compute)
        block_m = block_m_for(inputs.ids.numel(), kernels.spec.num_experts, runs_on(bank.device))

        def work() -> None:
            blocks = dispatch(inputs.ids, inputs.weights, slot_of, bank.slots, block_m)
            grouped_gate_up(bank, inputs.hidden, blocks, out=self._inner)
            grouped_down(bank, self._inner, inputs.weights, blocks, out=self._rows)

        return work

    def take_in(self, turns: Sequence[int], outputs: torch.Tensor) -> Work:
        flat_ids, flat_weights = self._inputs.host_ids.reshape(-1), self._inputs.host_weights.reshape(-1)
        picks = torch.cat(
            [
                ((flat_ids == self._inputs.groups[turn].expert) & (flat_weights != 0)).nonzero().squeeze(1)
                for turn in turns
            ]
        )

        def work() -> None:
            to = picks.to(outputs.device)
            weights = self._inputs.weights.reshape(-1)[to].float().unsqueeze(1)
            self._rows.index_copy_(0, to, outputs.float() * weights)

        return work

    def finish(self) -> Callable[[], torch.Tensor]:
        from moert.kernels.combine import combine

        kernels, inputs = self._kernels, self._inputs
        # Every pick of an expert has its row by now, wherever that was computed.
        there = dict.fromkeys((group.expert for group in inputs.groups), 0)
        slot_of = kernels.table.only(kernels.spec.index, there, kernels.device.compute)

        def work() -> torch.Tensor:
            out = torch.empty_like(inputs.hidden)
            combine(self._rows, inputs.ids, inputs.weights, slot_of, kernels.bank.slots, out=out)
            return kernels.add_identity(inputs.hidden, inputs.ids, inputs.weights, out)

        return work
