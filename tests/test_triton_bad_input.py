"""Every face of the kernels with every tensor that cannot be right, one at a time: refused, with nothing launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from triton_support import DEVICE, INTERPRETED

from moert.errors import KernelUnavailableError
from moert.kernels import _launch, reference
from moert.kernels.bank import Bank, bank_matrix
from moert.kernels.combine import combine
from moert.kernels.copy_rows import copy_rows, row_table
from moert.kernels.decode_down import decode_down
from moert.kernels.decode_gate_up import decode_gate_up
from moert.kernels.device_experts import device_experts, grouped_experts
from moert.kernels.dispatch import Blocks, Counts, dispatch, most_blocks
from moert.kernels.gate import Gate
from moert.kernels.grouped_down import grouped_down
from moert.kernels.grouped_gate_up import Arrivals, grouped_gate_up
from moert.kernels.plan_ema import new_ema, plan_ema
from moert.kernels.plan_lru import new_lru, plan_lru
from moert.kernels.router_rule import RouterRule
from moert.kernels.router_topk import router_topk

TOKENS, TOP_K, EXPERTS, HIDDEN, WIDTH = 3, 2, 5, 24, 20


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def bank() -> Bank:
    up = bank_matrix("plain", {"w": zeros(EXPERTS, 2 * WIDTH, HIDDEN)}, "w")
    return Bank(up, bank_matrix("plain", {"w": zeros(EXPERTS, HIDDEN, WIDTH)}, "w"), Gate())


def blocks() -> Blocks:
    most = most_blocks(TOKENS * TOP_K, EXPERTS, 16)
    lists = zeros(most * 16, dtype=torch.int32), zeros(most, dtype=torch.int32), zeros(EXPERTS + 1, dtype=torch.int32)
    return Blocks(*lists, 16, TOKENS, TOP_K)


def of_blocks() -> dict[str, torch.Tensor]:
    return {name: getattr(blocks(), name) for name in ("picks", "slots", "first")}


def step() -> dict[str, torch.Tensor]:
    return {
        "ids": zeros(TOKENS, TOP_K, dtype=torch.int64),
        "weights": zeros(TOKENS, TOP_K),
        "slot_of": zeros(EXPERTS, dtype=torch.int32),
    }


def _faces() -> dict[str, tuple[Callable[..., Any], dict[str, torch.Tensor]]]:
    """Name -> a call, and all the tensors it is given by the caller, by name."""
    x, h, rows = zeros(TOKENS, HIDDEN), zeros(TOKENS * TOP_K, WIDTH), zeros(TOKENS * TOP_K, HIDDEN)
    numbers = zeros(2, dtype=torch.int32)
    table = row_table([(zeros(4, 8) if INTERPRETED else torch.zeros(4, 8).pin_memory(), zeros(4, 8))], DEVICE)
    ready, epoch = zeros(EXPERTS, dtype=torch.int32), zeros(1, dtype=torch.int32)
    lru, ema = new_lru(EXPERTS, EXPERTS, DEVICE), new_ema(EXPERTS, EXPERTS, DEVICE)

    def after_arrivals(x: torch.Tensor, ready: torch.Tensor, epoch: torch.Tensor, **lists: torch.Tensor) -> Any:
        return grouped_gate_up(bank(), x, replace(blocks(), **lists), arrivals=Arrivals(ready, epoch))

    return {
        "decode_gate_up": (lambda **t: decode_gate_up(bank(), **t), {"x": x, **step()}),
        "decode_down": (lambda **t: decode_down(bank(), **t), {"h": h, **step()}),
        "device_experts": (lambda **t: device_experts(bank(), **t), {"hidden": x, **step()}),
        "grouped_experts": (
            lambda **t: grouped_experts(bank(), **t),
            {"hidden": x, **step(), "order": zeros(EXPERTS, dtype=torch.int32)},
        ),
        "dispatch": (
            lambda table, **t: dispatch(**t, slots=EXPERTS, block_m=16, counts=Counts(table, 4)),
            {**step(), "order": zeros(EXPERTS, dtype=torch.int32), "table": zeros(2, EXPERTS, dtype=torch.int32)},
        ),
        "grouped_gate_up": (after_arrivals, {"x": x, "ready": ready, "epoch": epoch, **of_blocks()}),
        "grouped_down": (
            lambda h, weights, **t: grouped_down(bank(), h, weights, replace(blocks(), **t)),
            {"h": h, "weights": step()["weights"], **of_blocks()},
        ),
        "combine": (lambda **t: combine(**t, slots=EXPERTS), {"rows": rows, **step()}),
        "router_topk": (
            lambda **t: router_topk(t["logits"], RouterRule(2), bias=t["bias"]),
            {"logits": zeros(TOKENS, EXPERTS), "bias": zeros(EXPERTS)},
        ),
        "copy_rows": (
            lambda **t: copy_rows(table, **t),
            {"sources": numbers, "destinations": numbers.clone(), "count": zeros(1, dtype=torch.int32)},
        ),
        "plan_lru": (lambda **t: plan_lru(lru, **t), {"ids": step()["ids"][:2]}),
        "plan_ema": (lambda **t: plan_ema(ema, **t), {"ids": step()["ids"][:2]}),
    }


FACES = _faces()


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, further apart in memory."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


WRONGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not contiguous": apart,
    "elsewhere": lambda tensor: tensor.to("meta"),
    "of another type": lambda tensor: tensor.to(torch.float64),
    "one dimension more": lambda tensor: tensor.unsqueeze(0),
    "another length": lambda tensor: torch.cat([tensor, tensor], dim=-1).contiguous(),
}


FREE = {*((face, "slot_of") for face in FACES), ("combine", "rows"), ("plan_lru", "ids"), ("plan_ema", "ids")}
"""There may be as many experts, columns and picks as these say."""


def _cases() -> Iterator[Any]:
    for face, (_, tensors) in FACES.items():
        for name in tensors:
            for wrong in WRONGS:
                if wrong == "another length" and (face, name) in FREE:
                    continue
                if wrong == "not contiguous" and tensors[name].numel() == 1:
                    continue  # one number is contiguous whatever its strides
                yield pytest.param(face, name, wrong, id=f"{face}-{name}-{wrong}")


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(launch: _launch.Launch, device: torch.device) -> None:
        pytest.fail("something was launched")

    monkeypatch.setattr(_launch.Launch, "run", run)


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize(("face", "name", "wrong"), list(_cases()))
def test_a_tensor_that_cannot_be_right(face: str, name: str, wrong: str) -> None:
    call, tensors = FACES[face]
    bad = WRONGS[wrong](tensors[name])
    assert wrong != "not contiguous" or not bad.is_contiguous()
    with pytest.raises(ValueError, match=r"\d|meta"):
        call(**{**tensors, name: bad})


@pytest.mark.parametrize("face", FACES)
def test_what_is_right_is_launched(face: str) -> None:
    call, tensors = FACES[face]
    call(**tensors)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU that can run them is there")
@pytest.mark.parametrize("face", FACES)
def test_a_device_that_cannot_run_kernels(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the interpreter off there is none for tensors on the CPU."""
    call, tensors = FACES[face]
    monkeypatch.setattr(_launch, "is_interpreted", lambda kernel: False)
    with pytest.raises(KernelUnavailableError, match=r"the tensors are on cpu and the interpreter is off"):
        call(**tensors)


@pytest.mark.skipif(not INTERPRETED, reason="the kernels of another test would be compiled for it")
@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (7, 3), (33, 65), (130, 17)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_sizes_that_do_not_tile(hidden: int, width: int, tokens: int) -> None:
    torch.manual_seed(hidden)
    up = bank_matrix("plain", {"w": torch.randn(EXPERTS, 2 * width, hidden)}, "w")
    odd = Bank(up, bank_matrix("plain", {"w": torch.randn(EXPERTS, hidden, width)}, "w"), Gate())
    x, ids = torch.randn(tokens, hidden), torch.rand(tokens, EXPERTS).topk(TOP_K).indices
    rest = ids, torch.rand(tokens, TOP_K), torch.arange(EXPERTS, dtype=torch.int32)
    wanted = reference.decode_down(odd, reference.decode_gate_up(odd, x, *rest), *rest)
    assert (device_experts(odd, x, *rest).double() - wanted).norm() <= 1e-5 * wanted.norm()
