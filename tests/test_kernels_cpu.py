"""Products on the CPU against double precision: odd sizes and addresses, special values, every ISA here."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moert import _C
from moert.kernels import cpu, reference
from moert.kernels.cpu_ffn import ExpertFfn
from moert.kernels.gate import Gate

DTYPES = tuple(cpu.NUMBERS)
# Few and many tokens, whole and broken blocks of rows, of tokens and of k.
SHAPES = [(1, 1, 1), (1, 5, 3), (2, 7, 33), (3, 64, 100), (4, 130, 257), (1, 1024, 512), (4, 6, 16)]
SHAPES += [(5, 33, 64), (7, 47, 600), (16, 64, 96), (17, 31, 40), (33, 65, 1030), (300, 20, 70)]


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def bound(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """One rounding to the dtype, and fp32 sums of k products: 2**-24 of the sum of their sizes for each."""
    sizes = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    half = 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
    return half * exact(x, weight, bias).abs() + (x.shape[1] + 2) * 2.0**-24 * sizes + torch.finfo(x.dtype).tiny


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_product(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t, n, k = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((t, k), (n, k), (n,)))
    for given_bias in (None, bias):
        for transposed in (False, True):
            stored = weight.T.contiguous() if transposed else weight
            y = cpu.linear(x, cpu.Matrix("plain", stored, transposed=transposed), given_bias)
            assert y.dtype == dtype
            error = (y.double() - exact(x, weight, given_bias)).abs()
            assert (error <= bound(x, weight, given_bias)).all(), (error / bound(x, weight, given_bias)).max()


FLAGS_OF = {
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16", "avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_vnni": {"avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="/proc/cpuinfo names x86 flags")
def test_what_the_processor_has_is_used() -> None:
    """So that no instruction set goes untested because it is thought to be missing."""
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":")[1].split())
    expected = [name for name, needed in FLAGS_OF.items() if needed <= flags]
    assert cpu.isa_names() == [*expected, "scalar"]
    assert cpu.isa_names(usable_only=False) == [*FLAGS_OF, "scalar"]


@pytest.mark.parametrize("rows", [1023, 1025, 2048 + 33, 5 * 1024 + 1])
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_every_row_is_computed_whatever_the_tasks(rows: int, count: int, tokens: int) -> None:
    """Whole numbers, so that the products are exact; more rows than a task takes, over few and many threads."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-2, 3, (tokens, 8), generator=generator).bfloat16()
    weight = torch.randint(-2, 3, (rows, 8), generator=generator).bfloat16()
    up = torch.randint(-1, 2, (rows, 8), generator=generator).bfloat16()
    down = torch.randint(-1, 2, (8, rows), generator=generator).bfloat16()
    ffn = ExpertFfn(Gate("relu", gated=False), 8, rows, torch.bfloat16)
    out = torch.zeros(tokens, 8)
    before = cpu.threads()
    try:
        cpu.set_threads(count)
        assert torch.equal(cpu.linear(x, weight).double(), exact(x, weight))
        expert = ffn.expert(cpu.Matrix("plain", up), cpu.Matrix("plain", down))
        ffn.run(x, [expert], [None], [None], out)
    finally:
        cpu.set_threads(before)
    assert torch.equal(out.double(), exact(exact(x, up).clamp(min=0), down))


def test_every_kernel_is_reached() -> None:
    """What each instruction set computes with, so that the tests above test it."""
    plain = {dtype: cpu.Matrix("plain", torch.zeros(8, 32, dtype=dtype)) for dtype in DTYPES}
    before = cpu.isa()
    try:
        for name in cpu.isa_names():
            cpu.use_isa(name)
            kernels = [plain[torch.bfloat16].kernel_name(tokens) for tokens in (1, 8, 33)]
            many = kernels[-1]
            expected = "avx512 bf16" if name == "avx512_vnni" else f"{name} bf16"
            assert many.split(",")[0] == expected
            assert len(set(kernels)) == {"avx512_bf16": 3, "amx": 2}.get(name, 1), kernels
            assert plain[torch.float32].kernel_name(1).split()[0] == (
                "avx512" if "avx512" in many or name == "amx" else name
            )
    finally:
        cpu.use_isa(before)


@pytest.mark.parametrize("tokens", [1, 40])
def test_every_value_of_each_format_is_read_right(isa: str, tokens: int) -> None:
    for dtype in cpu.HALVES:
        bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
        weight = bits.view(dtype).view(-1, 1)
        subnormal = (weight.float().abs() < torch.finfo(dtype).tiny) & (weight != 0)
        padded = torch.zeros(65536, 64, dtype=dtype)  # once in the vector part, once in the tail
        padded[:, :1] = weight
        for matrix in (weight.contiguous(), padded):
            x = torch.zeros(tokens, matrix.shape[1], dtype=dtype)
            x[:, 0] = 1
            y = cpu.linear(x, matrix)[-1]
            kernel = cpu.Matrix("plain", matrix).kernel_name(tokens).split(",")[0]
            same = (y == weight[:, 0]) | (y.isnan() & weight[:, 0].isnan())
            if kernel in ("amx bf16", "avx512_bf16 bf16"):  # whose instructions take subnormal numbers for zero
                same |= subnormal[:, 0] & (y == 0)
            assert same.all(), weight[:, 0][~same][:4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_special_values_go_where_torch_has_them_go(isa: str, bad: float, where: str, tokens: int) -> None:
    for dtype in cpu.HALVES:
        x, weight = torch.randn(tokens, 40).to(dtype), torch.randn(50, 40).to(dtype)
        (x if where == "x" else weight)[1, 39 if isa == "avx2" else 3] = bad
        y, want = cpu.linear(x, weight), torch.nn.functional.linear(x.float(), weight.float())
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isinf(), want.isinf())


@given(t=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(1, 50), shift=st.integers(0, 31))
def test_bits_do_not_depend_on_address_or_other_rows(t: int, n: int, k: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(n * 100 + k)
    x = torch.randn(t, k, generator=generator).bfloat16()
    weight = torch.randn(n, k, generator=generator).bfloat16()
    y = cpu.linear(x, weight)
    raw = torch.empty(n * k + 32, dtype=torch.bfloat16)
    moved = raw[shift : shift + n * k].view(n, k).copy_(weight)
    assert torch.equal(cpu.linear(x, moved), y)
    for column in range(n):
        assert torch.equal(cpu.linear(x, weight[column : column + 1])[:, 0], y[:, column])
    assert torch.equal(cpu.linear(x.flip(0), weight).flip(0), y)


@pytest.mark.parametrize("tokens", [1, 40])
def test_bits_do_not_depend_on_threads(tokens: int) -> None:
    x, weight = torch.randn(tokens, 500).bfloat16(), torch.randn(3000, 500).bfloat16()
    before = cpu.threads()
    results = []
    try:
        for count in (1, 2, 5):
            cpu.set_threads(count)
            results += [cpu.linear(x, weight) for _ in range(3)]
    finally:
        cpu.set_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(2, 8), torch.randn(4, 8)),
        (torch.randn(0, 8).bfloat16(), torch.randn(4, 8).bfloat16()),
        (torch.randn(2, 8).bfloat16(), torch.randn(8, 4).bfloat16().T),
        (torch.randn(2, 8).double(), torch.randn(4, 8).double()),
    ],
    ids=["fp32", "no rows", "strided weight", "fp64"],
)
def test_the_rest_is_left_to_torch(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert torch.equal(cpu.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_shapes_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.linear(torch.randn(2, 8).bfloat16(), torch.randn(4, 9).bfloat16())
    with pytest.raises(ValueError, match=r"x \(2, 8\) in torch.bfloat16 .* does not fit a weight \(4, 9\)"):
        cpu.linear(torch.randn(2, 8).bfloat16(), cpu.Matrix("plain", torch.randn(4, 9).bfloat16()))
    with pytest.raises(ValueError, match=r"bias \(3,\) .* 4 rows"):
        cpu.linear(torch.randn(2, 8), cpu.Matrix("plain", torch.randn(4, 8)), torch.randn(3))
    for bias in (torch.randn(8)[::2], torch.randn(4).bfloat16(), torch.randn(4, device="meta")):
        with pytest.raises(ValueError, match=r"bias \(4,\) .* does not fit 4 rows"):
            cpu.linear(torch.randn(2, 8), cpu.Matrix("plain", torch.randn(4, 8)), bias)
    with pytest.raises(ValueError, match="weight in bf16 with activations in fp32"):
        cpu.linear(torch.randn(2, 8), cpu.Matrix("plain", torch.randn(4, 8).bfloat16()))


def test_any_leading_dimensions_and_strided_rows() -> None:
    x = torch.randn(40, 3, 2).bfloat16().permute(2, 1, 0)
    weight = torch.randn(6, 40).bfloat16()
    y = cpu.linear(x, weight)
    assert y.shape == (2, 3, 6)
    assert torch.equal(y.view(6, 6), cpu.linear(x.reshape(6, 40), weight))
    one = cpu.linear(x[0, 0], weight)
    assert one.shape == (6,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plain", torch.randn(4, 8).double()), r"a plain weight is .*, not torch.float64"),
        (("plain", torch.randn(4)), r"2 dimensions and numbers in them, not shape \(4,\)"),
        (("plain", torch.randn(0, 4)), r"not shape \(0, 4\)"),
        (("plain", torch.randn(8, 4).T), r"contiguous, not of strides \(1, 4\)"),
        (("plain", torch.empty(4, 8, device="meta")), "on the CPU, not on meta"),
        (("plain", torch.randn(4, 32), torch.ones(4, 1).half()), "plain has no scales"),
        (("int3", torch.zeros(4, 32, dtype=torch.int8)), "format 'int3' is unknown"),
        (("int8", torch.zeros(4, 32, dtype=torch.int8)), "int8 needs scales"),
        (("int8", torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1).half()), "stored as torch.int8, not"),
        (("int8", torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1)), "scales of int8 are torch.float16, not"),
        (("int8", torch.zeros(4, 40, dtype=torch.int8), torch.ones(4, 1).half()), r"\[4, 40\] come in groups of 32"),
        (("int4", torch.zeros(4, 48, dtype=torch.uint8), torch.ones(4, 2).half()), "groups of 32 or 128"),
        (("fp8", torch.zeros(4, 130, dtype=torch.uint8), torch.ones(1, 1)), r"have scales \[1, 2\], not \[1, 1\]"),
        (
            ("int4", torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1).half(), torch.zeros(4, 2).byte()),
            r"zero points are uint8 \(4, 1\)",
        ),
        (
            ("int4", torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1).half(), torch.zeros(4, 1).char()),
            r"zero points are uint8 \(4, 1\) like the scales, not torch.int8 \(4, 1\)",
        ),
        (("int8", torch.zeros(4, 64, dtype=torch.int8), torch.ones(2, 4).half().T), "scales must be contiguous"),
        (
            ("int8", torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1).half(), torch.zeros(4, 1).byte()),
            "int8 cannot be given zero points",
        ),
        (("plain", torch.randn(4, 32), None, torch.zeros(4, 1).byte()), "a weight in plain has no zero points"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_matrix_that_no_kernel_reads_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.Matrix(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, "yes"])
def test_ways_of_reading_are_two(value: object) -> None:
    with pytest.raises(TypeError, match="True, False or None"):
        _C.use_one_stream(value)  # type: ignore[arg-type]


def test_bad_arguments_are_refused() -> None:
    memory = torch.zeros(64)
    good = memory.data_ptr()
    with pytest.raises(ValueError, match=r"weight is at address .* must be a multiple of 2 and not null"):
        _C.product("bf16", good + 1, 1, 1, good, 1, None, good)
    with pytest.raises(ValueError, match="x is at address 0"):
        _C.product("bf16", good, 1, 1, 0, 1, None, good)
    with pytest.raises(ValueError, match="k is -1"):
        _C.product("bf16", good, 1, -1, good, 1, None, good)
    with pytest.raises(ValueError, match="n is"):
        _C.product("bf16", good, 2**40, 1, good, 1, None, good)
    with pytest.raises(ValueError, match="is empty"):
        _C.product("bf16", good, 1, 1, good, 0, None, good)
    with pytest.raises(ValueError, match="number type 'fp8' is unknown"):
        _C.product("fp8", good, 1, 1, good, 1, None, good)
    with pytest.raises(ValueError, match="instruction set 'sse9' is unknown or not usable"):
        _C.use_isa("sse9")
    with pytest.raises(TypeError, match=r"moert\.matrix is wanted"):
        _C.kernel_name(object(), 1)
    with pytest.raises(ValueError, match="a matrix of 0 x 4"):
        _C.matrix("fp32", False, 0, 0, 4, good, None, None)
    with pytest.raises(ValueError, match="k = 33 is not a multiple of the group of 32"):
        _C.matrix("int8", False, 32, 4, 33, good, good, None)
    with pytest.raises(ValueError, match="has no groups of 64"):
        _C.matrix("int4", False, 64, 4, 64, good, good, None)
    with pytest.raises(ValueError, match="cannot be transposed"):
        _C.matrix("int8", True, 32, 4, 32, good, good, None)


def test_environment_chooses_the_instruction_set() -> None:
    def run(isa: str) -> subprocess.CompletedProcess[str]:
        code = "from moert.kernels import cpu; print(cpu.isa())"
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
