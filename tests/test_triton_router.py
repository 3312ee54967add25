"""The router kernel against transformers' own routers, and against plain torch in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_support import DEVICE

from moert.errors import ConfigError
from moert.kernels import reference_grouped
from moert.kernels.router_rule import RouterRule
from moert.kernels.router_topk import router_topk

TOKENS = 48


def _routers() -> dict[str, tuple[Any, RouterRule, bool]]:
    """Name -> a router of transformers' with random weights, its rule, whether its picks come best first."""
    from transformers import (
        DeepseekV2Config,
        DeepseekV3Config,
        Glm4MoeConfig,
        GptOssConfig,
        MixtralConfig,
        OlmoeConfig,
        Qwen3MoeConfig,
    )
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    size = {"hidden_size": 32, "num_experts_per_tok": 4}
    v3 = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    v3_rule = RouterRule(4, "sigmoid", "scores", True, 1e-20, 2.5, groups=4, kept_groups=2, group_score="top2")
    v2 = {"n_group": 5, "topk_group": 2, "routed_scaling_factor": 16.0}
    return {
        "olmoe": (OlmoeTopKRouter(OlmoeConfig(num_experts=64, **size)), RouterRule(4), True),
        "qwen3": (
            Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=60, norm_topk_prob=True, **size)),
            RouterRule(4, normalise=True),
            True,
        ),
        "mixtral": (
            MixtralTopKRouter(MixtralConfig(num_local_experts=8, **size)),
            RouterRule(4, normalise=True),
            True,
        ),
        "gpt-oss": (
            GptOssTopKRouter(GptOssConfig(num_local_experts=32, **size)),
            RouterRule(4, "logits", "softmax"),
            True,
        ),
        "deepseek-v3": (DeepseekV3TopkRouter(DeepseekV3Config(n_routed_experts=64, **size, **v3)), v3_rule, False),
        "glm4": (Glm4MoeTopkRouter(Glm4MoeConfig(n_routed_experts=24, **size, **v3)), v3_rule, False),
        "deepseek-v2": (
            DeepseekV2TopkRouter(
                DeepseekV2Config(n_routed_experts=40, topk_method="group_limited_greedy", **size, **v2)
            ),
            RouterRule(4, scale=16.0, groups=5, kept_groups=2),
            False,
        ),
    }


@pytest.mark.parametrize("name", ["olmoe", "qwen3", "mixtral", "gpt-oss", "deepseek-v3", "glm4", "deepseek-v2"])
def test_ids_and_weights_are_those_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    router, rule, best_first = _routers()[name]
    for tensor in (*router.parameters(), *router.buffers()):
        torch.nn.init.normal_(tensor)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(TOKENS, 32) / 4)
    bias = getattr(router, "e_score_correction_bias", None)
    bias = bias.to(DEVICE) if bias is not None else None
    assert bias is None or bias.std() > 0.5, "the bias should decide some picks"
    got, got_weights, counts = router_topk(logits.to(DEVICE), rule, bias=bias)
    if not best_first:
        ids, order = ids.sort()
        weights = weights.gather(1, order)
        got, order = got.cpu().sort()
        got_weights = got_weights.cpu().gather(1, order)
    assert torch.equal(got.cpu(), ids)
    torch.testing.assert_close(got_weights.cpu(), weights, rtol=1e-5, atol=1e-7)
    assert counts is not None
    assert torch.equal(counts.table.sum(0).cpu(), ids.flatten().bincount(minlength=logits.shape[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "rule",
    [
        RouterRule(1, "logits", "sigmoid"),
        RouterRule(3, "logits", "sigmoid", normalise=True),
        RouterRule(5, normalise=True, scale=0.5),
        RouterRule(3, "sigmoid", "scores", True, 1e-6),
        RouterRule(2, "softmax", groups=3, kept_groups=1, group_score="top2"),
    ],
)
def test_against_the_reference(rule: RouterRule, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = torch.randn(37, 21).to(dtype)
    bias = torch.randn(21) / 8 if rule.scores == "sigmoid" else None
    ids, weights = reference_grouped.router_topk(logits, rule, bias)
    got, got_weights, counts = router_topk(
        logits.to(DEVICE), rule, bias=None if bias is None else bias.to(DEVICE), dtype=dtype
    )
    assert torch.equal(got.cpu(), ids)
    assert got_weights.dtype == dtype
    assert counts is not None
    torch.testing.assert_close(got_weights.cpu().double(), weights, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    tokens = counts.chunk // rule.top_k
    for chunk, row in enumerate(counts.table.cpu()):
        assert torch.equal(row, ids[chunk * tokens :][:tokens].flatten().bincount(minlength=21).int())


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # in what fills a block up
@pytest.mark.parametrize("shift", [-300.0, 300.0])
@pytest.mark.parametrize("rule", [RouterRule(3), RouterRule(3, "logits", "softmax")])
def test_logits_far_from_0(rule: RouterRule, shift: float) -> None:
    torch.manual_seed(4)
    logits = torch.randn(5, 21) + shift
    ids, weights = reference_grouped.router_topk(logits, rule)
    got, got_weights, _ = router_topk(logits.to(DEVICE), rule)
    assert torch.equal(got.cpu(), ids)
    torch.testing.assert_close(got_weights.cpu().double(), weights, rtol=1e-5, atol=0)


def test_groups_of_scores_below_0() -> None:
    torch.manual_seed(5)
    rule = RouterRule(4, "sigmoid", groups=3, kept_groups=2, group_score="top2")
    logits, bias = torch.randn(9, 21), torch.randn(21) / 8 - 5
    ids, weights = reference_grouped.router_topk(logits, rule, bias)
    got, got_weights, _ = router_topk(logits.to(DEVICE), rule, bias=bias.to(DEVICE))
    assert torch.equal(got.cpu(), ids)
    torch.testing.assert_close(got_weights.cpu().double(), weights, rtol=1e-5, atol=0)


def test_of_equal_scores_the_lower_id_comes_first() -> None:
    """torch.topk picks others on the CPU, but its scores are the same."""
    torch.manual_seed(2)
    logits = torch.randint(0, 4, (64, 96)).float()
    got, weights, _ = router_topk(logits.to(DEVICE), RouterRule(8, "logits"))
    wanted = logits.sort(dim=-1, descending=True, stable=True)[1][:, :8]
    assert torch.equal(got.cpu(), wanted)
    values, ids = logits.topk(8)
    assert torch.equal(weights.cpu(), values)
    assert not torch.equal(ids, wanted), "torch.topk has come to break ties by id: say so in the docstring"


def test_ids_are_experts_and_no_two_alike_whatever_the_logits() -> None:
    logits = torch.zeros(6, 11)
    logits[0] = torch.nan
    logits[1, 4] = torch.nan
    logits[2] = -torch.inf
    logits[3, 2], logits[3, 3:] = torch.inf, -torch.inf
    logits[4, 1::2] = -0.0
    got, _, _ = router_topk(logits.to(DEVICE), RouterRule(5, "logits"))
    for row in got.tolist():
        assert len(set(row)) == 5 and all(0 <= expert < 11 for expert in row)
    assert got.tolist()[0] == got.tolist()[2] == got.tolist()[4] == [0, 1, 2, 3, 4]
    assert got[1, 0] == 4
    assert got[3, :3].tolist() == [2, 0, 1]


def test_weights_of_zero_are_not_counted() -> None:
    logits = torch.tensor([[200.0, 0.0, -1.0], [1.0, 0.0, -1.0]], device=DEVICE)
    _, weights, counts = router_topk(logits, RouterRule(2))
    assert counts is not None and weights[0, 1] == 0
    assert counts.table.sum(0).tolist() == [2, 1, 0]


def test_zero_tokens() -> None:
    ids, weights, counts = router_topk(torch.empty(0, 8, device=DEVICE), RouterRule(2))
    assert ids.shape == weights.shape == (0, 2) and counts is not None and counts.table.shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, "3 experts: there must be 4"),
        ({"logits": torch.zeros(2, 16).double()}, "float64"),
        ({"logits": torch.zeros(16, 2).T}, "contiguous"),
        ({"logits": torch.zeros(16)}, r"\[16\]"),
        ({"logits": torch.zeros(2, 9), "rule": RouterRule(4, groups=2)}, "2 groups of equal size"),
        ({"logits": torch.zeros(2, 8), "rule": RouterRule(1, groups=8, group_score="top2")}, "need two"),
        ({"bias": torch.zeros(4)}, "4 numbers for 16 experts"),
        ({"bias": torch.zeros(16, device="meta")}, "meta"),
        ({"dtype": torch.int32}, "int32"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 16), "rule": RouterRule(4), "bias": None, **change}
    with pytest.raises(ValueError, match=message):
        router_topk(arguments.pop("logits"), arguments.pop("rule"), **arguments)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 0},
        {"top_k": 2, "scores": "tanh"},
        {"top_k": 2, "weights": "logits"},
        {"top_k": 2, "groups": 2, "kept_groups": 3},
        {"top_k": 2, "epsilon": -1.0},
        {"top_k": 2, "scale": float("nan")},
    ],
)
def test_rules_that_make_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RouterRule(**fields)
