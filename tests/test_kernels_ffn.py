"""Whole experts on the CPU: against double precision, and against themselves in other company."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from moert import _C
from moert.kernels import cpu, reference
from moert.kernels.cpu_ffn import ExpertFfn, add_in_order, add_rows
from moert.kernels.gate import Gate

GATES = [
    Gate(),
    Gate("gelu_tanh"),
    Gate("gelu"),
    Gate("relu2", gated=False),
    Gate("silu", gated=False, alpha=1.5),
    Gate(interleaved=True, alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0),
    Gate(gate_limit=1.0, up_limit=0.5, output_limit=0.4),
    Gate("tanh", interleaved=True),
    Gate("sigmoid"),
    Gate("relu"),
    Gate("identity", gated=False),
]


class Tensors(NamedTuple):
    """One expert's."""

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


class Layer:
    """Some experts of one shape, and what they mean."""

    def __init__(
        self,
        gate: Gate,
        hidden: int,
        width: int,
        dtype: torch.dtype,
        experts: int,
        *,
        bias: bool = False,
        transposed: bool = False,
        integers: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(hidden + width)
        self.ffn = ExpertFfn(gate, hidden, width, dtype)
        self.tensors, self.experts = [], []
        rows = width * (2 if gate.gated else 1)

        def numbers(*shape: int) -> torch.Tensor:
            if integers:
                return torch.randint(-2, 3, shape, generator=generator).to(dtype)
            return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

        for _ in range(experts):
            tensors = Tensors(
                numbers(rows, hidden),
                numbers(hidden, width),
                numbers(rows) if bias else None,
                numbers(hidden) if bias else None,
            )
            up, down = (tensor.T.contiguous() if transposed else tensor for tensor in tensors[:2])
            self.tensors.append(tensors)
            self.experts.append(
                self.ffn.expert(
                    cpu.Matrix("plain", up, transposed=transposed),
                    cpu.Matrix("plain", down, transposed=transposed),
                    tensors.up_bias,
                    tensors.down_bias,
                )
            )

    def exact(
        self,
        hidden: torch.Tensor,
        tokens: Sequence[torch.Tensor | None],
        weights: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """In double precision, but for the rounding of h to the activations' dtype."""
        out = torch.zeros(hidden.shape, dtype=torch.float64)
        for tensors, rows, weight in zip(self.tensors, tokens, weights, strict=True):
            x = hidden.double() if rows is None else hidden[rows].double()
            inner = x @ tensors.up.double().T + (0 if tensors.up_bias is None else tensors.up_bias.double())
            h = reference.gate(self.ffn.gate, inner).to(hidden.dtype).double()
            y = h @ tensors.down.double().T + (0 if tensors.down_bias is None else tensors.down_bias.double())
            y = y if weight is None else y * weight.double().unsqueeze(1)
            out[slice(None) if rows is None else rows] += y
        return out


def some_tokens(count: int, experts: int, each: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator)[:each].sort().values for _ in range(experts)]


@pytest.mark.parametrize("tokens", [1, 3, 19, 70])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_step_is_the_formula(isa: str, gate: Gate, tokens: int) -> None:
    """fp32: sums of about 100 products and a gate within a few units of 2**-24 of what they add up."""
    layer = Layer(gate, 96, 70, torch.float32, 3, bias=True)
    hidden = torch.randn(tokens, 96)
    rows = [*some_tokens(tokens, 2, -(-tokens // 2)), None]
    weights = [torch.rand(len(rows[0])), None, torch.rand(tokens)]  # type: ignore[arg-type]
    out = torch.zeros(tokens, 96)
    layer.ffn.run(hidden, layer.experts, rows, weights, out)
    want = layer.exact(hidden, rows, weights)
    assert ((out.double() - want).abs() <= 5e-6 * (1 + want.abs())).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", list(cpu.NUMBERS), ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 30, 300])
def test_whole_numbers_come_out_exactly(isa: str, dtype: torch.dtype, tokens: int, transposed: bool) -> None:
    """Sums of small whole numbers are exact in any order, so only h is rounded, and only where it is large."""
    for gate in (Gate("relu", gated=False), Gate("identity", interleaved=True, up_limit=3.0, up_offset=1.0)):
        layer = Layer(gate, 64, 45, dtype, 4, bias=True, transposed=transposed, integers=True)
        hidden = torch.randint(-1, 2, (tokens, 64)).to(dtype)
        rows = [*some_tokens(tokens, 3, -(-tokens // 3)), None]
        weights = [torch.randint(0, 5, (tokens if of is None else len(of),)).float() for of in rows]
        out = torch.zeros(tokens, 64)
        layer.ffn.run(hidden, layer.experts, rows, weights, out)
        assert torch.equal(out.double(), layer.exact(hidden, rows, weights))


@pytest.mark.parametrize("dtype", cpu.HALVES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_halves_are_as_near_as_one_rounding_of_h_allows(isa: str, dtype: torch.dtype, tokens: int) -> None:
    """A value of h near the middle of two numbers may round to either: seldom, so the mean error is far below that."""
    layer = Layer(Gate(), 256, 192, dtype, 4)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 256, generator=generator).to(dtype)
    rows, weights = [None] * 4, [torch.rand(tokens, generator=generator) for _ in range(4)]
    out = torch.zeros(tokens, 256)
    layer.ffn.run(hidden, layer.experts, rows, weights, out)
    want = layer.exact(hidden, rows, weights)
    error = (out.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error < torch.finfo(dtype).eps / 25


@pytest.mark.parametrize("tokens", [1, 37])
def test_any_company_gives_the_same_bits(tokens: int) -> None:
    layer = Layer(Gate(), 64, 48, torch.bfloat16, 6, bias=True)
    hidden = torch.randn(tokens, 64).bfloat16()
    rows = some_tokens(tokens, 6, -(-tokens // 2))
    weights = [torch.rand(len(of)) for of in rows]
    together = torch.zeros(tokens, 64)
    layer.ffn.run(hidden, layer.experts, rows, weights, together)

    apart = torch.zeros(tokens, 64)
    for expert, of, weight in zip(layer.experts, rows, weights, strict=True):
        layer.ffn.run(hidden, [expert], [of], [weight], apart)
    assert torch.equal(apart, together)

    held = torch.zeros(sum(map(len, rows)), 64)
    begins = [sum(map(len, rows[:index])) for index in range(6)]
    layer.ffn.run(hidden, layer.experts[::-1], rows[::-1], [None] * 6, held, out_rows=begins[::-1])
    added = torch.zeros(tokens, 64)
    for begin, of, weight in zip(begins, rows, weights, strict=True):
        added.index_add_(0, of, held[begin : begin + len(of)] * weight.unsqueeze(1))
    assert torch.equal(added, together)


def test_jobs_queue_and_give_the_same_bits() -> None:
    layer = Layer(Gate(), 128, 200, torch.bfloat16, 4)
    hidden = torch.randn(9, 128).bfloat16()
    weights = [torch.rand(9) for _ in range(4)]
    want = torch.zeros(9, 128)
    layer.ffn.run(hidden, layer.experts, [None] * 4, weights, want)
    outs = [torch.zeros(9, 128) for _ in range(20)]
    handles = [layer.ffn.submit(hidden, layer.experts, [None] * 4, weights, out) for out in outs]
    for handle in reversed(handles):
        handle.wait()
        assert handle.ready()
        handle.wait()
    assert all(torch.equal(out, want) for out in outs)


def test_a_dropped_handle_leaves_nothing_writing() -> None:
    layer = Layer(Gate(), 512, 512, torch.bfloat16, 8)
    for _ in range(20):
        layer.ffn.submit(torch.randn(8, 512).bfloat16(), layer.experts, [None] * 8, [None] * 8, torch.zeros(8, 512))


def test_many_tokens_in_parts_and_batches() -> None:
    """More tokens than a part holds, more parts than a batch holds: 4096 tokens, 48 MiB."""
    layer = Layer(Gate(), 1024, 16, torch.float32, 4)
    hidden = torch.randn(4100, 1024)
    weights = [torch.rand(4100) for _ in range(4)]
    out = torch.zeros(4100, 1024)
    layer.ffn.run(hidden, layer.experts, [None] * 4, weights, out)
    want = layer.exact(hidden, [None] * 4, weights)
    assert ((out.double() - want).abs() <= 2e-5 * (1 + want.abs())).all()
    held = torch.zeros(8200, 1024)
    layer.ffn.run(hidden, layer.experts[:2], [None] * 2, weights[:2], held, out_rows=[4100, 0])
    apart = torch.zeros(4100, 1024)
    for expert, weight, found in zip(layer.experts, weights, reversed(held.split(4100)), strict=False):
        layer.ffn.run(hidden, [expert], [None], [weight], apart.zero_())
        assert torch.equal(found, apart)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_special_values_go_where_torch_has_them_go(isa: str, gate: Gate, bad: float) -> None:
    """Gates as in fp64: in fp32 some builds of torch have gelu(inf) be NaN."""
    for where in ("hidden", "weights", *Tensors._fields):
        hidden, weights = torch.randn(7, 64).bfloat16(), torch.rand(7)
        layer = Layer(gate, 64, 40, torch.bfloat16, 1, bias=True)
        tensors = layer.tensors[0]
        spoilt = {"hidden": hidden, "weights": weights, **tensors._asdict()}[where]
        spoilt[(2, 5)[-spoilt.dim() :]] = bad
        out = torch.zeros(7, 64)
        layer.ffn.run(hidden, layer.experts, [None], [weights], out)
        inner = hidden.float() @ tensors.up.float().T + tensors.up_bias.float()
        h = reference.gate(gate, inner.double()).bfloat16().float()
        want = (h @ tensors.down.float().T + tensors.down_bias.float()) * weights.unsqueeze(1)
        assert torch.equal(out.isnan(), want.isnan()), where
        assert torch.equal(out[out.isinf()], want[want.isinf()]), where


def test_the_exponential_of_the_gates_is_exact_to_the_last_bits(isa: str) -> None:
    """Through silu, whose relative error is that of its exponential where that is large; past 88 it is infinite."""
    x = torch.cat([torch.linspace(-100, 100, 20001), torch.logspace(-30, 2, 2000), -torch.logspace(-30, 2, 2000)])
    ffn = ExpertFfn(Gate(gated=False), 1, 1, torch.float32)
    one = cpu.Matrix("plain", torch.ones(1, 1))
    out = torch.zeros(len(x), 1)
    ffn.run(x.unsqueeze(1).contiguous(), [ffn.expert(one, one)], [None], [None], out)
    want = torch.nn.functional.silu(x.double())
    error = (out[:, 0].double() - want).abs()
    assert (error <= 2.0**-21 * want.abs() + 1e-36).all()


@pytest.mark.parametrize("dtype", list(cpu.NUMBERS), ids=str)
def test_one_token_alone_gives_the_bits_of_a_step(dtype: torch.dtype, isa: str) -> None:
    layer = Layer(Gate(), 72, 40, dtype, 5, bias=True)
    hidden, weights = torch.randn(1, 72).to(dtype), torch.rand(1, 7)
    places = [6, 0, 3]
    experts = [layer.experts[i] for i in (4, 1, 2)]
    out = torch.zeros(1, 72)
    layer.ffn.run(hidden, experts, [None] * 3, [weights[0, place : place + 1] for place in places], out)
    found = layer.ffn.run_token(hidden, experts, places, weights)
    assert found.dtype is dtype
    assert torch.equal(found, out.to(dtype))


def test_a_token_that_does_not_fit_is_refused() -> None:
    layer = Layer(Gate(), 8, 4, torch.float32, 2)
    hidden, weights = torch.randn(1, 8), torch.rand(2)

    def run(**changed: object) -> None:
        given = {"hidden": hidden, "experts": layer.experts, "places": [0, 1], "weights": weights, **changed}
        layer.ffn.run_token(**given)  # type: ignore[arg-type]

    run()
    for changed, message in (
        ({"hidden": hidden.bfloat16()}, "hidden states must be .* in torch.float32 .* in torch.bfloat16"),
        ({"hidden": torch.randn(2, 8)}, r"not \[2, 8\]"),
        ({"hidden": torch.randn(1, 9)}, r"not \[1, 9\]"),
        ({"hidden": torch.randn(1, 16)[:, ::2]}, r"strides \(16, 2\)"),
        ({"weights": weights.double()}, "torch.float64"),
        ({"weights": torch.rand(4)[::2]}, "contiguous"),
        ({"places": [0, 2]}, "place 2 of 2 weights"),
        ({"places": [0, -1]}, "place is -1"),
        ({"places": [0]}, "2 experts and 1 places"),
        ({"experts": [], "places": []}, "0 experts"),
        ({"experts": Layer(Gate(), 16, 4, torch.float32, 2).experts}, "in a layer of hidden size 8, width 4, gated"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**changed)


def test_no_tokens_and_no_experts_add_nothing() -> None:
    layer = Layer(Gate(), 8, 8, torch.float32, 2)
    hidden, out = torch.randn(3, 8), torch.zeros(3, 8)
    layer.ffn.run(hidden, [], [], [], out)
    none = torch.zeros(0, dtype=torch.int64)
    layer.ffn.run(hidden, layer.experts[:1], [none], [torch.zeros(0)], out)
    layer.ffn.run(torch.zeros(0, 8), layer.experts, [None, none], [None, None], torch.zeros(0, 8))
    layer.ffn.submit(hidden, [], [], [], out).wait()
    assert not out.any()


def test_bad_input_is_refused_with_the_numbers() -> None:
    layer = Layer(Gate(), 8, 4, torch.float32, 1)
    ffn, experts, hidden, out = layer.ffn, layer.experts, torch.randn(3, 8), torch.zeros(3, 8)

    def run(**changed: object) -> None:
        given = {"hidden": hidden, "experts": experts, "tokens": [None], "weights": [None], "out": out, **changed}
        ffn.run(**given)  # type: ignore[arg-type]

    for changed, message in (
        ({"hidden": hidden.bfloat16()}, "hidden states must be .* in torch.float32 .* in torch.bfloat16"),
        ({"hidden": torch.randn(3, 9)}, r"\[T, 8\] .* not \[3, 9\]"),
        ({"hidden": torch.randn(8, 3).T}, r"strides \(1, 3\)"),
        ({"out": torch.zeros(3, 8).double()}, "out must be .* torch.float64"),
        ({"out": torch.zeros(2, 8)}, "out has 2 rows and x 3"),
        ({"tokens": [torch.tensor([3])]}, "token 0 of a group is row 3 of 3"),
        ({"tokens": [torch.tensor([-1])]}, "row -1 of 3"),
        ({"tokens": [torch.tensor([1], dtype=torch.int32)]}, "int64 on the CPU, not torch.int32"),
        ({"tokens": [torch.tensor([0, 1])], "weights": [torch.rand(3)]}, r"contiguous \(2,\) .* not \(3,\)"),
        ({"weights": [torch.rand(3).double()]}, "torch.float64"),
        ({"tokens": [torch.arange(4)[::2]]}, r"rows must be contiguous .* torch.int64 \(2,\)"),
        ({"weights": [torch.rand(6)[::2]]}, r"weights must be contiguous \(3,\) .* not \(3,\)"),
        ({"weights": [torch.rand(3, device="meta")]}, "on the CPU"),
        ({"tokens": [None, None]}, "zip"),
        ({"out_rows": [1]}, r"rows of out are 1\.\.4 of 3"),
        ({"out_rows": [-1]}, "out_row is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**changed)
    assert not out.any()
    plain = cpu.Matrix("plain", torch.randn(8, 8))
    with pytest.raises(ValueError, match=r"up \(8, 8\) and down \(8, 8\) are not \(8, 8\) and \(8, 4\)"):
        ffn.expert(plain, plain)
    with pytest.raises(ValueError, match=r"the up bias is \(3,\)"):
        ffn.expert(plain, cpu.Matrix("plain", torch.randn(8, 4)), torch.randn(3))
    for bias in (torch.randn(16)[::2], torch.randn(8).bfloat16(), torch.randn(8, device="meta")):
        with pytest.raises(ValueError, match=r"the down bias is \(8,\) of strides \(\d,\) in .* not contiguous \(8,\)"):
            ffn.expert(plain, cpu.Matrix("plain", torch.randn(8, 4)), None, bias)
    with pytest.raises(ValueError, match="up in bf16 with activations in fp32"):
        ffn.expert(cpu.Matrix("plain", torch.randn(8, 8).bfloat16()), cpu.Matrix("plain", torch.randn(8, 4)))
    with pytest.raises(ValueError, match=r"activations are .*, not torch.float64"):
        ExpertFfn(Gate(), 8, 4, torch.float64)
    with pytest.raises(ValueError, match=r"are not of one expert"):
        _C.expert("fp32", plain.capsule, cpu.Matrix("plain", torch.randn(9, 8)).capsule, None, None)
    with pytest.raises(TypeError, match=r"a moert\.expert is wanted"):
        _C.ffn_run(("silu", True, False, 1, 1, 1, 0, 1), "fp32", 8, 4, 64, 3, 64, 3, [(object(), 1, None, None, None)])
    other = Layer(Gate(), 16, 4, torch.float32, 1)
    with pytest.raises(ValueError, match="in a layer of hidden size 8, width 4, gated"):
        run(experts=other.experts)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 1024), (300, 129), (2048, 64)])
@pytest.mark.parametrize("named", [True, False])
def test_rows_are_added_with_two_roundings(rows: int, width: int, named: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    held, weights = torch.randn(rows, width, generator=generator), torch.randn(rows, generator=generator)
    out = torch.randn(rows + 9, width, generator=generator)
    tokens = torch.randperm(rows + 9, generator=generator)[:rows] if named else None
    want = out.clone()
    want[torch.arange(rows) if tokens is None else tokens] += held * weights[:, None]
    add_rows(held, tokens, weights, out)
    assert torch.equal(out, want)


def test_rows_that_do_not_fit_are_refused() -> None:
    held, weights, out = torch.ones(2, 4), torch.ones(2), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="row 1 goes to row 3 of 3"):
        add_rows(held, torch.tensor([0, 3]), weights, out)
    with pytest.raises(ValueError, match="row 0 goes to row -1 of 3"):
        add_rows(held, torch.tensor([-1, 1]), weights, out)
    with pytest.raises(ValueError, match="held must be contiguous"):
        add_rows(held.bfloat16(), None, weights, out)
    with pytest.raises(ValueError, match="weights must be contiguous"):
        add_rows(held, None, weights.double(), out)
    with pytest.raises(ValueError, match="3 tokens for 2 rows"):
        add_rows(held, torch.tensor([0, 1, 2]), torch.ones(3), out)
    with pytest.raises(ValueError, match=r"out must be contiguous \[rows, 4\] .* not \[\]"):
        add_rows(held, None, weights, torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"held must be contiguous \[rows, D\] .* not \[\]"):
        add_rows(torch.tensor(0.0), None, weights, out)
    with pytest.raises(ValueError, match="out must be contiguous"):
        add_rows(held, None, weights, torch.zeros(4, 3).T)
    for places, message in (([2, 0], "weights .2, 0. of 2"), ([0], "of 2 do not fit"), ([-1, 0], "-1")):
        with pytest.raises(ValueError, match=message):
            add_in_order(held, places, weights, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"held must be \[K, D\], not \[4\]"):
        add_in_order(held[0], [0], weights, torch.zeros(1, 4))
    assert torch.equal(out, torch.zeros(3, 4))
