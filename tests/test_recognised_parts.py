"""Routers and shared experts that trying recognises, whatever their class is called, and others that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moert.hf.dense_compute import take_over
from moert.hf.shared_expert import at, find_shared
from moert.hf.token_router import find_router
from moert.kernels.moe_block import pick

EXPERTS, HIDDEN = 32, 48


class Router(nn.Module):
    """Sigmoid scores, corrected, of the best groups; the switches turn parts of it off or into something else."""

    def __init__(self, **switches: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN).bfloat16(), requires_grad=False)
        self.correction = nn.Buffer(torch.randn(EXPERTS))
        self.top_k, self.groups, self.kept, self.factor = 4, 8, 3, 2.5
        self.fill, self.best, self.epsilon = float("-inf"), 2, 1e-20
        self.scores, self.is_sorted, self.is_fine, self.other = "sigmoid", False, True, False
        for name, value in switches.items():
            assert hasattr(self, name)
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = F.linear(x.float(), self.weight.float()) if self.is_fine else F.linear(x, self.weight)
        if self.scores == "roots":
            scores = F.softplus(logits).sqrt()
        else:
            scores = logits.sigmoid() if self.scores == "sigmoid" else logits.softmax(-1)
        choice = scores if self.correction is None else scores + self.correction
        if self.groups:
            in_groups = choice.view(-1, self.groups, EXPERTS // self.groups)
            kept = in_groups.topk(self.best, dim=-1)[0].sum(-1).topk(self.kept, dim=-1)[1]
            mask = torch.zeros(choice.shape[0], self.groups).scatter_(1, kept, 1)[..., None].expand_as(in_groups)
            choice = choice.masked_fill(mask.reshape(choice.shape) == 0, self.fill)
        ids = choice.topk(self.top_k, dim=-1, sorted=self.is_sorted)[1]
        weights = scores.gather(1, ids)
        if self.other:
            weights = weights.square()
        weights = weights / (weights.sum(-1, keepdim=True) + self.epsilon)
        return logits, weights * self.factor, ids


KNOWN: list[dict[str, Any]] = [
    {},
    {"is_sorted": True},
    {"groups": 0},
    {"correction": None},
    {"best": 1},
    {"fill": 0.0},
    {"scores": "softmax"},
    {"epsilon": 0.0, "factor": 1.0},
    {"is_fine": False},
    {"is_fine": False, "correction": None, "groups": 0},
    {"is_fine": False, "scores": "softmax", "fill": 0.0, "correction": None},
]


@pytest.mark.parametrize("switches", KNOWN, ids=str)
def test_routers_that_are_recognised(switches: dict[str, Any]) -> None:
    router = Router(**switches)
    assert take_over(router, None) == 1
    found = find_router(router, torch.bfloat16)
    assert found is not None
    assert found.is_complete
    assert found.router.correction is router.correction
    # The class's own code on other tokens, whatever product it makes.
    torch.manual_seed(11)
    for magnitude in (0.05, 0.5):
        for row in (torch.randn(40, HIDDEN) * magnitude).bfloat16():
            logits, weights, ids = router(row[None])
            found_ids, found_weights = pick(found.router, logits[0].float())
            assert torch.equal(found_ids, ids[0])
            torch.testing.assert_close(found_weights, weights[0].float(), rtol=2**-20, atol=0)


class Unlike(Router):
    """Whose product is of something else."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(x * 2)


@pytest.mark.parametrize("switches", [{"scores": "roots"}, {"other": True}, {"factor": 0.3, "best": 3}], ids=str)
def test_routers_that_are_not(switches: dict[str, Any]) -> None:
    router = Router(**switches)
    take_over(router, None)
    assert find_router(router, torch.bfloat16) is None


def test_router_of_another_product_is_not() -> None:
    router = Unlike()
    take_over(router, None)
    assert find_router(router, torch.bfloat16) is None


class Mlp(nn.Module):
    """The linear layers of a shared expert."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, rows: tuple[int, ...] = (24, 24)) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(HIDDEN, rows[0], bias=False, dtype=dtype)
        if len(rows) > 1:
            self.second = nn.Linear(HIDDEN, rows[1], bias=True, dtype=dtype)
        self.last = nn.Linear(24, HIDDEN, bias=False, dtype=dtype)
        self.act = nn.SiLU()
        self.requires_grad_(False)


class Gated(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)) * self.second(x))


class GateLast(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) * F.gelu(self.second(x), approximate="tanh"))


class Limited(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.first(x).clamp(max=7.0)
        return self.last((self.second(x).clamp(-7.0, 7.0) + 1) * (gate * torch.sigmoid(gate * 1.702)))


class Ungated(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.first(x)).square())


class Fused(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.first(x).chunk(2, dim=-1)
        return self.last(F.silu(gate) * up)


SHARED: list[tuple[type[Mlp], tuple[int, ...]]] = [
    (Gated, (24, 24)),
    (GateLast, (24, 24)),
    (Limited, (24, 24)),
    (Ungated, (24,)),
    (Fused, (48,)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "rows"), SHARED)
def test_shared_experts_that_are_recognised(kind: type[Mlp], rows: tuple[int, ...], dtype: torch.dtype) -> None:
    module: Any = kind(dtype, rows)
    assert take_over(module, None) == len(rows) + 1
    found = find_shared(module)
    assert found is not None
    expert = found.expert
    x = torch.randn(5, HIDDEN).to(dtype)
    up = F.linear(x, *expert.up)
    if expert.gate is None:
        h = at(expert.curve, up)
    else:
        assert expert.up_curve is not None
        h = at(expert.curve, F.linear(x, *expert.gate)) * at(expert.up_curve, up)
    # torch's products on both sides: what is compared is what happens between them.
    for child in (*module.children(), module):
        vars(child).pop("forward", None)
    assert torch.equal(F.linear(h, *expert.down), module(x))


class Crossed(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x) + self.second(x)))


class Neighbours(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)).roll(1, -1) * self.second(x))


class Scaled(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.last(self.act(self.first(x)) * self.second(x))


class OfOther(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)) * self.second(x + 1))


@pytest.mark.parametrize("kind", [Crossed, Neighbours, Scaled, OfOther])
def test_shared_experts_that_are_not(kind: type[Mlp]) -> None:
    module = kind()
    take_over(module, None)
    assert find_shared(module) is None
