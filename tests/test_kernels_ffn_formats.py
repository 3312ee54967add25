"""Whole experts on the CPU in every format: their error, special values, and experts of several formats in a step.

Relative error of what an expert gives (D = 1024, F = 256, silu, gated) against double precision with the weights before
they were quantised, as `ERRORS` holds it; with outliers: 4 of 1024 columns of up and of 256 columns of down x20:

    format             Gaussian   weights with outliers
    fp32               < 1e-6     < 1e-6
    bf16               0.0016     0.0015
    fp16               0.0002     0.0002
    int8               0.015      0.023
    int4, g32          0.146      0.262
    int4, g32, zeros   0.140      0.186
    int4, g128         0.175      0.436
    int4, g128, zeros  0.169      0.265
    fp8                0.046      0.051
    mxfp4              0.204      0.274

bf16, fp16: only h is rounded to that type; x and the weights are exact in it.
"""

from __future__ import annotations

import pytest
import torch

from moert.formats.fp8 import Fp8
from moert.formats.int4 import Int4
from moert.formats.int8 import Int8
from moert.formats.mxfp4 import Mxfp4
from moert.kernels.cpu_ffn import Expert, ExpertFfn
from moert.kernels.cpu_matrix import matrix
from moert.kernels.gate import Gate

ENCODERS = {
    "int8": Int8(),
    "int4": Int4(),
    "int4 zeros": Int4(symmetric=False),
    "int4 128": Int4(128),
    "int4 128 zeros": Int4(128, symmetric=False),
    "fp8": Fp8(),
    "mxfp4": Mxfp4(),
}
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ERRORS = {
    "fp32": (0, 0),
    "bf16": (0.00163, 0.00150),
    "fp16": (0.000215, 0.000200),
    "int8": (0.0153, 0.0225),
    "int4": (0.146, 0.262),
    "int4 zeros": (0.140, 0.186),
    "int4 128": (0.175, 0.436),
    "int4 128 zeros": (0.169, 0.265),
    "fp8": (0.046, 0.051),
    "mxfp4": (0.204, 0.274),
}
HIDDEN, WIDTH = 1024, 256


def made(name: str, ffn: ExpertFfn, up: torch.Tensor, down: torch.Tensor) -> Expert:
    """An expert whose weights are stored in that format."""
    if name in PLAIN:
        tensors = {"up": up.to(PLAIN[name]), "down": down.to(PLAIN[name])}
        return ffn.expert(matrix("plain", tensors, "up"), matrix("plain", tensors, "down"))
    tensors = ENCODERS[name].encode({"up": up, "down": down})
    form = name.split(maxsplit=1)[0]
    return ffn.expert(matrix(form, tensors, "up"), matrix(form, tensors, "down"))


def exact(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gates, ups = (x.double() @ up.double().T).chunk(2, -1)
    return (torch.nn.functional.silu(gates) * ups) @ down.double().T


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("name", [*PLAIN, *ENCODERS])
def test_error_of_an_expert_is_that_of_the_table(isa: str, name: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    dtype = PLAIN.get(name, torch.bfloat16)
    x = torch.randn(32, HIDDEN, generator=generator).to(dtype)
    for outliers, stated in enumerate(ERRORS[name]):
        up = torch.randn(2 * WIDTH, HIDDEN, generator=generator) / HIDDEN**0.5
        down = torch.randn(HIDDEN, WIDTH, generator=generator) / WIDTH**0.5
        if outliers:
            up[:, 100::256] *= 20
            down[:, 30::64] *= 20
        if name in PLAIN:
            up, down = up.to(dtype), down.to(dtype)
        ffn = ExpertFfn(Gate(), HIDDEN, WIDTH, dtype)
        expert = made(name, ffn, up, down)
        out = torch.zeros(32, HIDDEN)
        for rows in torch.arange(32).split(tokens):
            ffn.run(x, [expert], [rows], [None], out)
        want = exact(x, up, down)
        error = ((out.double() - want).norm() / want.norm()).item()
        assert error == pytest.approx(stated, rel=0.03, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_a_token_that_is_not_finite_stays_alone(isa: str, name: str, bad: float) -> None:
    """As in torch the token has no finite output, and what the others give are the bits of before."""
    generator = torch.Generator().manual_seed(4)
    ffn = ExpertFfn(Gate(), 128, 128, torch.bfloat16)
    up, down = torch.randn(256, 128, generator=generator), torch.randn(128, 128, generator=generator)
    expert = made(name, ffn, up, down)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 128, generator=generator).bfloat16()
        good, out = torch.zeros(tokens, 128), torch.zeros(tokens, 128)
        ffn.run(x, [expert], [None], [None], good)
        x[tokens // 2, 77] = bad
        ffn.run(x, [expert], [None], [None], out)
        others = torch.arange(tokens) != tokens // 2
        assert not out[tokens // 2].isfinite().any()
        assert torch.equal(out[others], good[others])
        assert good.isfinite().all()


def test_experts_of_several_formats_in_one_step(isa: str) -> None:
    """Each packs x in a way of its own; one token, whose packed x is shared where it can be, and several."""
    generator = torch.Generator().manual_seed(5)
    ffn = ExpertFfn(Gate(), 128, 128, torch.bfloat16)
    names = ["bf16", "bf16", "int8", "fp8", "fp8", "mxfp4", "int4 128", "bf16"]
    weights = [(torch.randn(256, 128, generator=generator), torch.randn(128, 128, generator=generator)) for _ in names]
    experts = [made(name, ffn, *weight) for name, weight in zip(names, weights, strict=True)]
    for tokens in (1, 3):
        x = torch.randn(tokens, 128, generator=generator).bfloat16()
        together, apart = torch.zeros(tokens, 128), torch.zeros(tokens, 128)
        ffn.run(x, experts, [None] * 8, [None] * 8, together)
        for expert in experts:
            ffn.run(x, [expert], [None], [None], apart)
        assert torch.equal(together, apart)


def test_experts_of_one_token_each_have_their_own(isa: str) -> None:
    generator = torch.Generator().manual_seed(6)
    ffn = ExpertFfn(Gate(), 128, 128, torch.bfloat16)
    weights = [(torch.randn(256, 128, generator=generator), torch.randn(128, 128, generator=generator)) for _ in "1234"]
    experts = [made("bf16", ffn, *weight) for weight in weights]
    x = torch.randn(3, 128, generator=generator).bfloat16()
    rows = [torch.tensor([row]) for row in (2, 2, 0, 1)]
    together, apart = torch.zeros(3, 128), torch.zeros(3, 128)
    ffn.run(x, experts, rows, [None] * 4, together)
    for expert, of in zip(experts, rows, strict=True):
        ffn.run(x, [expert], [of], [None], apart)
    assert torch.equal(together, apart)
    assert together.any(dim=1).all()
