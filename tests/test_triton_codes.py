"""Every code of every format on the device, against what torch and the formats make of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton_support import DEVICE

from moert.kernels import _codes

BYTES = torch.arange(256, dtype=torch.uint8)


@triton.jit
def _decode(codes_ptr, out_ptr, KIND: tl.constexpr, zero):
    places = tl.arange(0, 256)
    codes = tl.load(codes_ptr + places)
    if KIND == "e2m1":
        numbers = _codes.e2m1(codes & 15) * _codes.E2M1_FACTOR
    elif KIND == "e4m3":
        numbers = _codes.e4m3(codes) * _codes.E4M3_FACTOR
    elif KIND == "e8m0":
        numbers = _codes.e8m0(codes)
    elif KIND == "whole":
        numbers = _codes.whole(codes, zero)
    else:
        numbers = _codes.signed(codes.to(tl.int8, bitcast=True))
    tl.store(out_ptr + places, numbers)


def decoded(kind: str, zero: float = 0.0) -> torch.Tensor:
    out = torch.empty(256, device=DEVICE)
    _decode[(1,)](BYTES.to(DEVICE), out, kind, zero)
    return out.cpu()


def assert_equal(numbers: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(numbers, wanted, rtol=0, atol=0, equal_nan=True)


def test_e4m3() -> None:
    wanted = BYTES.view(torch.float8_e4m3fn).float()
    assert wanted.isnan().sum() == 2
    assert_equal(decoded("e4m3"), wanted)


def test_e2m1() -> None:
    sizes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert_equal(decoded("e2m1"), torch.tensor([*sizes, *(-size for size in sizes)]).repeat(16))


def test_e8m0() -> None:
    wanted = torch.exp2(BYTES.double() - 127).float()
    wanted[255] = torch.nan
    assert wanted[0] == 2**-127, "a subnormal number, which must not be lost"
    assert_equal(decoded("e8m0"), wanted)


def test_whole_numbers() -> None:
    for zero in (0.0, 8.0, 15.0):
        assert_equal(decoded("whole", zero), BYTES.float() - zero)
    assert_equal(decoded("signed"), BYTES.view(torch.int8).float())
