"""On the device: the numbers that stored codes stand for, exactly; `moert.formats` says what is stored.

Codes are carried as bytes and become numbers by placing their bits, since fp8 is no type that every supported
architecture has, and since conversions from integers are slow on some.
"""

from __future__ import annotations

import triton
import triton.language as tl

E2M1_FACTOR = tl.constexpr(16384.0)
"""What `e2m1` leaves to be multiplied with, once a sum is made: the bias of fp16 over that of e2m1."""

E4M3_FACTOR = tl.constexpr(256.0)
"""The same for `e4m3`."""


@triton.jit
def e2m1(codes: tl.tensor) -> tl.tensor:
    """uint8 codes 0..15 -> fp32, over `E2M1_FACTOR`."""
    bits = codes.to(tl.uint16)
    return (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e4m3(codes: tl.tensor) -> tl.tensor:
    """uint8 -> fp32, over `E4M3_FACTOR`; NaN stays NaN."""
    bits = codes.to(tl.uint16)
    small = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32)
    # Placed as a number, the code of NaN is the only one above the largest, 448 / 256.
    return tl.where(tl.abs(small) > 1.75, float("nan"), small)


@triton.jit
def e8m0(codes: tl.tensor) -> tl.tensor:
    """uint8 exponents -> fp32 powers of two, 2^-127 to 2^127, and NaN for 255."""
    power = (codes.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    power = tl.where(codes == 0, 5.877471754111438e-39, power)
    return tl.where(codes == 255, float("nan"), power)


@triton.jit
def whole(codes: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """uint8 minus `zero` (0..255, fp32 or a number) -> fp32."""
    # 2^23 + code: the code lies in the last bits of the mantissa.
    shifted = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    return shifted - (zero + 8388608.0)


@triton.jit
def signed(codes: tl.tensor) -> tl.tensor:
    """int8 -> fp32."""
    return whole(codes.to(tl.uint8, bitcast=True) ^ 0x80, 128.0)
