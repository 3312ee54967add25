"""Products of quantised weights against their stated meaning in double precision, for every instruction set here.

Relative error of a whole product, K = 2048, against the weights before they were quantised, as `ERRORS` holds it (x
with outliers: 4 of 2048 numbers x20; for int8, int4 and mxfp4 x is quantised to int8 in groups of 32 as well):

    format             Gaussian   x with outliers
    int8               0.0075     0.0109
    int4, g32          0.083      0.084
    int4, g32, zeros   0.080      0.080
    int4, g128         0.099      0.099
    int4, g128, zeros  0.096      0.097
    fp8                0.027      0.027
    mxfp4              0.116      0.116
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from moert.formats.base import Format
from moert.formats.fp8 import Fp8
from moert.formats.int4 import Int4
from moert.formats.int8 import Int8
from moert.formats.mxfp4 import Mxfp4
from moert.kernels import cpu
from moert.kernels.cpu_matrix import matrix

ISAS = [name for name in cpu.isa_names(usable_only=False) if name not in ("amx", "avx512_bf16")]
FEW = [1, 2, 3, 4]
MANY = [5, 7, 16, 17, 70]


@dataclass(frozen=True)
class Kind:
    format: str
    group: int
    zeros: bool
    encoder: Format
    rows: tuple[int, ...]
    """Values of K: with and without a part of a vector, of a span of vectors, and of a block at the end."""


GROUPS = (32, 64, 96, 128, 224, 256, 288, 512, 544, 1408)
KINDS = {
    "int8": Kind("int8", 32, False, Int8(), GROUPS),
    "int4": Kind("int4", 32, False, Int4(), GROUPS),
    "int4 zeros": Kind("int4", 32, True, Int4(symmetric=False), GROUPS),
    "int4 128": Kind("int4", 128, False, Int4(128), (128, 256, 384, 1152)),
    "int4 128 zeros": Kind("int4", 128, True, Int4(128, symmetric=False), (128, 256, 384, 1152)),
    "fp8": Kind("fp8", 128, False, Fp8(), (1, 5, 31, 32, 33, 64, 127, 128, 129, 200, 256, 1333)),
    "mxfp4": Kind("mxfp4", 32, False, Mxfp4(), GROUPS),
}
ERRORS = {
    "int8": (0.0075, 0.0109),
    "int4": (0.083, 0.084),
    "int4 zeros": (0.080, 0.080),
    "int4 128": (0.099, 0.099),
    "int4 128 zeros": (0.096, 0.097),
    "fp8": (0.027, 0.027),
    "mxfp4": (0.116, 0.116),
}
TINY = 2.0**-119  # groups of x below count as zeros


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in cpu.isa_names():
        pytest.skip(f"this processor has no {request.param}")
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(None)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(kind: Kind, n: int, k: int) -> dict[str, torch.Tensor]:
    """Any codes, scales of some spread."""
    g = generator(n * 10000 + k)
    if kind.format == "int8":
        codes = torch.randint(-127, 128, (n, k), generator=g).to(torch.int8)
    else:
        codes = torch.randint(0, 256, (n, k if kind.format == "fp8" else k // 2), generator=g, dtype=torch.uint8)
    if kind.format == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0
        return {"w": codes, "w_scales": torch.rand(-(-n // 128), -(-k // 128), generator=g) + 0.1}
    shape = (n, k // kind.group)
    if kind.format == "mxfp4":
        return {"w": codes, "w_scales": torch.randint(110, 140, shape, generator=g, dtype=torch.uint8)}
    parts = {"w": codes, "w_scales": (torch.rand(shape, generator=g) - 0.3).half()}
    if kind.zeros:
        parts["w_zeros"] = torch.randint(0, 16, shape, generator=g, dtype=torch.uint8)
    return parts


def decoded(kind: Kind, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """What it stands for, in fp64."""
    codes = parts["w"]
    if kind.format == "fp8":
        n, k = codes.shape
        scales = parts["w_scales"].double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        return codes.view(torch.float8_e4m3fn).double() * scales
    scales = parts["w_scales"].double().repeat_interleave(kind.group, 1)
    if kind.format == "int8":
        return codes.double() * scales
    numbers = torch.stack([codes & 15, codes >> 4], -1).flatten(1).double()
    if kind.format == "mxfp4":
        values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
        return values[numbers.long()] * torch.where(scales == 255, torch.nan, 2.0 ** (scales - 127))
    zeros = parts["w_zeros"].double().repeat_interleave(kind.group, 1) if kind.zeros else 8
    return (numbers - zeros) * scales


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def seen_x(kind: Kind, x: torch.Tensor) -> torch.Tensor:
    """What the kernels take x for: for integer formats int8 in groups of 32, scaled and rounded in fp32."""
    if kind.format == "fp8":
        return x.double()
    groups = x.unflatten(1, (-1, 32))
    amax = groups.abs().amax(-1, keepdim=True)
    codes = (groups * (torch.tensor(127.0) / amax)).round()
    seen = codes.double() * (amax / 127).double()
    return torch.where(amax < TINY, 0.0, seen).flatten(1)


def product(kind: Kind, parts: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return cpu.linear(x, matrix(kind.format, parts, "w"))


def assert_is_the_product(kind: Kind, parts: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> None:
    weight, seen = decoded(kind, parts), seen_x(kind, x)
    want, sizes = seen @ weight.T, seen.abs() @ weight.abs().T
    # Exact but for fp32 sums, of at most some dozens of numbers one after the other, and products of scales.
    # fp32's subnormals have 2^-150 of error in each sum, times 256, in which fp8 counts, and a scale.
    bound = (8 + x.shape[1] / 128) * 2.0**-24 * sizes + x.shape[1] * 2.0**-141
    assert y.dtype == torch.float32
    assert ((y.double() - want).abs() <= bound).all()


def some_x(tokens: int, k: int, seed: int = 1) -> torch.Tensor:
    g = generator(seed)
    return torch.randn(tokens, k, generator=g) * torch.exp(3 * torch.randn(tokens, 1, generator=g))


def test_kernels_are_the_ones_of_the_instruction_set(isa: str, kind: Kind) -> None:
    weight = matrix(kind.format, random_weight(kind, 16, 128), "w")
    assert all(weight.kernel_name(tokens).startswith(isa) for tokens in FEW + MANY)


@pytest.mark.parametrize("tokens", FEW + MANY)
def test_product_is_the_stated_one(isa: str, kind: Kind, tokens: int) -> None:
    for index, k in enumerate(kind.rows):
        n = (1, 3, 8, 15, 16, 17, 33, 130)[(index + tokens) % 8]
        parts, x = random_weight(kind, n, k), some_x(tokens, k)
        assert_is_the_product(kind, parts, x, product(kind, parts, x))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 127, 129, 257])
def test_any_number_of_rows(isa: str, kind: Kind, n: int) -> None:
    parts = random_weight(kind, n, 256)
    for tokens in (1, 3, 6, 9):
        x = some_x(tokens, 256)
        assert_is_the_product(kind, parts, x, product(kind, parts, x))


def test_a_token_does_not_depend_on_its_neighbours(isa: str, kind: Kind) -> None:
    parts, x = random_weight(kind, 40, 384), some_x(70, 384)
    alone = product(kind, parts, x[:1])
    for tokens in FEW:
        assert torch.equal(product(kind, parts, x[:tokens])[:1], alone)
    together = product(kind, parts, x)
    for tokens in MANY:
        assert torch.equal(product(kind, parts, x[:tokens]), together[:tokens])


def test_total_error_is_that_of_the_table(isa: str, kind: Kind) -> None:
    g = generator(7)
    weight = torch.randn(512, 2048, generator=g)
    x = torch.randn(64, 2048, generator=g)
    spiky = x.clone()
    spiky[:, 100::512] *= 20
    parts = kind.encoder.encode({"w": weight})
    name = next(name for name, other in KINDS.items() if other is kind)
    for rows, want_error in zip((x, spiky), ERRORS[name], strict=True):
        want = rows.double() @ weight.double().T
        together = product(kind, parts, rows)
        one_by_one = torch.cat([product(kind, parts, row) for row in rows.split(1)])
        for y in (together, one_by_one):
            error = ((y.double() - want).norm() / want.norm()).item()
            assert error == pytest.approx(want_error, rel=0.03)


@pytest.mark.parametrize("tokens", [1, 6])
def test_every_code_value(isa: str, kind: Kind, tokens: int) -> None:
    """Each value at each place of a row in turn, against x of a single 1."""
    k = 128
    values = {"int8": 255, "fp8": 256}.get(kind.format, 16)
    parts = random_weight(kind, values, k)
    for place in (0, 1, 7, 8, 17, 31, 33, 64, 95, 127):
        codes = parts["w"]
        every = torch.arange(values)
        if kind.format == "int8":
            codes[:, place] = (every - 127).to(torch.int8)
        elif kind.format == "fp8":
            codes[:, place] = every.to(torch.uint8)
        else:
            shift = 4 * (place % 2)
            kept = codes[:, place // 2] & (0xF0 >> shift)
            codes[:, place // 2] = kept | (every << shift).to(torch.uint8)
        x = torch.zeros(tokens, k)
        x[:, place] = 1
        y = product(kind, parts, x)
        want = decoded(kind, parts)[:, place].expand(tokens, -1)
        assert torch.equal(y.isnan(), want.isnan())
        assert ((y - want).nan_to_num(0).abs() <= 2.0**-22 * want.nan_to_num(0).abs()).all()
        if kind.format == "fp8":
            codes[127, place] = codes[255, place] = 0


def test_int8_codes_of_minus_128_are_read_too(isa: str) -> None:
    parts = {"w": torch.full((5, 64), -128, dtype=torch.int8), "w_scales": torch.ones(5, 2, dtype=torch.float16)}
    for sign in (1.0, -1.0):
        for tokens in (1, 6):
            y = product(KINDS["int8"], parts, torch.full((tokens, 64), sign))
            assert torch.equal(y, torch.full_like(y, -128 * 64 * sign))


@pytest.mark.parametrize("tokens", [1, 3, 6, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_in_x_stay_in_their_token(isa: str, kind: Kind, bad: float, tokens: int) -> None:
    parts, x = random_weight(kind, 21, 256), some_x(tokens, 256)
    good = product(kind, parts, x)
    for place in (0, 37, 255):
        broken = x.clone()
        broken[tokens // 2, place] = bad
        y = product(kind, parts, broken)
        assert not y[tokens // 2].isfinite().any()
        if bad != bad:
            assert y[tokens // 2].isnan().all()
        others = torch.arange(tokens) != tokens // 2
        assert torch.equal(y[others], good[others])


@pytest.mark.parametrize("tokens", [1, 6])
def test_bad_scales_stay_in_their_rows(isa: str, kind: Kind, tokens: int) -> None:
    n = 140
    parts, x = random_weight(kind, n, 256), some_x(tokens, 256)
    good = product(kind, parts, x)
    parts["w_scales"][1, 1] = 255 if kind.format == "mxfp4" else float("nan")
    y = product(kind, parts, x)
    touched = torch.arange(n) // 128 == 1 if kind.format == "fp8" else torch.arange(n) == 1
    assert y[:, touched].isnan().all()
    assert torch.equal(y[:, ~touched], good[:, ~touched])


def test_smallest_and_largest_powers_of_mxfp4(isa: str) -> None:
    kind = KINDS["mxfp4"]
    parts = random_weight(kind, 254, 64)
    parts["w_scales"] = torch.arange(254, dtype=torch.uint8).view(-1, 1).repeat(1, 2)
    for tokens in (1, 6):
        x = torch.randn(tokens, 64, generator=generator()) * 1e-3
        weight, seen = decoded(kind, parts), seen_x(kind, x)
        y, want = product(kind, parts, x).double(), seen @ weight.T
        # A product of two scales below 2^-126 is rounded to a multiple of 2^-149, times at most 1524 twice a group.
        bound = 8 * 2.0**-24 * (seen.abs() @ weight.abs().T) + 2 * 2 * 32 * 12 * 127 * 2.0**-150
        assert ((y - want).abs() <= bound).all()


@pytest.mark.parametrize("tokens", [1, 6])
def test_tiny_zero_and_huge_x(isa: str, kind: Kind, tokens: int) -> None:
    parts = random_weight(kind, 20, 256)
    x = some_x(tokens, 256)
    assert (product(kind, parts, torch.zeros_like(x)) == 0).all()
    x[:, :32] = 0
    x[:, 64:96] *= 1e-20
    x[:, 96:128] *= 1e25
    assert_is_the_product(kind, parts, x, product(kind, parts, x))
    for factor in (1e-30, 1e-37, 1e-42):
        small = x[:, :64].repeat(1, 4) * factor
        assert_is_the_product(kind, parts, small, product(kind, parts, small))


def test_unaligned_addresses_give_the_same_bits(isa: str, kind: Kind) -> None:
    parts = random_weight(kind, 37, kind.rows[-1])
    for tokens in (1, 6):
        x = some_x(tokens, kind.rows[-1])
        want = product(kind, parts, x)
        for offset in (1, 3, 32):
            moved = {}
            for key, value in parts.items():
                room = torch.empty(value.numel() + offset, dtype=value.dtype)
                moved[key] = room[offset:].view(value.shape).copy_(value)
            assert torch.equal(product(kind, moved, x), want)


class Guarded:
    """A copy of a tensor whose last byte is followed by a page that may not be touched."""

    def __init__(self, value: torch.Tensor) -> None:
        page = mmap.PAGESIZE
        nbytes = value.numel() * value.element_size()
        self._map = mmap.mmap(-1, (-(-nbytes // page) + 1) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._guard = start + len(self._map) - page
        self._protect(0)
        room = (ctypes.c_char * nbytes).from_address(self._guard - nbytes)
        self.tensor = torch.frombuffer(room, dtype=value.dtype).view(value.shape).copy_(value)

    def close(self) -> None:
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect(self, how: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self._guard), ctypes.c_size_t(mmap.PAGESIZE), how) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")


def test_nothing_is_read_behind_the_end(isa: str, kind: Kind) -> None:
    for k in kind.rows:
        for n in (1, 17):
            parts = random_weight(kind, n, k)
            guarded = {key: Guarded(value) for key, value in parts.items()}
            behind = {key: value.tensor for key, value in guarded.items()}
            for tokens in (1, 4, 6, 16):
                x = some_x(tokens, k)
                assert torch.equal(product(kind, behind, x), product(kind, parts, x))
            for value in guarded.values():
                value.close()
