"""Every format in every layout with every kind of gate, by either family of kernels; and steps of 1 to 4,096 tokens."""

from __future__ import annotations

import pytest
import torch
from test_triton_decode import ERROR, relative
from test_triton_grouped import CLAMPED, LIMITS, Layer, check, error
from triton_support import DEVICE, FORMATS

from moert.kernels import reference, reference_grouped
from moert.kernels.configs import DecodeConfig
from moert.kernels.decode_down import decode_down
from moert.kernels.decode_gate_up import decode_gate_up
from moert.kernels.device_experts import device_experts, is_few
from moert.kernels.gate import Gate
from moert.kernels.grouped_configs import GroupedConfig, block_m_for
from moert.kernels.grouped_down import grouped_down
from moert.kernels.grouped_gate_up import grouped_gate_up

STORED = (
    *(("plain", dtype, transposed) for dtype in (torch.bfloat16, torch.float16) for transposed in (False, True)),
    *((choice, torch.bfloat16, False) for choice in FORMATS[1:]),
)

GATES = (
    *(Gate(name, interleaved=interleaved) for name in ("silu", "gelu_tanh", "relu2") for interleaved in (False, True)),
    *(Gate(name, gated=False) for name in ("silu", "gelu_tanh", "relu2")),
    Gate(alpha=CLAMPED.alpha, gate_limit=0.5, up_limit=0.7, up_offset=1.0),
    Gate(alpha=CLAMPED.alpha, gate_limit=0.5, up_limit=0.7, up_offset=1.0, interleaved=True),
)
"""The limits are where numbers of these layers reach them."""


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize(
    "stored", STORED, ids=lambda way: f"{way[0]},{str(way[1])[6:]}{',transposed' if way[2] else ''}"
)
def test_every_combination(stored: tuple[str, torch.dtype, bool], gate: Gate) -> None:
    choice, dtype, transposed = stored
    number = STORED.index(stored) + GATES.index(gate)
    layer = Layer(
        choice,
        gate,
        dtype=dtype,
        tokens=2,
        top_k=2,
        experts=4,
        present=3,
        slots=4,
        transposed=transposed,
        bias=number % 2 == 0,
        seed=number,
    )
    config = DecodeConfig(block_n=128, block_k=128, block_picks=2)
    h = torch.full((4, layer.bank.width), torch.nan, device=DEVICE)
    decode_gate_up(layer.bank, layer.x, *layer.step, out=h, config=config)
    wanted, _ = layer.wanted()
    computed = ~wanted.isnan().all(1)
    assert computed.any() and torch.equal(h.cpu().isnan(), wanted.isnan())
    assert relative(h[computed.to(DEVICE)], wanted[computed]) < ERROR
    y = decode_down(layer.bank, h, *layer.step, config=config)
    assert relative(y, reference.decode_down(layer.bank, h, *layer.step)) < ERROR
    check(layer, GroupedConfig(256, 128, swapped=number % 3 == 0))


SIZES = {"experts": 8, "present": 6, "slots": 6, "hidden": 40, "width": 24}


@pytest.mark.parametrize(("tokens", "block_m"), [(1, 16), (3, 16), (16, 16), (65, 32), (128, 64)])
def test_steps_of_few_tokens_and_of_more(tokens: int, block_m: int) -> None:
    """By both families, as the tables say."""
    layer = Layer(dtype=torch.float32, tokens=tokens, top_k=2, seed=tokens, **SIZES)
    assert is_few(tokens, 2, 8) == (tokens == 1)
    assert block_m_for(tokens * 2, 8, 90) == block_m
    _, wanted = layer.wanted()
    assert error(device_experts(layer.bank, layer.x, *layer.step), wanted) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_products_of_4096_tokens(dtype: torch.dtype) -> None:
    """In the largest blocks; their sum has a program for each token, which is much to interpret."""
    layer = Layer(dtype=dtype, tokens=4096, top_k=2, **SIZES)
    block_m = block_m_for(8192, 8, 90)
    assert block_m == 128
    blocks, (h, _) = layer.blocks(block_m), layer.wanted()
    got = grouped_gate_up(layer.bank, layer.x, blocks, out=torch.full(h.shape, torch.nan, dtype=dtype, device=DEVICE))
    assert torch.equal(got.isnan().cpu(), h.isnan())
    assert error(got, h) < LIMITS[dtype]
    rows = grouped_down(layer.bank, got, layer.weights, blocks)
    wanted = reference_grouped.grouped_down(layer.bank, got.cpu(), *map(torch.Tensor.cpu, layer.step))
    assert error(rows, wanted) < LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("choice", FORMATS)
@pytest.mark.parametrize("tokens", [24, 4096])
def test_many_tokens_in_the_sizes_of_a_real_model(choice: str, tokens: int) -> None:
    layer = Layer(choice, tokens=tokens, top_k=4, experts=16, present=13, slots=14, hidden=2048, width=768)
    got = device_experts(layer.bank, layer.x, *layer.step)
    places = torch.arange(0, tokens, max(1, tokens // 16), device=DEVICE)
    step = layer.ids[places], layer.weights[places], layer.slot_of
    h = reference.decode_gate_up(layer.bank, layer.x[places], *step)
    assert error(got[places], reference.decode_down(layer.bank, h, *step)) < 8e-3
