"""The kernels for many tokens against plain torch in fp64: every format, layout and gate, absent and empty experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_support import DEVICE, FORMATS, in_slots, stored

from moert.kernels import reference, reference_grouped
from moert.kernels.bank import Bank, bank_matrix
from moert.kernels.combine import combine
from moert.kernels.device_experts import device_experts, grouped_experts, is_few
from moert.kernels.dispatch import Blocks, dispatch
from moert.kernels.gate import Gate
from moert.kernels.grouped_configs import GroupedConfig, block_m_for, grouped_config
from moert.kernels.grouped_down import grouped_down
from moert.kernels.grouped_gate_up import grouped_gate_up

CLAMPED = Gate(interleaved=True, alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0)

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""dtype of x -> largest error of a layer's output over its size: h and each row are rounded, and weights if decoded."""


class Layer:
    """A bank with some of its experts absent, what they absent from, and a step."""

    def __init__(
        self,
        choice: str = "plain",
        gate: Gate | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        tokens: int = 12,
        top_k: int = 3,
        experts: int = 8,
        present: int = 5,
        slots: int = 6,
        hidden: int = 128,
        width: int = 128,
        transposed: bool = False,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        gate = gate or Gate()
        places = torch.randperm(slots)[:present].tolist()

        def matrix(n: int, k: int) -> Any:
            weights = []
            for _ in range(present):
                weight = (torch.randn(n, k) / k**0.5).to(dtype)
                if choice == "plain":
                    weights.append({"w": weight.T.contiguous() if transposed else weight})
                else:
                    weights.append(stored(choice, weight))
                if bias:
                    weights[-1]["w_bias"] = torch.randn(n).to(dtype)
            tensors = in_slots(weights, places, slots, apart=64)
            return bank_matrix(choice.partition(",")[0], tensors, "w", transposed=transposed)

        self.bank = Bank(matrix(width * (2 if gate.gated else 1), hidden), matrix(hidden, width), gate)
        table = torch.full((experts,), -1, dtype=torch.int32)
        table[torch.randperm(experts)[:present]] = torch.tensor(places, dtype=torch.int32)
        self.slot_of = table.to(DEVICE)
        self.x = torch.randn(tokens, hidden).to(dtype).to(DEVICE)
        ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]) if tokens else torch.empty(0, top_k)
        # Of one pick in eight, there is no such expert, or the weight is 0.
        ids = torch.where(torch.rand(tokens, top_k) < 0.1, experts, ids).long()
        weights = torch.where(torch.rand(tokens, top_k) < 0.05, 0.0, torch.rand(tokens, top_k))
        self.ids, self.weights = ids.to(DEVICE), weights.to(DEVICE)

    @property
    def step(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.ids, self.weights, self.slot_of

    def blocks(self, block_m: int = 16, order: torch.Tensor | None = None) -> Blocks:
        return dispatch(*self.step, self.bank.slots, block_m, order=order)

    def wanted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """h and y in fp64."""
        h = reference.decode_gate_up(self.bank, self.x, *self.step)
        return h, reference.decode_down(self.bank, h, *self.step)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    got = got.cpu().double()
    computed = ~wanted.isnan()
    return float((got[computed] - wanted[computed]).norm() / wanted[computed].norm().clamp(min=1e-30))


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def check(layer: Layer, config: GroupedConfig, block_m: int = 16) -> None:
    """Both products and the sum, each against fp64; nothing else is written."""
    limit = LIMITS[layer.x.dtype]
    blocks = layer.blocks(block_m)
    h, y = layer.wanted()
    out = poisoned(*h.shape, dtype=layer.x.dtype)
    got = grouped_gate_up(layer.bank, layer.x, blocks, out=out, config=config)
    assert torch.equal(got.isnan().cpu(), h.isnan())
    assert error(got, h) < limit
    out = poisoned(h.shape[0], layer.bank.hidden, dtype=layer.x.dtype)
    rows = grouped_down(layer.bank, got, layer.weights, blocks, out=out, config=config)
    wanted = reference_grouped.grouped_down(layer.bank, got.cpu(), *map(torch.Tensor.cpu, layer.step))
    assert torch.equal(rows.isnan().cpu(), wanted.isnan())
    assert error(rows, wanted) < limit
    total = combine(rows, *layer.step, layer.bank.slots)
    assert error(total, reference_grouped.combine(layer.bank, rows.cpu(), *map(torch.Tensor.cpu, layer.step))) < limit
    assert error(total, y) < limit
    assert not total[(h.view(layer.ids.numel(), -1).isnan().all(1).view(layer.ids.shape)).all(1)].any()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("choice", FORMATS)
def test_every_format(choice: str, swapped: bool) -> None:
    """With each way to multiply, and each number of groups a tile has: several, one, part of one."""
    dtype = torch.float32 if swapped else torch.bfloat16
    check(Layer(choice, dtype=dtype), GroupedConfig(128, 64, swapped=swapped))


@pytest.mark.parametrize(
    ("choice", "gate", "dtype", "options"),
    [
        ("plain", Gate(), torch.float16, {}),
        ("plain", CLAMPED, torch.bfloat16, {"bias": True}),
        ("plain", CLAMPED, torch.float32, {"bias": True, "transposed": True}),
        ("plain", Gate(activation="gelu_tanh"), torch.bfloat16, {"bias": True, "transposed": True}),
        ("plain", Gate(activation="relu2", gated=False), torch.float32, {"transposed": True}),
        ("int8", Gate(activation="relu2", gated=False), torch.float32, {"bias": True}),
        ("mxfp4", CLAMPED, torch.bfloat16, {"bias": True}),
        ("fp8", Gate(activation="gelu"), torch.float16, {}),
    ],
)
def test_every_layout_and_kind_of_gate(choice: str, gate: Gate, dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(Layer(choice, gate, dtype=dtype, **options), GroupedConfig(64, 128))


@settings(max_examples=6)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 64),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([32, 96]),
    st.sampled_from([32, 96]),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_shapes(
    choice: str, tokens: int, top_k: int, present: int, hidden: int, width: int, gated: bool, seed: int
) -> None:
    """Sizes that blocks do not divide; with the sizes of blocks of the table."""
    if "128" in choice:
        hidden, width = 256, 128
    gate = Gate() if gated else Gate(activation="silu", gated=False)
    layer = Layer(
        choice,
        gate,
        dtype=torch.float32,
        tokens=tokens,
        top_k=top_k,
        present=present,
        hidden=hidden,
        width=width,
        seed=seed,
    )
    _, y = layer.wanted()
    assert error(grouped_experts(layer.bank, layer.x, *layer.step), y) < 2e-6


@pytest.mark.parametrize("plain", [33, 47])
def test_plain_weights_of_odd_sizes(plain: int) -> None:
    layer = Layer(dtype=torch.float32, hidden=plain, width=plain + 8, bias=True)
    check(layer, GroupedConfig(32, 32))


@pytest.mark.parametrize("tokens", [1, 2, 9, 64])
def test_a_layer_by_either_path(tokens: int) -> None:
    """More tokens than few, fewer, and across the border between them."""
    layer = Layer("int4", tokens=tokens, experts=12, present=7, slots=7, top_k=2, hidden=64, width=32)
    _, y = layer.wanted()
    assert is_few(tokens, 2, 12) == (tokens <= 2)
    got = device_experts(layer.bank, layer.x, *layer.step)
    assert got.dtype == layer.x.dtype
    assert error(got, y) < LIMITS[torch.bfloat16]
    assert error(grouped_experts(layer.bank, layer.x, *layer.step), y) < LIMITS[torch.bfloat16]


def test_every_expert_absent_and_no_tokens() -> None:
    layer = Layer(tokens=6)
    absent = torch.full_like(layer.slot_of, -1)
    for path in (device_experts, grouped_experts):
        out = poisoned(6, 128, dtype=torch.bfloat16)
        assert not path(layer.bank, layer.x, layer.ids, layer.weights, absent, out=out).any()
        layer.slot_of[:] = layer.bank.slots
        assert not path(layer.bank, layer.x, *layer.step).any()
        nothing = path(layer.bank, layer.x[:0], layer.ids[:0], layer.weights[:0], layer.slot_of)
        assert nothing.shape == (0, 128)


def test_a_step_in_parts_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(tokens=23, hidden=64, width=32)
    whole = grouped_experts(layer.bank, layer.x, *layer.step)
    monkeypatch.setattr("moert.kernels.device_experts.MOST_SCRATCH_BYTES", 8 * 3 * (64 + 32) * 2)
    assert torch.equal(grouped_experts(layer.bank, layer.x, *layer.step), whole)


def test_a_token_does_not_depend_on_its_company_nor_on_slots() -> None:
    layer = Layer("int8", tokens=17)
    config = GroupedConfig(128, 64)

    def rows(ids: torch.Tensor, bank: Bank, slot_of: torch.Tensor) -> torch.Tensor:
        blocks = dispatch(ids, layer.weights, slot_of, bank.slots, 16)
        h = grouped_gate_up(bank, layer.x, blocks, out=torch.zeros(51, 128, device=DEVICE), config=config)
        y = grouped_down(bank, h, layer.weights, blocks, out=torch.zeros(51, 128, device=DEVICE), config=config)
        return combine(y, ids, layer.weights, slot_of, bank.slots)

    before = rows(layer.ids, layer.bank, layer.slot_of)
    others = layer.ids.clone()
    others[:9] = others[:9].flip(0)
    assert torch.equal(rows(others, layer.bank, layer.slot_of)[9:], before[9:])
    permutation = torch.randperm(layer.bank.slots)

    def moved(matrix: Any) -> Any:
        return replace(
            matrix,
            codes=matrix.codes[permutation],
            scales=None if matrix.scales is None else matrix.scales[permutation],
        )

    bank = Bank(moved(layer.bank.up), moved(layer.bank.down), layer.bank.gate)
    places = permutation.argsort().int().to(DEVICE)
    slot_of = torch.where(layer.slot_of < 0, -1, places[layer.slot_of.clamp(min=0).long()])
    assert torch.equal(rows(layer.ids, bank, slot_of), before)


def test_the_table_has_an_entry_for_everything() -> None:
    plain = Layer(tokens=0).bank.up
    for capability in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        for picks, experts in ((1, 1), (64, 128), (512, 128), (2**20, 8)):
            block_m = block_m_for(picks, experts, capability)
            assert 16 <= block_m <= 128
            for dtype in (torch.bfloat16, torch.float32):
                for kernel in ("gate_up", "down"):
                    config = grouped_config(kernel, plain, block_m, dtype, capability)
                    assert config.num_warps in (4, 8) and not (config.swapped and block_m > 32)
                    assert config.swapped == (block_m <= 32 and 90 <= capability < 110 and dtype == torch.bfloat16)


def _bad(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    layer = Layer(tokens=4)
    arguments = {"hidden": layer.x, "ids": layer.ids, "weights": layer.weights, "slot_of": layer.slot_of}
    change(arguments)
    return {"bank": layer.bank, **arguments}


@pytest.mark.parametrize("path", [device_experts, grouped_experts])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(hidden=a["hidden"][:, :64].contiguous()), "128 columns"),
        (lambda a: a.update(hidden=a["hidden"][:3]), "3 rows|3, 128"),
        (lambda a: a.update(hidden=a["hidden"].T.contiguous().T), "contiguous"),
        (lambda a: a.update(hidden=a["hidden"].double()), "float64"),
        (lambda a: a.update(hidden=a["hidden"].to("meta")), "meta"),
        (lambda a: a.update(ids=a["ids"].float()), "float32"),
        (lambda a: a.update(ids=a["ids"][:, :2].contiguous()), r"\[4, 2\]"),
        (lambda a: a.update(weights=a["weights"].int()), "int32"),
        (lambda a: a.update(slot_of=a["slot_of"].long()), "int64"),
        (lambda a: a.update(slot_of=a["slot_of"][:0]), "0 experts"),
        (lambda a: a.update(out=torch.empty(4, 64, dtype=torch.bfloat16, device=DEVICE)), "out must be"),
        (lambda a: a.update(out=torch.empty(4, 128, device=DEVICE)), "out must be"),
    ],
)
def test_tensors_that_do_not_fit(path: Any, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        path(**_bad(change))


def test_blocks_that_do_not_fit() -> None:
    layer = Layer(tokens=4)
    blocks = layer.blocks()
    for call, message in (
        (lambda: dispatch(*layer.step, 6, 24), "block_m=24"),
        (lambda: dispatch(*layer.step, 6, 8), "block_m=8"),
        (lambda: dispatch(*layer.step, 6, 16, order=torch.zeros(9, dtype=torch.int32, device=DEVICE)), "9 experts"),
        (lambda: grouped_gate_up(layer.bank, layer.x, blocks, experts=(3, 9)), r"\(3, 9\)"),
        (lambda: grouped_gate_up(layer.bank, layer.x, blocks, experts=(3, 2)), r"\(3, 2\)"),
        (lambda: grouped_gate_up(layer.bank, layer.x[:2], blocks), r"\[2, 128\]"),
        (lambda: grouped_down(layer.bank, torch.zeros(5, 128, device=DEVICE), layer.weights, blocks), r"\[5, 128\]"),
        (lambda: combine(torch.zeros(5, 128, device=DEVICE), *layer.step, 6), r"\[5, 128\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
