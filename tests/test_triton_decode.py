"""The pair of kernels for a few tokens, against `reference` in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_support import DEVICE, FORMATS, INTERPRETED, guarded, in_slots, stored, survives

from moert.kernels import reference
from moert.kernels.bank import Bank, BankMatrix, bank_matrix
from moert.kernels.configs import DecodeConfig, decode_config
from moert.kernels.decode_down import decode_down
from moert.kernels.decode_gate_up import decode_gate_up
from moert.kernels.gate import Gate

CONFIG = DecodeConfig(block_n=64, block_k=256, block_picks=4)
"""Few and large programs: what the interpreter runs fast."""

ERROR = 5e-7
"""Of a result, ||error|| / ||result||, in every format: codes are decoded exactly, and sums are fp32."""


@dataclass
class Case:
    """A bank in which three of six experts have a slot, and a step."""

    bank: Bank
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    slot_of: torch.Tensor

    @property
    def step(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.ids, self.weights, self.slot_of


SLOT_OF = [4, -1, 0, -1, 2, 99]
"""The last expert's is beyond the bank of 5: as good as none."""


def make_bank(
    choice: str,
    gate: Gate,
    hidden: int,
    width: int,
    *,
    seed: int = 0,
    bias: torch.dtype | None = None,
    transposed: bool = False,
    slots: Sequence[int] = (4, 0, 2),
    apart: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Bank:
    random = torch.Generator().manual_seed(seed)
    matrices = []
    for n, k in ((width * (2 if gate.gated else 1), hidden), (hidden, width)):
        experts = []
        for _ in slots:
            weight = torch.randn(n, k, generator=random) / k**0.5
            if choice == "plain":
                parts = {"w": (weight.T.contiguous() if transposed else weight).to(dtype)}
            else:
                parts = stored(choice, weight)
            if bias is not None:
                parts["w_bias"] = torch.randn(n, generator=random).to(bias)
            experts.append(parts)
        tensors = in_slots(experts, slots, 5, apart=apart)
        matrices.append(bank_matrix(choice.partition(",")[0], tensors, "w", transposed=transposed))
    return Bank(*matrices, gate)


def make_case(bank: Bank, tokens: int, picks: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Case:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, bank.hidden, generator=random).to(dtype)
    # Each of the experts there are, and ids of none.
    ids = torch.randint(-2, len(SLOT_OF) + 2, (tokens, picks), generator=random)
    weights = torch.rand(tokens, picks, generator=random)
    return Case(bank, x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), torch.tensor(SLOT_OF).int().to(DEVICE))


def relative(result: torch.Tensor, exact: torch.Tensor) -> float:
    if not exact.norm():
        return result.double().norm().item()
    return ((result.cpu().double() - exact).norm() / exact.norm()).item()


def run(case: Case, config: DecodeConfig | None = CONFIG) -> tuple[torch.Tensor, torch.Tensor]:
    """h, NaN where nothing was to be computed, and y."""
    h = torch.full((case.ids.numel(), case.bank.width), torch.nan, device=DEVICE)
    decode_gate_up(case.bank, case.x, *case.step, out=h, config=config)
    y = torch.full((case.ids.shape[0], case.bank.hidden), torch.nan, device=DEVICE)
    return h, decode_down(case.bank, h, *case.step, out=y, config=config)


def check(case: Case, config: DecodeConfig | None = CONFIG) -> None:
    h, y = run(case, config)
    exact = reference.decode_gate_up(case.bank, case.x, *case.step)
    computed = ~exact.isnan().all(1)
    assert torch.equal(h.cpu().isnan(), exact.isnan()), "absent picks are left alone, and no others"
    assert relative(h[computed], exact[computed]) < ERROR
    assert relative(y, reference.decode_down(case.bank, h, *case.step)) < ERROR


GATES = {
    "int8": Gate(interleaved=True),
    "int4": Gate(gated=False, activation="relu2"),
    "int4,group=128": Gate(activation="gelu_tanh"),
    "mxfp4": Gate(interleaved=True, alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0),
}


@pytest.mark.parametrize("choice", FORMATS)
def test_both_products_in_every_format(choice: str) -> None:
    gate = GATES.get(choice, Gate())
    check(make_case(make_bank(choice, gate, 256, 128, bias=torch.bfloat16), 2, 4))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain_weights_of_other_dtypes_and_layouts(dtype: torch.dtype, transposed: bool) -> None:
    bank = make_bank("plain", Gate(), 70, 37, dtype=dtype, transposed=transposed, bias=dtype)
    check(make_case(bank, 2, 3, dtype=dtype))


def test_the_blocks_of_the_table() -> None:
    """Those that a GPU runs: many small programs, so one token is enough."""
    for choice in ("plain", "int4", "fp8"):
        check(make_case(make_bank(choice, Gate(), 128, 32), 1, 3, seed=2), None)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    choice = draw(st.sampled_from(FORMATS))
    name, _, how = choice.partition(",")
    multiple = {"plain": 1, "fp8": 1}.get(name, 128 if "128" in how else 32)
    hidden, width = (multiple * draw(st.integers(1, 150 // multiple or 1)) for _ in range(2))
    gated = draw(st.booleans())
    gate = Gate(gated=gated, interleaved=gated and draw(st.booleans()))
    bank = make_bank(
        choice,
        gate,
        hidden,
        width,
        seed=draw(st.integers(0, 9)),
        bias=draw(st.sampled_from([None, torch.bfloat16, torch.float32])),
        transposed=name == "plain" and draw(st.booleans()),
        apart=draw(st.sampled_from([0, 1, 16])),
        slots=draw(st.sampled_from([(4, 0, 2), (0, 2, 4)])),
    )
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    case = make_case(bank, draw(st.integers(1, 2)), draw(st.integers(1, 5)), seed=draw(st.integers(0, 99)), dtype=dtype)
    case.ids = case.ids.to(draw(st.sampled_from([torch.int32, torch.int64])))
    case.weights = case.weights.to(draw(st.sampled_from([torch.bfloat16, torch.float32])))
    return case


@settings(max_examples=20)
@given(cases())
def test_random_shapes_formats_and_layouts(case: Case) -> None:
    check(case)


def test_the_reference_is_an_expert_in_plain_torch() -> None:
    """The same formula by other means: whole experts in fp32, token by token."""
    bank = make_bank("plain", Gate(), 48, 24, dtype=torch.float32, bias=torch.float32)
    case = make_case(bank, 5, 4, dtype=torch.float32)
    h = reference.decode_gate_up(bank, case.x, *case.step)
    wanted = torch.zeros(5, 48)
    for token, (ids, weights) in enumerate(zip(case.ids.tolist(), case.weights.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            slot = {0: 4, 2: 0, 4: 2}.get(expert)
            if slot is None:
                continue
            parts = {
                "gate_up_proj": bank.up.codes[slot].cpu(),
                "gate_up_proj_bias": bank.up.bias[slot].cpu(),
                "down_proj": bank.down.codes[slot].cpu(),
                "down_proj_bias": bank.down.bias[slot].cpu(),
            }
            row = case.x[token : token + 1].cpu()
            out = reference.expert_ffn(row, parts, lambda up: torch.nn.functional.silu(up[:, :24]) * up[:, 24:])
            wanted[token] += weight * out[0]
    torch.testing.assert_close(reference.decode_down(bank, h, *case.step).float(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", FORMATS)
def test_the_reference_means_what_the_format_means(choice: str) -> None:
    from moert.formats import FormatChoice

    weight = torch.randn(160, 256, generator=torch.Generator().manual_seed(3))
    parts = stored(choice, weight)
    matrix = bank_matrix(choice.partition(",")[0], in_slots([parts], [2], 4), "w")
    wanted = FormatChoice.parse(choice).make().decode(parts)["w"]
    torch.testing.assert_close(reference.bank_weight(matrix, 2).float(), wanted.float(), rtol=0, atol=0)


def test_nothing_present() -> None:
    case = make_case(make_bank("plain", Gate(), 32, 32), 2, 3)
    case.slot_of.fill_(-1)
    h, y = run(case)
    assert h.isnan().all()
    assert not y.any()


def test_no_tokens() -> None:
    case = make_case(make_bank("plain", Gate(), 32, 32), 0, 3)
    assert decode_gate_up(case.bank, case.x, *case.step).shape == (0, 32)
    assert decode_down(case.bank, torch.empty(0, 32, device=DEVICE), *case.step, dtype=torch.bfloat16).shape == (0, 32)


@pytest.mark.parametrize("wrong", [-1, 6, 2**31 - 1, -(2**31), 2**62, -(2**62)])
def test_an_id_of_no_expert_contributes_nothing(wrong: int) -> None:
    case = make_case(make_bank("int8", Gate(), 32, 32), 1, 2)
    case.ids[0] = torch.tensor([0, 2])
    case.weights[0] = torch.tensor([0.5, 1.0])
    alone = run(Case(case.bank, case.x, case.ids[:, :1].contiguous(), case.weights[:, :1].contiguous(), case.slot_of))
    case.ids[0, 1] = wrong
    h, y = run(case)
    assert h[1].isnan().all()
    assert torch.equal(y, alone[1])


def test_a_weight_of_0_contributes_nothing_even_if_the_expert_is_broken() -> None:
    case = make_case(make_bank("plain", Gate(), 32, 32), 1, 2)
    case.ids[0] = torch.tensor([0, 1])
    case.slot_of[1] = 3
    assert case.bank.down.codes[3].isnan().all()
    case.weights[0] = torch.tensor([0.5, 0.0])
    h, y = run(case)
    assert h[1].isnan().all() and y.isfinite().all()
    case.weights[0, 1] = math.nan
    assert run(case)[1].isnan().all(), "NaN is no 0"


def test_a_result_is_the_same_to_the_last_bit_in_any_company_and_any_slots() -> None:
    case = make_case(make_bank("int4", Gate(), 64, 64, slots=(4, 0, 2)), 3, 4)
    case.slot_of[5] = -1
    _, together = run(case)
    _, alone = run(Case(case.bank, case.x[1:2], case.ids[1:2], case.weights[1:2], case.slot_of))
    assert torch.equal(together[1], alone[0])
    moved = make_bank("int4", Gate(), 64, 64, slots=(1, 3, 0))
    slot_of = torch.tensor([1, -1, 3, -1, 0, -1], dtype=torch.int32, device=DEVICE)
    _, elsewhere = run(Case(moved, case.x, case.ids, case.weights, slot_of))
    assert together.any() and torch.equal(together, elsewhere)


def test_more_picks_than_are_read_at_a_time_are_all_summed_and_rounded_once() -> None:
    case = make_case(make_bank("plain", Gate(), 64, 32), 2, 5)
    case.ids.copy_(torch.tensor([[0, 2, 4, 0, 2], [4, 1, 0, 3, 2]]))
    check(case)
    h, y = run(case)
    half = decode_down(case.bank, h, *case.step, dtype=torch.bfloat16, config=CONFIG)
    assert torch.equal(half, y.bfloat16())


def test_every_format_has_a_configuration_on_every_architecture() -> None:
    for choice in FORMATS:
        bank = make_bank(choice, Gate(), 128, 128)
        for capability in (80, 86, 89, 90, 100, 120):
            for kernel, matrix in (("decode_gate_up", bank.up), ("decode_down", bank.down)):
                config = decode_config(kernel, matrix, capability).fitted(matrix, 128, 8)
                assert config.block_k % max(1, matrix.group) == 0
                assert config.origin in ("compiled", "measured")


def guarded_bank(bank: Bank, at_end: bool) -> Bank:
    def matrix(of: BankMatrix) -> BankMatrix:
        parts = {name: getattr(of, name) for name in ("codes", "scales", "zeros", "bias")}
        return replace(of, **{name: guarded(part, at_end=at_end) for name, part in parts.items() if part is not None})

    return Bank(matrix(bank.up), matrix(bank.down), bank.gate)


def run_between_guards() -> None:
    """Every tensor has no access beside it, and blocks are larger than the work wherever they can be."""
    ways = (
        ("plain", Gate(), 33, 37, False),
        ("plain", Gate(interleaved=True), 33, 37, True),
        ("int4,symmetric=false", Gate(gated=False), 96, 96, False),
        ("int8", Gate(interleaved=True), 96, 96, False),
        ("fp8", Gate(), 140, 150, False),
    )
    for at_end in (True, False):
        for choice, gate, hidden, width, transposed in ways:
            bank = make_bank(choice, gate, hidden, width, transposed=transposed, bias=torch.float32)
            bank = guarded_bank(bank, at_end)
            case = make_case(bank, 1, 3)
            case.ids[0] = torch.tensor([0, 2**40, 2])
            inputs = (guarded(tensor, at_end=at_end) for tensor in (case.x, *case.step))
            case = Case(bank, *inputs)
            h = guarded(torch.zeros(3, width), at_end=at_end)
            y = guarded(torch.zeros(1, hidden), at_end=at_end)
            decode_gate_up(bank, case.x, *case.step, out=h, config=CONFIG)
            decode_down(bank, h, *case.step, out=y, config=CONFIG)
            exact = reference.decode_gate_up(bank, case.x, *case.step)
            assert relative(h[::2], exact[::2]) < ERROR
            assert relative(y, reference.decode_down(bank, exact, *case.step)) < ERROR


@pytest.mark.skipif(not INTERPRETED, reason="pages of the host")
def test_nothing_beside_the_tensors_is_touched() -> None:
    assert survives(run_between_guards)


@pytest.mark.gpu
def test_a_graph_that_captured_them_follows_the_slot_table() -> None:
    case = make_case(make_bank("int4", Gate(), 256, 128), 2, 4)
    h = torch.empty(8, 128, device=DEVICE)
    y = torch.empty(2, 256, device=DEVICE)

    def step() -> None:
        decode_gate_up(case.bank, case.x, *case.step, out=h)
        decode_down(case.bank, h, *case.step, out=y)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for slots in ([-1] * 6, SLOT_OF, [2, 0, 4, -1, -1, 0]):
        case.slot_of.copy_(torch.tensor(slots))
        case.x.normal_()
        graph.replay()
        exact = reference.decode_gate_up(case.bank, case.x, *case.step)
        assert relative(y, reference.decode_down(case.bank, exact, *case.step)) < 2 * ERROR


@pytest.mark.gpu
@pytest.mark.parametrize("choice", FORMATS)
@pytest.mark.parametrize("tokens", [1, 8, 200])
def test_the_sizes_of_a_real_model(choice: str, tokens: int) -> None:
    check(make_case(make_bank(choice, GATES.get(choice, Gate()), 2048, 768), tokens, 8), None)
