"""What of a device's memory experts may have: everything else that a run needs there is taken off first."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from device_support import NumberTier
from planned_support import make, settings

import moert
from moert.config import parse_budget
from moert.device.base import DeviceMemory
from moert.errors import CapacityError
from moert.hf import device_tiered, patching
from moert.plan import LayerNeed
from moert.runtime import device_building
from moert.runtime.device_budget import GRAPH_BYTES, Besides, device_slots
from moert.runtime.device_transfers import EXPERTS_IN_FLIGHT

MIB = 1 << 20
NEEDS = [LayerNeed(f"layer {layer}", 64, MIB, MIB, 4) for layer in range(2)]
NOTHING = Besides(headroom_bytes=0)
SAID = {"cache_bytes": "KV cache", "staging_bytes": "rows to come up in"}


@pytest.mark.parametrize("part", [field.name for field in fields(Besides)])
def test_each_part_is_taken_off_and_named(part: str) -> None:
    memory, some = DeviceMemory(100 * MIB, 200 * MIB), Besides(**{"headroom_bytes": 0, part: 30 * MIB})
    assert sum(device_slots(NEEDS, None, memory, NOTHING)) == 90
    assert sum(device_slots(NEEDS, None, memory, some)) == 63
    assert sum(device_slots(NEEDS, parse_budget("70MiB", ""), memory, some)) == 70
    named = rf"30\.0 MiB {SAID.get(part, part.removesuffix('_bytes').replace('dense', 'dense weights'))}\b"
    with pytest.raises(CapacityError, match=rf"70\.0 MiB free, .*\({named}\).*at most 40\.0 MiB"):
        device_slots(NEEDS, parse_budget("41MiB", ""), DeviceMemory(70 * MIB, 200 * MIB), some)
    with pytest.raises(CapacityError, match=rf"has 37\.0 MiB of .*, and 38\.0 MiB are needed \({named}"):
        device_slots(NEEDS, None, DeviceMemory(37 * MIB, 200 * MIB), some)


def besides_of(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Besides:
    """What a model is told to leave."""
    found: list[Besides] = []
    monkeypatch.setattr(device_building, "device_slots", lambda *given: found.append(given[-1]) or device_slots(*given))
    config, device, rest = settings(**{"planned": None, **options})
    model = make()
    patching.patch(model, config, device=device, **rest)
    moert.close(model)
    return found[0]


def test_what_a_model_has_beside_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    away = torch.empty(3 * MIB, device="meta", dtype=torch.uint8)
    monkeypatch.setattr(device_tiered, "dense_tensors", lambda model: {"lm_head.weight": away})
    monkeypatch.setattr(device_tiered, "move", lambda *_: None)
    monkeypatch.setattr(device_tiered, "note_homes", lambda *_: None)
    monkeypatch.setattr(device_tiered, "move_back", lambda *_: None)
    found = besides_of(monkeypatch, context=48)
    assert found.dense_bytes == away.nbytes
    # Keys and values in fp32, two layers of 32 numbers.
    assert found.cache_bytes == 48 * 2 * 2 * 32 * 4
    assert found.staging_bytes == (2 + device_building.SPARE_ROWS) * 3 * 16 * 32 * 4
    assert found.workspace_bytes == 2048 * 2 * (2 * 32 + 16) * 4
    assert found.graph_bytes == GRAPH_BYTES


@pytest.mark.parametrize("options", [{"planned": False}, {"triton": False}])
def test_what_can_be_no_graph_leaves_no_memory_for_one(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert besides_of(monkeypatch, **options).graph_bytes == 0


@pytest.mark.parametrize("max_bytes", [8, 16])
def test_bytes_on_their_way_are_bounded(max_bytes: int) -> None:
    tier = NumberTier(
        num_experts=12, host_slots=12, spare_rows=12, schedule="fetch_all", promoting=False, max_bytes=max_bytes
    )
    tier.device.change(latency_s=1e-2)
    transfers = tier.tier.transfers
    size = tier.caches[0].expert_bytes
    most: list[int] = []
    start = transfers._start_part

    def spy(coming: Any) -> None:
        start(coming)
        most.append(transfers.bytes_in_flight)

    transfers._start_part = spy  # type: ignore[method-assign]
    event = [[expert, expert + 1] for expert in range(0, 12, 2)]
    assert tier.step(0, event) == tier.right(0, event)
    assert max(most) == max_bytes < 12 * size
    tier.step(1, event)
    tier.tier.transfers.drain()
    for expert in [*tier.caches[1].residency.residents]:
        tier.caches[1].drop([expert])
    most.clear()
    # Of what nobody waits for, half as much.
    tier.tier.prefetch(expert for expert in tier.hosts[1].residency.residents)
    assert max(most) == max_bytes // 2


def test_unless_said_otherwise_some_experts_are_on_their_way_however_large_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moert.runtime.device_transfers.MAX_BYTES_IN_FLIGHT", 1)
    tier = NumberTier()
    assert tier.tier.transfers._max_bytes == EXPERTS_IN_FLIGHT * tier.caches[0].expert_bytes
