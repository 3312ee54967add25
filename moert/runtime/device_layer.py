"""One layer's experts on a GPU, all of them resident in the model's own parameters: a step is some launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from moert.errors import KernelUnavailableError
from moert.kernels.bank import Bank, bank_matrix
from moert.residency import Residency
from moert.runtime.layer import LayerSpec, ParameterLayer, Weights

DEVICE_TYPES = {"cuda"}
"""Where Triton's kernels run; with the interpreter on, its tests add the CPU."""

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden, ids, weights), as an experts module is called -> what it returns."""


def is_device(device: torch.device) -> bool:
    """Whether experts there are computed there, by a `DeviceLayer`."""
    return device.type in DEVICE_TYPES


def check_device(device: torch.device) -> None:
    """Refuse a device that none of the kernels can run on.

    Raises:
        KernelUnavailableError: it is too old, of another maker, or triton is missing.
    """
    try:
        from moert.kernels.grouped_gate_up import runs_on
    except ImportError as error:
        raise KernelUnavailableError(
            f"experts on {device} are computed by Triton kernels, and triton cannot be imported ({error}); install it "
            "with pip install 'moert[gpu]', or move the model to the CPU before patching"
        ) from error
    runs_on(device)


class DeviceLayer(ParameterLayer):
    """Every expert in the model's own parameters on one device, which the kernels read as a bank: nothing is copied.

    Which experts a step uses is known on the device alone, so its hits are not counted: that would wait for it.
    """

    def __init__(
        self,
        spec: LayerSpec,
        residency: Residency,
        weights: Sequence[Weights],
        stacked: Mapping[str, torch.Tensor],
    ) -> None:
        """`residency` and `weights` are as for `ParameterLayer`; `stacked` are the same tensors over all experts, by
        the names of `spec.tensors`, on a device that `check_device` has passed. Neither waits for it."""
        super().__init__(spec, residency, weights)
        from moert.kernels.device_experts import device_experts

        self._compute = device_experts
        self._bank: Bank | None = None
        self.device = next(iter(stacked.values())).device
        self.fallback = spec.unfused_reason
        """Why the model's own code computes this layer and moert's kernels do not; None: they do."""
        if spec.fused is not None:
            try:
                self._bank = _bank(spec, stacked)
            except ValueError as error:
                self.fallback = str(error)
        self.stats.fallback = self.fallback
        # An expert's slot is its row in the parameters.
        self._slot_of = torch.arange(spec.num_experts, dtype=torch.int32, device=self.device)

    def run(
        self, own_forward: Forward, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One step: `hidden` [T, D] in the experts' dtype, `top_k_index` and `top_k_weights` [T, K], all on the
        device; to `own_forward`, which computes it if there is a `fallback`, as the experts module takes them.

        Ids that name no expert and picks of weight 0 contribute nothing. Sums are fp32. Does not wait for the device;
        shapes alone decide what is launched, so that a CUDA graph may capture it.

        Returns:
            [T, D] in the dtype of `hidden`; new memory.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, before anything is launched.
        """
        if self._bank is None:
            self.stats.device_steps += 1
            return own_forward(hidden, top_k_index, top_k_weights)
        hidden, ids, weights = hidden.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
        out = self._compute(self._bank, hidden, ids, weights, self._slot_of)
        self.stats.device_steps += 1
        if self.spec.num_identity:
            first = self.spec.num_experts
            identity = (ids >= first) & (ids < first + self.spec.num_identity)
            share = torch.where(identity, weights, 0).sum(1, keepdim=True, dtype=torch.float32)
            out = torch.addcmul(out.float(), hidden.float(), share).to(out.dtype)
        return out


def _bank(spec: LayerSpec, stacked: Mapping[str, torch.Tensor]) -> Bank:
    """The parameters as a bank; ValueError where the kernels cannot read them."""
    assert spec.fused is not None
    layout = spec.fused.layout
    # There may be rows for experts that have no down product.
    rows = {name: tensor[: spec.num_experts] for name, tensor in stacked.items()}
    return Bank(
        bank_matrix("plain", rows, layout.up, transposed=layout.transposed),
        bank_matrix("plain", rows, layout.down, transposed=layout.transposed),
        spec.fused.ffn.gate,
    )
