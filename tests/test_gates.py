"""Which gate a module has: found for the families, told apart from what is almost the same, never guessed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, SUPPORTED_FAMILIES, skeleton
from torch import nn
from transformers import GptOssConfig

from moert.errors import ConfigError
from moert.hf.adapters import ExpertsAdapter, find_experts
from moert.hf.gates import search_gate
from moert.kernels import reference
from moert.kernels.gate import ACTIVATIONS, Gate

F = torch.nn.functional

PLAIN = Gate()
GELU = Gate("gelu_tanh")
CLAMPED = Gate(gate_limit=1.0, up_limit=1.0)
GPT_OSS = Gate(alpha=1.702, gate_limit=1.0, up_limit=1.0, up_offset=1.0)
# In transformers 5.17 the limit of these two is no field of their configs.
FIXED = {} if hasattr(GptOssConfig(), "swiglu_limit") else {"gate_limit": 7.0, "up_limit": 7.0}

# The tiny models have limits of 1.0, and step3p7 another in each layer.
NOT_PLAIN: dict[str, list[Gate]] = {
    "deepseek_v4": [CLAMPED],
    "diffusion_gemma": [GELU],
    "gemma4": [GELU],
    "gemma4+vl": [GELU],
    "glm5_next": [CLAMPED],
    "gpt_oss": [replace(GPT_OSS, interleaved=True, **FIXED)],
    "hy_v4": [CLAMPED],
    "minimax_m3_vl": [GPT_OSS],
    "minimax_m3_vl+vl": [GPT_OSS],
    "nemotron_h": [Gate("relu2", gated=False)],
    "openai_privacy_filter": [replace(GPT_OSS, **FIXED)],
    "step3p7": [Gate(up_limit=0.25, output_limit=0.25), Gate(up_limit=0.5, output_limit=0.5), PLAIN],
}
# Its softcaps are tanh, of the gate and of what it is multiplied with.
UNKNOWN = {"inkling2", "inkling2+vl"}
# Its experts are functions of three matrices, the gate among their lines.
SPREAD_OUT = {"dbrx"}


def find_gate(module: nn.Module, width: int) -> Gate | None:
    return search_gate(module, width).gate


def adapters_of(family: str) -> list[ExpertsAdapter]:
    return list(find_experts(skeleton(family)).values())


def own_gate(adapter: ExpertsAdapter) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What the class itself computes, and None where that is spread over its forward."""
    module = adapter.module
    if not getattr(module, "has_gate", True):
        return module.act_fn  # type: ignore[no-any-return]
    return getattr(module, "_apply_gate", None) or getattr(adapter, "_apply_gate", None)


def width_of(adapter: ExpertsAdapter) -> int:
    shape = adapter.expert_shape("down_proj")
    return shape[0] if getattr(adapter.module, "is_transposed", False) else shape[1]


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_gate_of_every_family(family: str) -> None:
    found = []
    for adapter in adapters_of(family):
        own = own_gate(adapter)
        if own is None:
            assert family in SPREAD_OUT
            assert "no _apply_gate that could be tried" in str(search_gate(adapter, 1).reason)
            continue
        width = width_of(adapter)
        result = search_gate(adapter, width)
        assert (result.gate is None) == (result.reason is not None) == (family in UNKNOWN), result
        if result.gate is None:
            continue
        found.append(result.gate)
        torch.manual_seed(len(found))
        for scale in (0.01, 1, 5, 50):
            x = scale * torch.randn(7, width * (2 if result.gate.gated else 1))
            torch.testing.assert_close(reference.gate(result.gate, x), own(x), rtol=1e-6, atol=1e-6 * scale)
    if family not in UNKNOWN | SPREAD_OUT:
        assert list(dict.fromkeys(found)) == NOT_PLAIN.get(family, [PLAIN])


def test_families_listed_here_are_there() -> None:
    known = {name for name in (*NOT_PLAIN, *UNKNOWN) if name in FAMILIES}
    assert known <= set(SUPPORTED_FAMILIES)
    assert "gpt_oss" in known


def test_gpt_oss_with_the_sizes_of_the_hub() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig()
    with torch.device("meta"):
        module = GptOssExperts(config)
    expected = Gate(interleaved=True, alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0)
    assert find_gate(module, config.intermediate_size) == expected


def test_search_is_quick_at_full_width() -> None:
    gated = made_up(lambda self, g, u: F.silu(g) * u)
    find_gate(gated, 14336)
    times = []
    for _ in range(5):
        began = time.process_time()
        find_gate(gated, 14336)
        times.append(time.process_time() - began)
    # Milliseconds on one core; the margin is for processors and neighbours of all kinds.
    assert min(times) < 0.2


def made_up(gate: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor], **numbers: Any) -> nn.Module:
    """An experts module with that gate, and with the attributes that a search may look at."""

    class Experts(nn.Module):
        has_gate = True

        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return gate(self, *gate_up.chunk(2, dim=-1))

    module = Experts()
    for name, value in numbers.items():
        setattr(module, name, value)
    return module


def without_gate(act_fn: Any) -> nn.Module:
    module = nn.Module()
    module.has_gate = False  # type: ignore[assignment]
    module.act_fn = act_fn
    return module


def swiglu_oai(limit: float, alpha: float = 1.702, offset: float = 1.0) -> Callable[..., torch.Tensor]:
    def gate(self: Any, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        g = g.clamp(max=limit)
        return (u.clamp(-limit, limit) + offset) * (g * torch.sigmoid(alpha * g))

    return gate


def test_parameters_are_found_under_any_name() -> None:
    module = made_up(swiglu_oai(3.25, 1.3, 0.75), knob=3.25, steep=1.3, shift=0.75, hidden=2048, eps=1e-6, heads=7)
    assert find_gate(module, 48) == Gate(alpha=1.3, gate_limit=3.25, up_limit=3.25, up_offset=0.75)
    module.config = type("Config", (), {})()
    for name in ("knob", "steep", "shift"):
        setattr(module.config, name, vars(module).pop(name))
    assert find_gate(module, 48) == Gate(alpha=1.3, gate_limit=3.25, up_limit=3.25, up_offset=0.75)


@pytest.mark.parametrize(
    ("gate", "numbers"),
    [
        (swiglu_oai(6.9), {"limit": 7.0, "alpha": 1.702}),
        (swiglu_oai(7.01), {"limit": 7.0, "alpha": 1.702}),
        (swiglu_oai(7.0, offset=0.99), {"limit": 7.0, "alpha": 1.702}),
        (swiglu_oai(7.0, alpha=1.7025), {"limit": 7.0, "alpha": 1.702}),
        (lambda self, g, u: g * torch.sigmoid(1.01 * g) * u, {}),
        (lambda self, g, u: F.silu(g) * (u + 0.99), {}),
        (lambda self, g, u: F.silu(g) * u * 1.00001, {}),
        (lambda self, g, u: F.silu(g) * u.clamp(min=-7), {"limit": 7.0}),
        (lambda self, g, u: F.silu(g) * u.clamp(-7, 7.5), {"limit": 7.0, "other": 7.5}),
        (lambda self, g, u: F.silu(g.clamp(-7, 7)) * u, {"limit": 7.0}),
        (lambda self, g, u: (F.silu(g) * u).clamp(max=7), {"limit": 7.0}),
        (lambda self, g, u: F.silu(g.nan_to_num()) * u, {}),
        (lambda self, g, u: F.silu(g) * u.nan_to_num(posinf=math.inf, neginf=-math.inf), {}),
        (lambda self, g, u: torch.where(g.isnan(), math.inf, F.silu(g)) * u, {}),
        (lambda self, g, u: F.silu(g) * u.clamp(-1e30, 1e30), {}),
        (lambda self, g, u: F.silu(u) * g, {}),
        (lambda self, g, u: F.mish(g) * u, {}),
        (lambda self, g, u: F.leaky_relu(g) * u, {}),
        (lambda self, g, u: F.hardswish(g) * u, {}),
        (lambda self, g, u: F.gelu(g.clamp(max=1e5)) * u, {}),
        (lambda self, g, u: F.silu(g) * u * torch.linspace(1, 1.1, g.shape[-1]).to(g.dtype), {}),
        (lambda self, g, u: F.silu(g) * u / g.shape[0], {}),
        (lambda self, g, u: F.silu(g - g.mean(-1, keepdim=True)) * u, {}),
        (lambda self, g, u: F.silu(g) * u if g.dtype == torch.float32 else F.relu(g) * u, {}),
    ],
)
def test_almost_the_same_is_told_apart(gate: Any, numbers: dict[str, float]) -> None:
    result = search_gate(made_up(gate, **numbers), 48)
    assert result.gate is None
    assert "do not offer" in str(result.reason)


def test_a_single_row_may_not_be_another_case() -> None:
    assert find_gate(made_up(lambda self, g, u: F.silu(g) * u), 2) == PLAIN
    assert find_gate(made_up(lambda self, g, u: F.silu(g) * u * (1 if len(g) > 1 else 1.5)), 2) is None


def test_the_two_gelus_are_told_apart() -> None:
    assert find_gate(made_up(lambda self, g, u: F.gelu(g) * u), 48) == Gate("gelu")
    assert find_gate(made_up(lambda self, g, u: F.gelu(g, approximate="tanh") * u), 48) == Gate("gelu_tanh")
    assert find_gate(made_up(lambda self, g, u: g * torch.sigmoid(1.702 * g) * u), 48) == Gate(alpha=1.702)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", Gate("silu", gated=False)),
        ("gelu", Gate("gelu", gated=False)),
        ("gelu_python", Gate("gelu", gated=False)),
        ("gelu_new", Gate("gelu_tanh", gated=False)),
        ("gelu_fast", Gate("gelu_tanh", gated=False)),
        ("gelu_accurate", Gate("gelu_tanh", gated=False)),
        ("gelu_pytorch_tanh", Gate("gelu_tanh", gated=False)),
        ("gelu_python_tanh", Gate("gelu_tanh", gated=False)),
        ("quick_gelu", Gate("silu", gated=False, alpha=1.702)),
        ("relu", Gate("relu", gated=False)),
        ("relu2", Gate("relu2", gated=False)),
        ("sigmoid", Gate("sigmoid", gated=False)),
        ("tanh", Gate("tanh", gated=False)),
        ("linear", Gate("identity", gated=False)),
        ("gelu_10", None),
        ("relu6", None),
        ("mish", None),
        ("leaky_relu", None),
        ("laplace", None),
        ("prelu", None),
        ("sqrtsoftplus", None),
    ],
)
def test_activations_of_transformers(name: str, expected: Gate | None) -> None:
    from transformers.activations import ACT2FN

    assert find_gate(without_gate(ACT2FN[name]), 40) == expected
    if expected is not None and expected.activation != "identity":
        act = ACT2FN[name]
        gated = made_up(lambda self, g, u: act(g) * u)
        assert find_gate(gated, 40) == Gate(expected.activation, alpha=expected.alpha)


def test_clipped_activation_is_one_with_an_output_limit() -> None:
    from transformers.activations import ACT2FN

    module = made_up(lambda self, g, u: self.act_fn(g) * u)
    module.act_fn = ACT2FN["gelu_10"]
    # gelu(10) is 10 in fp32, so it may be clipped before or after.
    assert find_gate(module, 40) in (Gate("gelu", output_limit=10.0), Gate("gelu", gate_limit=10.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_surroundings_of_the_search_do_not_matter(dtype: torch.dtype) -> None:
    module = made_up(swiglu_oai(7.0), limit=7.0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            found = find_gate(module, 48)
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == Gate(alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0)


def raise_(self: Any, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("not today")


def count_calls(self: Any, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    return F.silu(g) * u * (1 if self.calls < 2 else 1.5)


@pytest.mark.parametrize(
    ("gate", "attributes", "reason"),
    [
        (raise_, {}, "ZeroDivisionError: not today"),
        (count_calls, {"calls": 0}, "call to call"),
        (lambda self, g, u: F.dropout(F.silu(g), training=self.training) * u, {}, "call to call"),
        (lambda self, g, u: self.drop(F.silu(g)) * u, {"drop": nn.Dropout().eval()}, "call to call|train"),
        (lambda self, g, u: F.silu(g) * u * self.scale, {"scale": nn.Parameter(torch.ones(48))}, r"shape \[48\]"),
        (lambda self, g, u: F.silu(g) * u * self.scale, {"scale": torch.ones(())}, r"shape \[\]"),
        (lambda self, g, u: F.silu(g), {}, None),
        (lambda self, g, u: torch.cat([g, u], -1), {}, r"\[.*96\].*not \[.*48\]"),
        (lambda self, g, u: (F.silu(g) * u).half(), {}, "torch.float16"),
        (lambda self, g, u: None, {}, "NoneType"),
    ],
)
def test_what_else_a_gate_may_depend_on(gate: Any, attributes: dict[str, Any], reason: str | None) -> None:
    import re

    module = made_up(gate, **attributes)
    random = torch.get_rng_state()
    modes = [part.training for part in module.modules()]
    result = search_gate(module, 48)
    assert result.gate is None
    assert re.search(reason or "do not offer", str(result.reason)), result.reason
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in module.modules()] == modes


def test_gate_that_is_another_in_training_is_told_in_evaluation() -> None:
    module = made_up(lambda self, g, u: F.silu(g) * u * (1 + self.training)).eval()
    assert "train() to eval()" in str(search_gate(module, 48).reason)
    assert not module.training


def test_module_without_a_gate_says_so() -> None:
    assert "_apply_gate" in str(search_gate(nn.Linear(2, 2), 4).reason)


@pytest.mark.parametrize(
    "how",
    [
        PLAIN,
        GPT_OSS,
        Gate(interleaved=True, output_limit=0.5),
        Gate("gelu", up_limit=2.0),
        Gate("tanh", gate_limit=-0.5),
        *(Gate(name) for name in ACTIVATIONS),
        *(Gate(name, gated=False) for name in ACTIVATIONS),
    ],
    ids=str,
)
def test_meaning_of_a_gate_number_by_number(how: Gate) -> None:
    functions: dict[str, Callable[[float], float]] = {
        "silu": lambda v: v / (1 + math.exp(-how.alpha * v)),
        "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
        "gelu_tanh": lambda v: v / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "relu": lambda v: max(v, 0.0),
        "relu2": lambda v: max(v, 0.0) ** 2,
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
        "tanh": math.tanh,
        "identity": lambda v: v,
    }
    act = functions[how.activation]
    x = torch.linspace(-4, 4, 24, dtype=torch.float64)[torch.randperm(24)].view(2, 12)
    expected = []
    for row in x.tolist():
        if not how.gated:
            expected.append([act(v) for v in row])
            continue
        pairs = zip(row[0::2], row[1::2], strict=True) if how.interleaved else zip(row[:6], row[6:], strict=True)
        expected.append(
            [
                min(act(min(g, how.gate_limit)), how.output_limit)
                * (max(-how.up_limit, min(u, how.up_limit)) + how.up_offset)
                for g, u in pairs
            ]
        )
    torch.testing.assert_close(
        reference.gate(how, x), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def test_nan_goes_through_every_clamp() -> None:
    how = Gate(gate_limit=1, up_limit=1, output_limit=1)
    x = torch.tensor([[math.nan, 1.0, 1.0, math.nan]])
    assert reference.gate(how, x).isnan().all()


def test_odd_number_of_columns_has_no_halves() -> None:
    with pytest.raises(ValueError, match="3"):
        reference.gate(PLAIN, torch.ones(1, 3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation", "swish"),
        ("alpha", math.inf),
        ("alpha", math.nan),
        ("up_offset", math.nan),
        ("gate_limit", math.nan),
        ("output_limit", -math.inf),
        ("up_limit", -1.0),
        ("up_limit", math.nan),
    ],
)
def test_field_without_a_meaning_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        Gate(**{name: value})


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="alpha"):
        Gate("gelu", alpha=1.702)
    for name in ("gate_limit", "up_limit", "up_offset", "output_limit"):
        with pytest.raises(ConfigError, match=name):
            Gate(gated=False, **{name: 1.0})
    with pytest.raises(ConfigError, match="interleaved"):
        Gate(gated=False, interleaved=True)
