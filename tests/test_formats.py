"""Quantised formats: golden bytes, error bounds by closed form, every code value, and what is refused.

Relative error (Frobenius norm of the difference over that of the weight), as measured and as `ERRORS` holds it:

    format             Gaussian   4 of 4096 columns x20
    int8               0.0053     0.0081
    int4, g32          0.083      0.111
    int4, g32, zeros   0.079      0.090
    int4, g128         0.099      0.190
    int4, g128, zeros  0.096      0.143
    fp8                0.027      0.026
    mxfp4              0.115      0.139
"""

from __future__ import annotations

import itertools

import pytest
import torch

from moert.errors import ConfigError, UnsupportedModelError
from moert.formats import Format, TensorSpec, make_format
from moert.formats.fp8 import Fp8
from moert.formats.int4 import Int4
from moert.formats.int8 import Int8
from moert.formats.mxfp4 import Mxfp4

FORMATS = {
    "int8": Int8(),
    "int4": Int4(),
    "int4 zeros": Int4(32, symmetric=False),
    "int4 128": Int4(128),
    "int4 128 zeros": Int4(128, symmetric=False),
    "fp8": Fp8(),
    "mxfp4": Mxfp4(),
}
INT4 = [name for name in FORMATS if name.startswith("int4")]
ERRORS = {
    "int8": (0.0053, 0.0081),
    "int4": (0.083, 0.111),
    "int4 zeros": (0.079, 0.090),
    "int4 128": (0.099, 0.190),
    "int4 128 zeros": (0.096, 0.143),
    "fp8": (0.0265, 0.0261),
    "mxfp4": (0.115, 0.139),
}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.fixture(params=list(FORMATS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(n: int, k: int) -> torch.Tensor:
    weight = gaussian(n, k)
    weight[:, 500::1000] *= 20
    return weight


def encode(form: Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key.removeprefix("w"): value for key, value in form.encode({"w": weight}).items()}


def back(form: Format, weight: torch.Tensor) -> torch.Tensor:
    return form.decode(form.encode({"w": weight}))["w"]


def meaning(name: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formats' definition in fp64, a number at a time."""
    codes, scales = parts[""], parts["_scales"]
    n, k = codes.shape[0], codes.shape[1] * (1 if name in ("int8", "fp8") else 2)
    out = torch.empty(n, k, dtype=torch.float64)
    for row, column in itertools.product(range(n), range(k)):
        if name == "int8":
            value = codes[row, column].item() * scales[row, column // 32].item()
        elif name == "fp8":
            value = codes[row, column].view(torch.float8_e4m3fn).item() * scales[row // 128, column // 128].item()
        else:
            nibble = codes[row, column // 2].item() >> (4 * (column % 2)) & 15
            if name == "mxfp4":
                value = E2M1[nibble] * 2.0 ** (scales[row, column // 32].item() - 127)
            else:
                group = k // scales.shape[1]
                zero = parts["_zeros"][row, column // group].item() if "_zeros" in parts else 8
                value = (nibble - zero) * scales[row, column // group].item()
        out[row, column] = value
    return out


def test_stored_tensors_are_the_announced_ones(name: str) -> None:
    form = FORMATS[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = {"up": gaussian(130, 256).to(dtype), "up_bias": gaussian(130).to(dtype)}
        specs = [TensorSpec(key, tuple(value.shape), value.dtype) for key, value in tensors.items()]
        encoded = form.encode(tensors)
        assert {spec.name: (spec.shape, spec.dtype) for spec in form.stored(specs)} == {
            key: (tuple(value.shape), value.dtype) for key, value in encoded.items()
        }
        assert all(value.is_contiguous() for value in encoded.values())
        assert encoded["up_bias"] is tensors["up_bias"]
        decoded = form.decode(encoded)
        assert decoded.keys() == tensors.keys()
        assert decoded["up"].dtype == torch.float32 and decoded["up"].shape == (130, 256)


def test_decode_is_the_stated_meaning(name: str) -> None:
    form = FORMATS[name]
    encoded = form.encode({"w": gaussian(3, 256) * torch.tensor([[1e-3], [1.0], [50.0]])})
    parts = {key.removeprefix("w"): value for key, value in encoded.items()}
    got, want = form.decode(encoded)["w"].double(), meaning(name, parts)
    assert ((got - want).abs() <= 2.0**-24 * want.abs()).all()


def test_what_was_encoded_once_stays_as_it_is(name: str) -> None:
    once = back(FORMATS[name], gaussian(8, 256))
    twice = back(FORMATS[name], once)
    # Another scale of the search may be found to be better for what the first one made; never by much.
    assert (twice - once).norm() <= 0.03 * once.norm()


def test_rows_are_independent_and_long_matrices_are_done_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(300, 256)
    whole = encode(FORMATS[name], weight)
    monkeypatch.setattr("moert.formats._quantised.NUMBERS_AT_ONCE", 128 * 256)
    parts = encode(FORMATS[name], weight)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_encoded_by_value(name: str, dtype: torch.dtype) -> None:
    weight = gaussian(4, 256).to(dtype)
    narrow, wide = encode(FORMATS[name], weight), encode(FORMATS[name], weight.float())
    assert all(torch.equal(narrow[key], wide[key]) for key in wide)


def test_errors_are_those_in_the_table(name: str) -> None:
    for weight, want in zip((gaussian(256, 4096), with_outliers(256, 4096)), ERRORS[name], strict=True):
        error = ((back(FORMATS[name], weight) - weight).norm() / weight.norm()).item()
        assert error == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("factor", [1.0, 1e-7, 2e-6, 1e-4, 3e4])
def test_int8_is_off_by_at_most_half_a_scale(factor: float) -> None:
    weight = with_outliers(16, 2048) * factor
    parts = encode(Int8(), weight)
    off = (back(Int8(), weight).double() - weight.double()).abs().unflatten(1, (-1, 32))
    # fp32 rounds the quotient, by 2^-23 of a code at most 127 for each of two operations.
    assert (off <= parts["_scales"].double().unsqueeze(-1) * (0.5 + 127 * 2.0**-22)).all()


@pytest.mark.parametrize("which", INT4)
@pytest.mark.parametrize("factor", [1.0, 1e-7, 2e-6, 1e-4, 1e3])
def test_int4_is_no_worse_than_the_plain_scale(which: str, factor: float) -> None:
    """The usual choice: the largest number, or the ends of the range, on the end of the codes."""
    form = FORMATS[which]
    assert isinstance(form, Int4)
    weight = with_outliers(16, 2048) * factor
    groups = weight.double().unflatten(1, (-1, form.group))
    if form.symmetric:
        most = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scale, zero = (most / -8).half().double(), 8.0
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).half().double()
        zero = (-low / scale).round().clamp(0, 15)
    codes = (groups / scale + zero).nan_to_num(0).round().clamp(0, 15)
    plain = ((codes - zero) * scale).nan_to_num(0)
    of_plain = (plain - groups).square().sum(-1)
    of_ours = (back(form, weight).double().unflatten(1, (-1, form.group)) - groups).square().sum(-1)
    if factor == 1e-7:  # the scale is below fp16's smallest number: what matters is the size of the error
        assert (of_ours <= groups.square().sum(-1) * 1.0001).all()
    else:
        # Among fp16's subnormals ours may be the next larger scale, for the sake of the largest number.
        assert (of_ours <= of_plain * (1.3 if factor == 2e-6 else 1.01)).all()


@pytest.mark.parametrize("factor", [1.0, 1e-38, 1e-20, 1e30])
def test_fp8_is_off_by_a_sixteenth_or_half_a_subnormal(factor: float) -> None:
    weight = (with_outliers(200, 300) * factor).double()
    parts = encode(Fp8(), weight.float())
    scales = parts["_scales"].double().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    off = (back(Fp8(), weight.float()).double() - weight.float().double()).abs()
    assert (off <= torch.maximum(weight.abs() / 16, scales * 2.0**-10) * (1 + 1e-5) + 2.0**-149).all()
    assert not back(Fp8(), weight.float()).isnan().any()


@pytest.mark.parametrize("factor", [1.0, 1e-37, 1e-20, 1e30])
def test_mxfp4_is_the_nearest_value(factor: float) -> None:
    weight = with_outliers(8, 512) * factor
    groups = weight.double().unflatten(1, (-1, 32))
    exponent = (groups.abs().amax(-1, keepdim=True).log2().floor() - 2).clamp(-127, 127)
    assert torch.equal(encode(Mxfp4(), weight)["_scales"].double(), exponent.squeeze(-1) + 127)
    values = torch.tensor(E2M1, dtype=torch.float64) * 2.0 ** exponent.unsqueeze(-1)
    nearest = (values - groups.unsqueeze(-1)).abs().amin(-1)
    off = (back(Mxfp4(), weight).double().unflatten(1, (-1, 32)) - groups).abs()
    assert torch.equal(off, nearest)


def test_mxfp4_rounds_ties_to_even() -> None:
    row = torch.zeros(1, 32)
    row[0, :9] = torch.tensor([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25])
    assert back(Mxfp4(), row)[0, :9].tolist() == [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0]


def test_every_code_of_int8() -> None:
    codes = torch.zeros(1, 256, dtype=torch.int8)
    codes[0, :255] = torch.arange(-127, 128)
    codes[0, ::32] = 127  # so that each group's scale is found again
    parts = {"w": codes, "w_scales": torch.full((1, 8), 0.25, dtype=torch.float16)}
    weight = Int8().decode(parts)["w"]
    assert torch.equal(weight, codes.float() / 4)
    assert torch.equal(Int8().encode({"w": weight})["w"], codes)


@pytest.mark.parametrize("zero", range(16))
def test_every_code_of_int4(zero: int) -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 2)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    parts = {"w": packed, "w_scales": torch.full((1, 1), 0.5, dtype=torch.float16)}
    assert Int4().decode(parts)["w"].tolist() == [[(code - 8) / 2 for code in range(16)] * 2]
    parts["w_zeros"] = torch.full((1, 1), zero, dtype=torch.uint8)
    form = Int4(symmetric=False)
    weight = form.decode(parts)["w"]
    assert weight.tolist() == [[(code - zero) / 2 for code in range(16)] * 2]
    again = form.encode({"w": weight})
    assert all(torch.equal(again[key], parts[key]) for key in parts)


def test_every_code_of_fp8_and_of_its_nan() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    parts = {"w": codes, "w_scales": torch.tensor([[2.0, 0.5]])}
    weight = Fp8().decode(parts)["w"]
    want = codes.view(torch.float8_e4m3fn).float() * torch.tensor([2.0, 0.5]).repeat_interleave(128)
    assert weight.isnan().nonzero().tolist() == [[0, 127], [0, 255]]
    assert torch.equal(weight.nan_to_num(), want.nan_to_num())
    weight[weight.isnan()] = 0
    codes[0, 127] = codes[0, 255] = 0
    assert torch.equal(back(Fp8(), weight), weight)


def test_every_code_and_scale_of_mxfp4() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(16, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    weight = Mxfp4().decode({"w": codes, "w_scales": scales})["w"]
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1).int()
    want = torch.tensor(E2M1, dtype=torch.float64)[nibbles] * 2.0 ** (scales.double() - 127)
    assert torch.equal(weight[:255].double(), want[:255].float().double())
    assert weight[255].isnan().all()


def test_golden_bytes_of_nibbles() -> None:
    row = torch.arange(-8, 8).repeat(2).float().view(1, 32)
    stored = Int4().encode({"w": row})
    assert stored["w_scales"].item() == 1
    assert stored["w"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]

    row = torch.tensor([E2M1 * 2])
    stored = Mxfp4().encode({"w": row})
    assert stored["w_scales"].item() == 127
    assert stored["w"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]


def test_int4_has_its_further_code_on_the_side_of_the_largest() -> None:
    for sign in (1, -1):
        row = torch.zeros(1, 32)
        row[0, 0] = 8 * sign
        row[0, 1] = -7 * sign
        assert back(Int4(), row)[0, :2].tolist() == [8 * sign, -7 * sign]


def test_zeros_stay_zeros(name: str) -> None:
    weight = gaussian(4, 256)
    weight[:, 128:] = 0
    weight[1] = 0
    decoded = back(FORMATS[name], weight)
    assert (decoded[:, 128:] == 0).all() and (decoded[1] == 0).all()
    assert (back(FORMATS[name], torch.zeros(4, 256)) == 0).all()


def test_tiny_weights_do_not_vanish_in_a_tiny_scale() -> None:
    """Weights whose scale would be less than fp16's smallest number keep what that number can show of them."""
    for form, steps in ((Int8(), 127), (Int4(), 7)):
        weight = gaussian(4, 256) * 2.0**-24
        decoded = back(form, weight)
        assert (decoded != 0).any()
        assert ((decoded - weight).abs() <= 2.0**-25 * (1 + 1e-6) * (1 if steps == 127 else 2)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_refused_by_name(name: str, bad: float) -> None:
    weight = gaussian(130, 256)
    weight[129, 255] = bad
    with pytest.raises(UnsupportedModelError, match=r"down_proj.*NaN or an infinity"):
        FORMATS[name].encode({"up_proj": gaussian(4, 256), "down_proj": weight})


def test_too_large_weights_are_refused_by_the_integers() -> None:
    for form, largest in ((Int8(), 65504 * 127), (Int4(), 65504 * 7.5), (Int4(symmetric=False), 65504 * 15)):
        weight = torch.zeros(1, 128)
        weight[0, 3] = largest
        assert back(form, weight).isfinite().all()
        weight[0, 3] = largest * 1.2
        with pytest.raises(UnsupportedModelError, match=r"w cannot be stored.*largest number is"):
            form.encode({"w": weight})


def test_rows_that_the_group_does_not_divide_are_refused_with_numbers() -> None:
    for form, k, multiple in ((Int8(), 48, 32), (Int4(), 33, 32), (Int4(128), 96, 128), (Mxfp4(), 16, 32)):
        with pytest.raises(UnsupportedModelError, match=rf"multiple of {multiple} numbers; w is \[2, {k}\]"):
            form.encode({"w": torch.zeros(2, k)})
        with pytest.raises(UnsupportedModelError, match=f"{multiple}"):
            form.stored([TensorSpec("w", (2, k), torch.float32)])
    assert back(Fp8(), gaussian(3, 5)).shape == (3, 5)


def test_other_tensors_are_refused_or_passed() -> None:
    with pytest.raises(UnsupportedModelError, match=r"\[2, 3, 32\]"):
        Int8().encode({"w": torch.zeros(2, 3, 32)})
    with pytest.raises(UnsupportedModelError, match="float64"):
        Int8().encode({"w": torch.zeros(2, 32, dtype=torch.float64)})
    with pytest.raises(UnsupportedModelError, match="w_scales"):
        Int8().encode({"w": torch.zeros(2, 32), "w_scales": torch.zeros(2)})
    scalar, bias = torch.tensor(3.0), torch.tensor([torch.nan])
    assert Int8().decode(Int8().encode({"a": scalar, "a_bias": bias})) == {"a": scalar, "a_bias": bias}


def test_int4_options() -> None:
    with pytest.raises(ConfigError, match="64"):
        Int4(64)
    default = make_format("int4")
    assert isinstance(default, Int4) and default.group == 32 and default.symmetric
