"""The CPU kernels against double precision: odd sizes, odd addresses, special values, every instruction set here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moert import _C
from moert.kernels import cpu, reference

SHAPES = [(1, 1, 1), (1, 5, 3), (2, 7, 33), (3, 64, 100), (4, 130, 257), (1, 1024, 512), (4, 6, 16)]


def usable() -> list[str]:
    names = []
    for name in ("avx512", "avx2", "scalar"):
        try:
            _C.use_isa(name)
        except ValueError:
            continue
        names.append(name)
    _C.use_isa(None)
    return names


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in usable():
        pytest.skip(f"this processor has no {request.param}")
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(None)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", cpu.HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_product(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t, n, k = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((t, k), (n, k), (n,)))
    for given_bias in (None, bias):
        y = cpu.linear(x, weight, given_bias)
        assert y.dtype == dtype
        # One rounding to the dtype, and fp32 sums of k products: 2**-24 of the sum of their sizes for each.
        want = exact(x, weight, given_bias)
        sizes = x.double().abs() @ weight.double().abs().T + (0 if given_bias is None else given_bias.double().abs())
        bound = torch.finfo(dtype).eps / 2 * want.abs() + (k + 2) * 2.0**-24 * sizes + torch.finfo(dtype).tiny
        assert ((y.double() - want).abs() <= bound).all()


def test_every_value_of_each_format_is_read_right(isa: str) -> None:
    for dtype in cpu.HALVES:
        bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
        weight = bits.view(dtype).view(-1, 1)
        padded = torch.zeros(65536, 16, dtype=dtype)  # once in the vector part, once in the tail
        padded[:, :1] = weight
        for matrix in (weight.contiguous(), padded):
            x = torch.zeros(1, matrix.shape[1], dtype=dtype)
            x[0, 0] = 1
            y = cpu.linear(x, matrix)[0]
            same = (y == weight[:, 0]) | (y.isnan() & weight[:, 0].isnan())
            assert same.all(), weight[:, 0][~same][:4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_special_values_go_where_torch_has_them_go(isa: str, bad: float, where: str) -> None:
    x, weight = torch.randn(2, 40, dtype=torch.bfloat16), torch.randn(9, 40, dtype=torch.bfloat16)
    (x if where == "x" else weight)[1, 39 if isa == "avx2" else 3] = bad
    y, want = cpu.linear(x, weight), torch.nn.functional.linear(x, weight)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())


@given(t=st.integers(1, 4), n=st.integers(1, 9), k=st.integers(1, 50), shift=st.integers(0, 31))
def test_bits_depend_on_neither_address_nor_company(t: int, n: int, k: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(n * 100 + k)
    x = torch.randn(t, k, generator=generator).bfloat16()
    weight = torch.randn(n, k, generator=generator).bfloat16()
    y = cpu.linear(x, weight)
    raw = torch.empty(n * k + 32, dtype=torch.bfloat16)
    moved = raw[shift : shift + n * k].view(n, k).copy_(weight)
    assert torch.equal(cpu.linear(x, moved), y)
    for row in range(t):
        assert torch.equal(cpu.linear(x[row : row + 1], weight)[0], y[row])
    for column in range(n):
        assert torch.equal(cpu.linear(x, weight[column : column + 1])[:, 0], y[:, column])


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(cpu.MOST_ROWS + 1, 8).bfloat16(), torch.randn(4, 8).bfloat16()),
        (torch.randn(2, 8), torch.randn(4, 8)),
        (torch.randn(0, 8).bfloat16(), torch.randn(4, 8).bfloat16()),
        (torch.randn(2, 8).bfloat16(), torch.randn(8, 4).bfloat16().T),
    ],
    ids=["many rows", "fp32", "no rows", "strided weight"],
)
def test_the_rest_is_left_to_torch(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert torch.equal(cpu.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_shapes_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.linear(torch.randn(2, 8).bfloat16(), torch.randn(4, 9).bfloat16())


def test_strided_rows_are_read_right() -> None:
    x = torch.randn(40, 3).bfloat16().T
    weight = torch.randn(6, 40).bfloat16()
    torch.testing.assert_close(cpu.linear(x, weight).double(), exact(x, weight), rtol=2**-8, atol=1e-4)


def test_bad_arguments_are_refused() -> None:
    memory = torch.zeros(64)
    good = memory.data_ptr()
    with pytest.raises(ValueError, match="null, or not multiples"):
        _C.linear(False, good + 1, good, good, 1, 1, 1)
    with pytest.raises(ValueError, match="null, or not multiples"):
        _C.linear(False, good, 0, good, 1, 1, 1)
    with pytest.raises(ValueError, match="k is -1"):
        _C.linear(False, good, good, good, 1, 1, -1)
    with pytest.raises(ValueError, match="n is"):
        _C.linear(False, good, good, good, 1, 2**40, 1)
    with pytest.raises(ValueError, match="instruction set 'sse9' is unknown"):
        _C.use_isa("sse9")


def test_environment_chooses_the_instruction_set() -> None:
    def run(isa: str) -> subprocess.CompletedProcess[str]:
        code = "from moert.kernels import cpu; from moert import _C; print(_C.isa())"
        environment = {**os.environ, "MOERT_ISA": isa}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert run("scalar").stdout.strip() == "scalar"
    assert "MOERT_ISA=mmx" in run("mmx").stderr


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_expert_ffn_means_what_it_says(is_transposed: bool, has_bias: bool) -> None:
    """Against the formula in double precision."""
    x = torch.randn(3, 8, dtype=torch.float64)
    up, down = torch.randn(12, 8, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    biases = {"gate_up_proj_bias": torch.randn(12).double(), "down_proj_bias": torch.randn(8).double()}
    weights = {
        "gate_up_proj": up.T.contiguous() if is_transposed else up,
        "down_proj": down.T.contiguous() if is_transposed else down,
        **(biases if has_bias else {}),
    }

    def gate(inner: torch.Tensor) -> torch.Tensor:
        return inner[:, :6].sigmoid() * inner[:, :6] * inner[:, 6:]

    inner = x @ up.T + (biases["gate_up_proj_bias"] if has_bias else 0)
    want = gate(inner) @ down.T + (biases["down_proj_bias"] if has_bias else 0)
    torch.testing.assert_close(reference.expert_ffn(x, weights, gate, is_transposed=is_transposed), want)
