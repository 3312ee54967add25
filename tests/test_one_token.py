"""The short way of one token whose experts are all resident: the bits, counts and policy of the long one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moert.formats import TensorSpec
from moert.kernels.gate import Gate
from moert.policies import make_policy
from moert.residency import Residency
from moert.runtime import step as step_module
from moert.runtime.fused import FfnLayout, FusedExperts
from moert.runtime.layer import LayerSpec, ParameterLayer
from moert.runtime.pipeline import Pipeline
from moert.runtime.step import run_step

E, D, F = 6, 16, 8


def make(dtype: torch.dtype = torch.bfloat16, *, fused: bool = True) -> ParameterLayer:
    tensors = (TensorSpec("gate_up_proj", (2 * F, D), dtype), TensorSpec("down_proj", (D, F), dtype))
    kernels = FusedExperts(FfnLayout(), Gate(), tensors) if fused else None
    spec = LayerSpec(2, "experts", E, tensors, top_k=3, num_identity=1, fused=kernels)
    generator = torch.Generator().manual_seed(1)
    weights = [
        {tensor.name: (torch.randn(tensor.shape, generator=generator) / 4).to(dtype) for tensor in tensors}
        for _ in range(E)
    ]
    return ParameterLayer(spec, Residency(E, make_policy("ema", E)), weights)


def compute(hidden: torch.Tensor, weights: Any) -> torch.Tensor:
    gate, up = (hidden @ weights["gate_up_proj"].T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ weights["down_proj"].T


def run(layer: ParameterLayer, ids: list[int], weights: torch.Tensor, check: bool) -> torch.Tensor:
    dtype = layer.spec.tensors[0].dtype
    hidden = torch.randn((1, D), generator=torch.Generator().manual_seed(2)).to(dtype)
    # `check` is what keeps a step from the short way.
    return run_step(layer, compute, hidden, torch.tensor([ids]), weights, pipeline=Pipeline([layer], 4), check=check)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step that could have gone the short way did."""
    went = []
    right = step_module.run_one_token

    def noted(*args: Any) -> torch.Tensor | None:
        out = right(*args)
        went.append(out is not None)
        return out

    monkeypatch.setattr(step_module, "run_one_token", noted)
    return went


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("ids", "weights", "goes"),
    [
        ([4, 0, 3], [0.5, 0.2, 0.3], True),
        ([5], [1.0], True),
        ([4, 0, 3], [0.5, 0.0, 0.3], False),
        ([4, -1, 3], [0.5, 0.2, 0.3], False),
        ([4, E, 3], [0.5, 0.2, 0.3], False),
        ([4, E + 9, 3], [0.5, 0.2, 0.3], False),
        ([4, 4, 3], [0.5, 0.2, 0.3], False),
        ([-1, -1, E + 5], [0.5, 0.2, 0.3], False),
    ],
)
def test_bits_counts_and_policy_are_those_of_any_step(
    ids: list[int], weights: list[float], goes: bool, dtype: torch.dtype, weight_dtype: torch.dtype, short: list[bool]
) -> None:
    given = torch.tensor([weights], dtype=weight_dtype)
    layers = [make(dtype), make(dtype)]
    found = [run(layer, ids, given, check) for layer, check in zip(layers, (False, True), strict=True)]
    assert short == [goes]
    assert torch.equal(*found)
    assert found[0].dtype is dtype
    assert layers[0].stats.hits == layers[1].stats.hits
    scores = [[layer.residency.policy.score(expert) for expert in layer.ids] for layer in layers]  # type: ignore[attr-defined]
    assert scores[0] == scores[1]
    for layer in layers:
        layer.residency.check_integrity()
        assert not layer.residency.begin([]).hits  # a step can begin: none is under way


def test_nan_weights_are_computed_with(short: list[bool]) -> None:
    found = run(make(), [1, 2, 3], torch.tensor([[torch.nan, 1.0, 1.0]]), False)
    assert short == [True]
    assert found.isnan().all()


def test_an_expert_that_is_away_and_layers_without_kernels_take_the_long_way(short: list[bool]) -> None:
    weights = torch.tensor([[0.5, 0.2, 0.3]])
    want = run(make(torch.float32), [4, 0, 3], weights, True)
    found = run(make(torch.float32, fused=False), [4, 0, 3], weights, False)
    torch.testing.assert_close(found, want)
    layer = make()
    layer.residency.drop(layer.ids[3])
    layer.residency.admit(layer.ids[3])
    assert not layer.residency.begin_hits([layer.ids[0], layer.ids[3]])
    assert short == [False]
