"""Plain torch: what every kernel means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from moert.kernels.bank import Bank, BankMatrix
from moert.kernels.gate import Gate

Activation = Callable[[torch.Tensor], torch.Tensor]
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def expert_ffn(
    hidden: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    activation: Activation,
    *,
    up_name: str = "gate_up_proj",
    is_transposed: bool = False,
    linear: Linear = torch.nn.functional.linear,
) -> torch.Tensor:
    """One expert on the rows routed to it.

    Args:
        hidden: [T, D], in the dtype of the weights.
        weights: `up_name` [U, D] and "down_proj" [D, F], or [D, U] and [F, D] if `is_transposed`; optional biases
            under the same names with "_bias" added, [U] and [D].
        activation: [T, U] -> [T, F]; for a gated expert it splits, gates and multiplies.
        linear: the product with weights that are not transposed; `kernels.cpu.linear` is the faster one.

    Returns:
        [T, D], not yet weighted by the router; new memory.
    """
    product = _transposed_linear if is_transposed else linear
    inner = activation(product(hidden, weights[up_name], weights.get(f"{up_name}_bias")))
    return product(inner, weights["down_proj"], weights.get("down_proj_bias"))


def _transposed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x @ weight
    return y if bias is None else y + bias


def gate(how: Gate, x: torch.Tensor) -> torch.Tensor:
    """The activation of an expert, gated or not; kernels compute it in fp32 and round once.

    Args:
        how: which.
        x: the up product, [..., 2 * F] for a gated expert, else [..., F]; any floating dtype, which it is computed in.

    Returns:
        [..., F]. A NaN stays a NaN through every clamp.
    """
    if not how.gated:
        return activation(how, x)
    if x.shape[-1] % 2:
        raise ValueError(f"a gated expert needs an even number of columns, not {x.shape[-1]}")
    gates, ups = (x[..., 0::2], x[..., 1::2]) if how.interleaved else x.chunk(2, dim=-1)
    inner = activation(how, gates.clamp(max=how.gate_limit)).clamp(max=how.output_limit)
    return inner * (ups.clamp(-how.up_limit, how.up_limit) + how.up_offset)


def activation(how: Gate, x: torch.Tensor) -> torch.Tensor:
    """The activation alone, without halves and limits: any shape, returned in the same."""
    if how.activation == "silu":
        return x * torch.sigmoid(how.alpha * x)
    return _ACTIVATIONS[how.activation](x)


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def decode_gate_up(
    bank: Bank, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor
) -> torch.Tensor:
    """What goes into the down product, for every pick: fp64 [T * K, F] on the CPU, NaN for picks that are not computed.

    Arguments as for `kernels.decode_gate_up.decode_gate_up`, on any device.
    """
    ids, weights = ids.cpu(), weights.cpu()
    h = torch.full((ids.numel(), bank.width), torch.nan, dtype=torch.float64)
    for pick, slot in computed_picks(bank, ids, weights, slot_of):
        h[pick] = gate(bank.gate, _product(bank.up, slot, x[pick // ids.shape[1]]))
    return h


def decode_down(
    bank: Bank, h: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor
) -> torch.Tensor:
    """The sum over each token's picks of their experts' outputs times their weights: fp64 [T, D] on the CPU.

    Arguments as for `kernels.decode_down.decode_down`, on any device.
    """
    ids, weights = ids.cpu(), weights.cpu()
    y = torch.zeros(ids.shape[0], bank.hidden, dtype=torch.float64)
    for pick, slot in computed_picks(bank, ids, weights, slot_of):
        y[pick // ids.shape[1]] += weights.flatten()[pick].double() * _product(bank.down, slot, h[pick])
    return y


def computed_picks(
    bank: Bank, ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor
) -> Iterator[tuple[int, int]]:
    """Each pick (its place in ids, flattened) that has something to compute, and the slot of its expert.

    The others: ids outside 0 to E - 1, experts whose slot is not one of the bank's, and weights of 0.
    """
    slots = slot_of.tolist()
    for pick, (expert, weight) in enumerate(zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True)):
        if 0 <= expert < len(slots) and 0 <= slots[expert] < bank.slots and weight != 0:
            yield pick, slots[expert]


def message(ids: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """What a message says of experts [N] beside their ids: the router's weights of a token's picks of them, in fp32.

    Args:
        ids, weights: [1, K]; other picks are not the message's.
    """
    picked = experts.unsqueeze(1) == ids
    return torch.where(picked, weights.float(), 0).sum(1)


def collected(sums: torch.Tensor, theirs: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What two have summed up in fp32, the one and, if it had anything to do, the other: rounded once."""
    return (sums if theirs is None else sums + theirs).to(dtype)


def bank_weight(matrix: BankMatrix, slot: int) -> torch.Tensor:
    """The weight [N, K] of a slot in fp64 on the CPU: what its codes stand for, exactly."""
    codes = matrix.codes[slot].cpu()
    if matrix.scales is None:
        return (codes.T if matrix.transposed else codes).double()
    scales = matrix.scales[slot].cpu()
    if matrix.format == "fp8":
        numbers = codes.view(torch.float8_e4m3fn).double()
        rows = scales.double().repeat_interleave(matrix.group, 0)[: matrix.n]
        return numbers * rows.repeat_interleave(matrix.group, 1)[:, : matrix.k]
    if matrix.format == "int8":
        numbers = codes.double()
    else:
        numbers = torch.stack([codes & 15, codes >> 4], -1).flatten(1).double()
    groups = numbers.unflatten(1, (-1, matrix.group))
    if matrix.format == "int4":
        groups = groups - (8 if matrix.zeros is None else matrix.zeros[slot].cpu().double().unsqueeze(-1))
    elif matrix.format == "mxfp4":
        groups = _E2M1[groups.long()]
        scales = torch.where(scales == 255, torch.nan, torch.exp2(scales.double() - 127))
    return (groups * scales.double().unsqueeze(-1)).flatten(1)


_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def _product(matrix: BankMatrix, slot: int, x: torch.Tensor) -> torch.Tensor:
    y = bank_weight(matrix, slot) @ x.cpu().double()
    return y if matrix.bias is None else y + matrix.bias[slot].cpu().double()
