"""Promotions over the idle link of a device tier in virtual time."""

from __future__ import annotations

import pytest
from device_support import NumberTier
from simulate_support import trace_of

from moert.device.simulated import Machine
from moert.schedule import Costs, Curve, Promotion
from moert.simulate.timed import simulate_time
from moert.types import ExpertId

E = 6
"""Experts of a `NumberTier`'s layer."""


def test_what_a_failed_step_has_used_is_promoted_no_more() -> None:
    """It had come up for later, the step took its row, and an expert after it could not be read."""
    tier = NumberTier()
    promoting = tier.tier.hosted.promoting
    assert promoting is not None
    promoting._promotion._arrived.append(ExpertId(1, 2))
    assert tier.step(0, [[0, 1]]) == tier.right(0, [[0, 1]])
    assert not promoting.promoted
    tier.check()


def test_what_the_cpu_keeps_computing_is_promoted_over_the_idle_link() -> None:
    cheap_cpu = Costs(Curve.constant(1e-6), Curve.constant(1e-3), move_s=1.0)
    tier = NumberTier(costs=cheap_cpu, schedule="exact", device_slots=2, host_slots=E)
    still = NumberTier(costs=cheap_cpu, schedule="exact", device_slots=2, host_slots=E, promoting=False)
    for one in (tier, still):
        for _ in range(30):
            assert one.step(0, [[2, 5]]) == one.right(0, [[2, 5]])
            one.device.sleep(1e-2)
    assert set(tier.caches[0].residency.residents) == {ExpertId(0, 2), ExpertId(0, 5)}
    assert len(still.caches[0].residency) == 0
    # In three parts each, so that a demand never waits for more than one of them.
    assert sum(tier.tier.transfers.counts.copies.values()) == 6


def test_promotions_go_by_what_the_policy_says_an_expert_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_cpu = Costs(Curve.constant(1e-6), Curve.constant(1e-3), move_s=1.0)
    tier = NumberTier(costs=cheap_cpu, schedule="exact", device_slots=1, host_slots=E)
    wanted = ExpertId(0, 2)
    monkeypatch.setattr(tier.caches[0].residency.policy, "worth", lambda expert: 0.5 * (expert == wanted))
    for _ in range(30):
        for expert in (5, 5, 5, 2):
            tier.step(0, [[expert]])
            tier.device.sleep(1e-2)
    assert set(tier.caches[0].residency.residents) == {wanted}, "5 is needed three times as often"


@pytest.mark.parametrize("parts", [1, 3])
def test_what_has_been_promoted_is_held_in_host_memory_no_longer(parts: int) -> None:
    tier = NumberTier(promoting=False, host_slots=3, device_slots=1)
    tier.step(0, [[0, 1]])
    host = tier.caches[0].host
    expert = next(
        ExpertId(0, e) for e in (0, 1) if ExpertId(0, e) not in tier.caches[0].residency and host.has(ExpertId(0, e))
    )
    for _ in range(parts):
        assert tier.tier.transfers.promote(expert, parts) is not None
        assert host.held() == {expert}
        tier.device.sleep(1.0)
        tier.tier.transfers.collect()
    assert host.held() == frozenset()
    tier.tier.transfers.discard(expert)
    assert host.held() == frozenset()
    tier.check()


@pytest.mark.xdist_group("compiled")
def test_a_step_takes_over_what_is_being_promoted_as_in_simulated_time() -> None:
    """Of three parts one is there when the second step begins: it waits for the others, and the third one hits."""
    cheap_cpu = Costs(Curve.constant(1e-6), Curve.constant(1e-6), move_s=3.0)
    tier = NumberTier(costs=cheap_cpu, layers=1, host_slots=E, machine=Machine(latency_s=1.0))
    stats, counts = tier.caches[0].stats, tier.tier.counts
    hits = []
    for _ in range(3):
        tier.device.sleep(1.5)
        before = stats.hits
        tier.step(0, [[2]])
        hits.append(stats.hits - before)
    trace = trace_of([E], [[[2]]] * 3, top_k=1)
    found = simulate_time(trace, "ema", 2, cheap_cpu, layer_s=1.5, promotion=Promotion())
    assert tuple(hits) == found.event_hits == (0, 0, 1)
    assert stats.forwarded == found.forwarded == 1
    assert (counts.on_cpu, counts.fetched) == (found.on_cpu, found.fetched) == (1, 0)
    assert sum(tier.tier.transfers.counts.copies.values()) == 3
    assert found.link_s == 3.0
