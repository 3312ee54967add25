"""A layer of transformers' against its router and its experts by the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_support import DEVICE

from moert.kernels.bank import Bank, bank_matrix
from moert.kernels.device_experts import device_experts, grouped_experts, is_few
from moert.kernels.gate import Gate
from moert.kernels.router_rule import RouterRule
from moert.kernels.router_topk import router_topk

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 32, 8, 2
SLOTS = 11


def _layers() -> dict[str, tuple[Any, Any, RouterRule, Gate, bool]]:
    """Name -> router, experts, their rule and gate, and whether weights are transposed."""
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

    sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
    qwen = Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=WIDTH, norm_topk_prob=True, **sizes)
    gpt = GptOssConfig(num_local_experts=EXPERTS, intermediate_size=WIDTH, **sizes)
    clamped = Gate(interleaved=True, alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0)
    return {
        "qwen3": (Qwen3MoeTopKRouter(qwen), Qwen3MoeExperts(qwen), RouterRule(TOP_K, normalise=True), Gate(), False),
        "gpt-oss": (
            GptOssTopKRouter(gpt),
            GptOssExperts(gpt),
            RouterRule(TOP_K, "logits", "softmax"),
            clamped,
            True,
        ),
    }


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_a_layer_gives_what_transformers_gives(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    router, experts, rule, gate, transposed = _layers()[name]
    for parameter in (*router.parameters(), *experts.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    hidden = torch.randn(tokens, HIDDEN)
    with torch.no_grad():
        logits, weights, ids = router(hidden)
        wanted = experts(hidden, ids, weights)

    places = torch.randperm(SLOTS)[:EXPERTS]

    def matrix(part: str) -> Any:
        tensors = {}
        for name, suffix in ((part, ""), (f"{part}_bias", "_bias")):
            parameter = getattr(experts, name, None)
            if parameter is not None:
                rows = torch.full((SLOTS, *parameter.shape[1:]), torch.nan)
                rows[places] = parameter.detach()
                tensors[f"w{suffix}"] = rows.to(DEVICE)
        return bank_matrix("plain", tensors, "w", transposed=transposed)

    bank = Bank(matrix("gate_up_proj"), matrix("down_proj"), gate)
    slot_of = places.int().to(DEVICE)
    got_ids, got_weights, counts = router_topk(logits.to(DEVICE), rule)
    x = hidden.to(DEVICE)
    got = device_experts(bank, x, got_ids, got_weights, slot_of, counts=counts)
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)
    if is_few(tokens, TOP_K, EXPERTS):
        got = grouped_experts(bank, x, got_ids, got_weights, slot_of, counts=counts)
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)


def test_two_banks_share_a_step() -> None:
    """What each computes of it adds up to all of it, as with two devices, or with one and the CPU."""
    torch.manual_seed(0)
    up, down = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN), torch.randn(EXPERTS, HIDDEN, WIDTH)
    ids, weights = torch.rand(12, EXPERTS).topk(TOP_K)[::-1]
    x = torch.randn(12, HIDDEN)

    def part(mine: list[int]) -> torch.Tensor:
        bank = Bank(
            bank_matrix("plain", {"w": up[mine].to(DEVICE)}, "w"),
            bank_matrix("plain", {"w": down[mine].to(DEVICE)}, "w"),
            Gate(),
        )
        slot_of = torch.full((EXPERTS,), -1, dtype=torch.int32)
        slot_of[mine] = torch.arange(len(mine), dtype=torch.int32)
        return device_experts(bank, *(t.to(DEVICE) for t in (x, ids, weights, slot_of))).cpu()

    torch.testing.assert_close(part([0, 3, 4]) + part([1, 2, 5, 6, 7]), part(list(range(8))), rtol=1e-4, atol=1e-4)
