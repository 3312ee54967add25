"""Models whose experts are on a GPU, or on the CPU with the GPU's kernels under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_support
from families import build, inputs_for

import moert
from moert.runtime import device_layer

# Sums are in another order than those of the model's own loop, in fp32 both.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the experts are that the kernels compute."""
    if request.param == "cuda":
        return "cuda"
    if not triton_support.INTERPRETED:
        pytest.skip("triton's interpreter is off: there is a GPU")
    monkeypatch.setattr(device_layer, "DEVICE_TYPES", {"cpu"})
    return "cpu"


@pytest.fixture
def olmoe(device: str) -> Iterator[Any]:
    """A patched OLMoE."""
    model = build("olmoe").to(device)
    moert.patch(model)
    yield model
    moert.close(model)


def moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def prompts(family: str, model: Any, device: str, rows: int, length: int) -> dict[str, Any]:
    inputs = inputs_for(family, model)
    generator = torch.Generator().manual_seed(length)
    inputs["input_ids"] = torch.randint(3, 90, (rows, length), generator=generator)
    return moved(inputs, device)


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same computation a second time. On a GPU transformers adds up in no fixed order."""
    if got.is_cuda:
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    else:
        assert torch.equal(got, wanted)


@torch.no_grad()
def own_experts(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Pick by pick, each by the model's own code with one token; nothing for ids that are no experts."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    one = torch.ones(1, 1, device=hidden.device, dtype=weights.dtype)
    for token, (row, of_row) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(row, of_row, strict=True):
            if 0 <= expert < module.num_experts:
                pick = torch.tensor([[expert]], device=hidden.device)
                out[token] += weight * module(hidden[token : token + 1], pick, one)[0].double().cpu()
    return out
