"""A layer's step against the formula, at every cache size, with reads that come late, out of order or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.errors import MoertError, TransferError
from moert.formats import TensorSpec
from moert.policies import make_policy
from moert.residency import Residency
from moert.runtime import step as step_module
from moert.runtime.layer import Fetch, LayerCache, LayerSpec, Place
from moert.runtime.pipeline import Pipeline
from moert.runtime.routing import group_by_expert
from moert.runtime.step import run_step
from moert.tiers.disk import Priority
from moert.types import ExpertId

D, E = 8, 6
WEIGHTS = torch.randn(E, D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()


class FakeHandle:
    """A read that a thread finishes after a while, or fails."""

    def __init__(self, delay_s: float, error: Exception | None) -> None:
        self._over = threading.Event()
        self._error = error
        self.read_s = delay_s
        self.wasted = 0
        self.cancelled = False
        if delay_s:
            threading.Timer(delay_s, self._over.set).start()
        else:
            self._over.set()

    @property
    def ready(self) -> bool:
        return self._over.is_set()

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        assert self._over.wait(10)
        if self.cancelled:
            raise MoertError("cancelled")
        if self._error is not None:
            raise self._error
        return (0,)

    def cancel(self) -> bool:
        return False

    def give_up(self) -> bool:
        return False

    def promote(self, priority: Priority = Priority.DEMAND) -> bool:
        return False


class FakeLayer(LayerCache):
    """Slots of NaN that become an expert's weights when its read is waited for."""

    handle = FakeHandle

    def __init__(self, capacity: int, delays_s: Mapping[int, float], failing: frozenset[int] = frozenset()) -> None:
        spec = LayerSpec(0, "layer", E, (TensorSpec("w", (D, D), torch.float32),), top_k=2, num_identity=2)
        super().__init__(spec, Residency(capacity, make_policy("lru", capacity)))
        self.delays_s = delays_s
        self.failing = set(failing)
        self.slots = torch.full((capacity, D, D), torch.nan)
        self.fetched: list[int] = []
        self.pipeline = Pipeline([self], 4)

    def _can_submit(self, others: int = 0) -> bool:
        return True

    def read_bytes(self, expert: int) -> int:
        return 4096

    def _submit(self, places: Sequence[Place], priority: Priority) -> list[Fetch]:
        return [self._read(expert, slot) for expert, slot in places]

    def _read(self, expert: int, slot: int) -> Fetch:
        self.slots[slot] = torch.nan
        self.fetched.append(expert)
        error = TransferError(5, "no luck", "shard") if expert in self.failing else None
        handle: Any = self.handle(self.delays_s.get(expert, 0.0), error)
        return Fetch(handle, 4096)

    def arrive(self, expert: ExpertId, fetch: Fetch) -> None:
        super().arrive(expert, fetch)
        slot = self.residency.slot_of(expert)
        assert slot is not None
        self.slots[slot] = WEIGHTS[expert.expert]

    def weights(self, expert: int) -> dict[str, torch.Tensor]:
        slot = self.residency.slot_of(ExpertId(0, expert))
        assert slot is not None
        return {"w": self.slots[slot]}


def compute(hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.tanh(hidden @ weights["w"].T)


def expected(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The formula, pick by pick, in double precision."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            expert, weight, x = int(ids[token, k]), weights[token, k].double(), hidden[token].double()
            if 0 <= expert < E:
                out[token] += weight * torch.tanh(WEIGHTS[expert].double() @ x)
            elif E <= expert < E + 2:
                out[token] += weight * x
    return out


def run(layer: FakeLayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, n: int = 4) -> torch.Tensor:
    if not layer.pipeline.busy:
        layer.pipeline = Pipeline([layer], n)
    return run_step(layer, compute, hidden, ids, weights, pipeline=layer.pipeline, check=True)


def routing(
    tokens: int, top_k: int, seed: int, sentinels: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-1, E + 4) if sentinels else (0, E)
    ids = torch.randint(low, high, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    weights[torch.rand(tokens, top_k, generator=generator) < 0.1] = 0.0
    return torch.randn(tokens, D, generator=generator), ids, weights


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(0, 9),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    held=st.sampled_from([0, 64, 1 << 20]),
)
def test_step_is_the_formula_and_the_same_bits_at_every_size(tokens: int, top_k: int, seed: int, held: int) -> None:
    hidden, ids, weights = routing(tokens, top_k, seed)
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "HELD_OUTPUT_BYTES", held)
        for capacity in (1, 2, 3, E):
            layer = FakeLayer(capacity, {})
            outputs += [run(layer, hidden, ids, weights, n) for n in (1, 2, 8)]
    torch.testing.assert_close(outputs[0].double(), expected(hidden, ids, weights), rtol=1e-5, atol=1e-5)
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("delays_ms", [[9, 1, 5, 3, 7, 0], [0, 8, 0, 8, 0, 8], [20, 0, 0, 0, 0, 0]])
def test_order_of_arrival_does_not_change_a_bit(delays_ms: list[int]) -> None:
    hidden, ids, weights = routing(12, 3, seed=5)
    want = run(FakeLayer(E, {}), hidden, ids, weights)
    for capacity in (2, 4, E):
        layer = FakeLayer(capacity, {expert: ms / 1000 for expert, ms in enumerate(delays_ms)})
        for _ in range(3):
            assert torch.equal(run(layer, hidden, ids, weights), want)


@pytest.mark.parametrize(("held_bytes", "before"), [(1 << 20, E - 1), (2 * D * 4, 2), (0, 0)])
def test_resident_experts_run_while_the_missing_are_read(
    held_bytes: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as their outputs may wait in memory for the first one's."""
    monkeypatch.setattr(step_module, "HELD_OUTPUT_BYTES", held_bytes)
    ids = torch.arange(E)[None]
    weights, hidden = torch.ones(1, E), torch.randn(1, D)
    layer = FakeLayer(E, {})
    run(layer, hidden, ids[:, 1:], weights[:, 1:])
    ran: list[torch.Tensor] = []
    ran_before: list[int] = []

    class Awaited(FakeHandle):
        """A read that takes its time from when it is waited for."""

        @property
        def ready(self) -> bool:
            return bool(ran_before)

        def wait(self, timeout: float | None = None) -> tuple[int, ...]:
            ran_before.append(len(ran))
            time.sleep(0.05)
            return super().wait(timeout)

    def counted(x: torch.Tensor, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
        ran.append(x)
        return compute(x, w)

    layer.handle = Awaited
    run_step(layer, counted, hidden, ids, weights, pipeline=layer.pipeline)
    assert ran_before == [before]
    assert len(ran) == E
    assert layer.stats.stall_s >= 0.05


@pytest.mark.parametrize("capacity", [2, 4, E])
def test_failed_read_raises_and_the_step_can_be_run_again(capacity: int) -> None:
    hidden, ids, weights = routing(10, 3, seed=3, sentinels=False)
    want = run(FakeLayer(E, {}), hidden, ids, weights)
    layer = FakeLayer(capacity, dict.fromkeys(range(E), 0.002), failing=frozenset({3}))
    for _ in range(2):
        with pytest.raises(TransferError, match="no luck"):
            run(layer, hidden, ids, weights)
        layer.residency.check_integrity()
        assert ExpertId(0, 3) not in layer.residency
    layer.failing.clear()
    assert torch.equal(run(layer, hidden, ids, weights), want)


def test_interrupted_step_leaves_nothing_that_recovery_cannot_put_in_order() -> None:
    hidden, ids, weights = routing(10, 3, seed=3, sentinels=False)
    layer = FakeLayer(3, dict.fromkeys(range(E), 0.002))

    def interrupted(x: torch.Tensor, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_step(layer, interrupted, hidden, ids, weights, pipeline=layer.pipeline)
    layer.recover(keep=True)
    layer.pipeline.recover()
    layer.residency.check_integrity()
    assert torch.equal(run(layer, hidden, ids, weights), run(FakeLayer(E, {}), hidden, ids, weights))


def test_counts_of_a_step() -> None:
    layer = FakeLayer(E, {})
    ids = torch.tensor([[0, 2, E], [2, 4, -1]])
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    run(layer, torch.randn(2, D), ids, weights)
    assert (layer.stats.hits, layer.stats.misses) == (1, 2)  # the identity expert hits; 4 has weight 0
    assert layer.fetched == [0, 2]
    assert layer.stats.bytes_read == 2 * 4096
    assert layer.stats.resident_bytes == 2 * D * D * 4
    run(layer, torch.randn(2, D), ids, weights)
    assert (layer.stats.hits, layer.stats.misses) == (4, 2)


def test_half_precision_is_summed_in_single() -> None:
    hidden, ids, weights = routing(6, 3, seed=1, sentinels=False)
    layer = FakeLayer(E, {})
    low = run_step(
        layer,
        lambda x, w: compute(x.float(), w).bfloat16(),
        hidden.bfloat16(),
        ids,
        weights.bfloat16(),
        pipeline=layer.pipeline,
    )
    assert low.dtype == torch.bfloat16
    exact = torch.zeros(6, D, dtype=torch.float64)
    for token in range(6):
        for k in range(3):
            y = compute(hidden[token].bfloat16().float(), {"w": WEIGHTS[ids[token, k]]}).bfloat16()
            exact[token] += weights[token, k].bfloat16().double() * y.double()
    # One rounding to bf16 at the end (2**-9 relative), nothing lost before it.
    torch.testing.assert_close(low.double(), exact, rtol=2**-8, atol=2**-12)


@given(tokens=st.integers(0, 6), top_k=st.integers(1, 4), seed=st.integers(0, 1000))
def test_groups_hold_every_pick_that_counts(tokens: int, top_k: int, seed: int) -> None:
    _, ids, weights = routing(tokens, top_k, seed)
    groups = group_by_expert(ids, weights, E)
    assert [group.expert for group in groups] == sorted({group.expert for group in groups})
    got = sorted(
        (group.expert, int(token), float(weight))
        for group in groups
        for token, weight in zip(
            [0] if group.tokens is None else group.tokens.tolist(), group.weights.tolist(), strict=True
        )
    )
    want = sorted(
        (int(ids[t, k]), t, float(weights[t, k]))
        for t in range(tokens)
        for k in range(top_k)
        if 0 <= ids[t, k] < E and weights[t, k] != 0
    )
    assert got == want
