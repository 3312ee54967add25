"""Prompts over a device in virtual time: copies beside kernels, layer after layer, and each expert copied once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_disk import READ_BYTES
from prefill_support import Prompts
from test_device_model import COSTS, LINK, make

import moert
from moert.config import OffloadConfig
from moert.device.simulated import SimulatedDevice
from moert.hf import patching
from moert.hf.model import runtime_of
from moert.runtime import device_transfers
from moert.runtime.device_ahead import PICKS_OF_EACH
from moert.schedule import Costs, Curve
from moert.tiers.read import Priority
from moert.types import ExpertId

# 24 of a layer's 32 experts have to come, each in a millisecond; 256 picks are 8 for each.
BALANCE = 24e-3 / 256

SETTINGS: dict[str, dict[str, Any]] = {
    "copies take longer": {"pick_s": 0.2 * BALANCE},
    "copies take longer, dense layers in between": {"pick_s": 0.2 * BALANCE, "dense_s": 4e-3},
    "both take as long": {"pick_s": BALANCE},
    "both take as long, dense layers in between": {"pick_s": 0.8 * BALANCE, "dense_s": 4.8e-3},
    "both take as long, launches are slow": {"pick_s": 0.8 * BALANCE, "launch_s": 3.6e-4},
    "kernels take longer": {"pick_s": 3 * BALANCE},
}

MOST = 1.1
"""Times what it would take if copies and kernels were beside each other from the first moment to the last."""


def ahead(prompts: Prompts) -> int:
    """Copies that nobody waited for when they began."""
    return prompts.tier.transfers.counts.copies[Priority.PREFETCH]


@pytest.mark.parametrize("skew", [0.0, 0.25])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_prompt_takes_as_long_as_its_copies_or_its_kernels(setting: str, skew: float) -> None:
    prompts = Prompts(**SETTINGS[setting])
    passed = prompts.run(prompts.prompt(64, skew))
    assert passed.ratio <= MOST
    assert passed.copies <= 1.02 * passed.least


def test_no_copy_overtakes_one_that_is_computed_before_it() -> None:
    """With more rows than copies ahead that have arrived some are free for what is copied after them."""
    prompts = Prompts(spare_rows=14, **SETTINGS["both take as long"])
    assert prompts.run(prompts.prompt(64)).ratio <= 1.06


@pytest.mark.parametrize("setting", ["copies take longer", "kernels take longer"])
def test_two_rows_are_enough_to_have_both_at_work(setting: str) -> None:
    prompts = Prompts(spare_rows=2, **SETTINGS[setting])
    passed = prompts.run(prompts.prompt(64))
    assert passed.ratio <= 1.02
    assert passed.copies == passed.least


def test_it_is_slower_if_nothing_is_copied_ahead() -> None:
    setting = SETTINGS["both take as long, dense layers in between"]
    prompts, without = Prompts(**setting), Prompts(**setting)
    without.tier.hosted.ahead = None
    passed = prompts.run(prompts.prompt(64))
    assert without.run(without.prompt(64)).wall_s > 1.15 * passed.wall_s
    assert ahead(prompts) == (prompts.layers - 1) * 7
    assert ahead(without) == 0


def test_launches_are_of_a_quarter_of_the_rows_and_of_residents_in_between() -> None:
    prompts = Prompts(spare_rows=8)
    residents = {expert.expert for expert in prompts.caches[1].residency.residents}
    for kernels in prompts.kernels:
        kernels.launches.clear()
    prompts.run(prompts.prompt(64))
    launches = [(len(set(one) - residents), len(set(one) & residents)) for one in prompts.kernels[1].launches]
    assert [missing for missing, _ in launches] == [2] * 12
    assert sum(hits for _, hits in launches) == 8
    assert max(hits for _, hits in launches) == 1


def test_whole_layers_from_three_picks_for_each_expert_on() -> None:
    assert PICKS_OF_EACH == 3


@pytest.mark.parametrize("more", [0, -1])
def test_the_next_layer_is_copied_ahead_from_three_picks_for_each_expert_on(more: int) -> None:
    prompts = Prompts(num_experts=64, top_k=4, device_slots=8)
    tokens = PICKS_OF_EACH * 64 // 4 + more
    passed = prompts.run(prompts.prompt(tokens))
    assert ahead(prompts) == (0 if more else 5 * 7)
    assert passed.copies <= 1.02 * passed.least


def test_not_where_picks_fall_on_a_part_of_the_experts() -> None:
    prompts = Prompts()
    passed = prompts.run([[[expert, expert + 1, expert + 2, expert + 3] for expert in range(25)] * 4] * 6)
    assert ahead(prompts) == 0
    assert passed.copies == passed.least == 6 * 20


def test_what_the_scheduler_would_leave_to_the_cpu_is_not_copied_ahead() -> None:
    on_cpu = Prompts(schedule="cpu_all")
    on_cpu.run(on_cpu.prompt(64))
    assert ahead(on_cpu) == 0
    shared = Prompts(schedule="exact", costs=Costs(Curve.proportional(5e-4), Curve.constant(1e-4), move_s=1e-3))
    shared.run(shared.prompt(64))
    assert shared.tier.counts.on_cpu
    assert ahead(shared)


def test_the_most_wanted_come_first() -> None:
    prompts = Prompts(promoting=True)
    for _ in range(3):
        prompts.step(1, [[29, 30, 31]])
    prompts.settle()
    prompts.step(0, prompts.prompt(64)[0])
    coming = [coming.expert for coming in prompts.tier.transfers.all_coming()]
    residents = prompts.caches[1].residency.residents
    assert {ExpertId(1, expert) for expert in (29, 30, 31)} <= {*coming, *residents}


def test_whoever_comes_first_takes_the_place_of_the_weakest() -> None:
    """Also while other residents wait for their launch, and must stay until then."""
    prompts = Prompts(promoting=True, layers=1)
    cache = prompts.caches[0]
    cache.drop(cache.residency.residents)
    weak, strong, others = 31, 0, list(range(24, 31))
    prompts.step(0, [[*others, weak]])
    for _ in range(20):
        prompts.step(0, [[*others, strong]])
    cache.drop([ExpertId(0, strong)])
    prompts.step(0, [[weak]])
    assert cache.residency.residents == tuple(ExpertId(0, expert) for expert in [*others, weak])
    prompts.run(prompts.prompt(64))
    assert cache.residency.residents == tuple(ExpertId(0, expert) for expert in [strong, *others])


def test_a_step_that_needs_nothing_of_what_was_copied_ahead() -> None:
    prompts = Prompts()
    prompts.step(0, prompts.prompt(64)[0])
    guesses = [coming.expert.expert for coming in prompts.tier.transfers.all_coming()]
    assert len(guesses) == 7
    others = [[expert] for expert in range(32) if expert not in guesses]
    assert prompts.step(1, others) == prompts.right(1, others)
    assert not prompts.tier.transfers.all_coming()
    prompts.check()


def test_demands_under_way_leave_room_for_what_is_copied_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large experts are."""
    monkeypatch.setattr(device_transfers, "MAX_BYTES_IN_FLIGHT", 1)
    prompts = Prompts()
    prompts.run(prompts.prompt(64))
    assert ahead(prompts) >= 5 * 2


@pytest.mark.parametrize("most", [32, 16, 5])
def test_a_halved_prompt_copies_each_expert_once_where_rows_suffice(most: int) -> None:
    prompts = Prompts(spare_rows=24)
    prompts.tier.hosted.parts.most_tokens = most
    passed = prompts.run(prompts.prompt(64))
    assert passed.copies == passed.least
    assert ahead(prompts) == 5 * 24  # as of all its tokens at once


@pytest.mark.parametrize("spare_rows", [7, 16])
def test_a_halved_prompt_begins_with_what_its_last_part_left(spare_rows: int) -> None:
    prompts = Prompts(spare_rows=spare_rows)
    prompts.tier.hosted.parts.most_tokens = 32
    passed = prompts.run(prompts.prompt(64))
    assert passed.copies <= 2 * passed.least - prompts.layers * spare_rows


def test_what_an_earlier_part_has_computed_keeps_its_row_until_it_is_computed_again() -> None:
    """Where a part is one launch, that comes after all its copies have been started."""
    prompts = Prompts(spare_rows=4, layers=1)
    prompts.kernels[0].is_whole = True
    prompts.tier.hosted.parts.most_tokens = 1
    passed = prompts.run([[[8, 9, 10, 11], [8, 12, 13, 14], [10, 11, 13, 14]]])
    assert passed.copies == 7 + 2


def test_a_step_is_one_launch_if_nothing_but_guesses_is_in_the_way() -> None:
    """It may have other bits than one in parts."""
    prompts = Prompts(spare_rows=4, layers=2)
    kernels = prompts.kernels[0]
    kernels.is_whole = True
    for last, is_one in ((11, True), (12, False)):
        kernels.launches.clear()
        prompts.tier.prefetch([ExpertId(1, 20)])
        assert len(prompts.tier.transfers.all_coming()) == 1
        event = [[8, 9, 10, 11], [8, 9, 10, last]]
        assert prompts.step(0, event) == prompts.right(0, event)
        assert (len(kernels.launches) == 1) == is_one


def test_the_scheduler_of_a_halved_prompt_is_told_of_all_its_tokens() -> None:
    """Eight picks are worth a copy, and two are not."""
    costs = Costs(Curve.proportional(3e-4), Curve.constant(1e-6), move_s=1e-3)
    one, parts = (Prompts(schedule="fiddler", costs=costs, spare_rows=24, layers=2) for _ in range(2))
    parts.tier.hosted.parts.most_tokens = 16
    one.run(one.prompt(64))
    parts.run(parts.prompt(64))
    assert parts.tier.counts.fetched >= 0.8 * one.tier.counts.fetched > 0


def test_the_disk_reads_ahead_what_host_memory_has_room_for() -> None:
    reads = []
    for is_ahead in (True, False):
        prompts = Prompts(host_slots=20, spare_rows=16)
        if not is_ahead:
            prompts.tier.hosted.ahead = None
        prompts.settle()
        prompts.pipeline.drain()
        before = prompts.disk.n_submitted
        prompts.step(0, prompts.prompt(64)[0])
        host, residents = prompts.hosts[1].residency, prompts.caches[1].residency
        room = 20 - sum(expert not in residents for expert in host.residents)
        assert prompts.pipeline.bytes_ahead == (room * READ_BYTES if is_ahead else 0)
        assert 0 < room < 32 - 8 - (20 - room)
        prompts.run(prompts.prompt(64))
        reads.append(prompts.disk.n_submitted - before)
    assert reads[0] <= reads[1]


def test_logits_are_the_same_with_and_without_it_at_every_budget() -> None:
    prompt = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(2))
    model = moert.patch(make())
    with torch.no_grad():
        right = model(prompt).logits
    moert.close(model)
    for share in ("50%", "25%", "10%"):
        for is_ahead in (True, False):
            model = make()
            config = OffloadConfig(device_memory=share, debug=True)
            patching.patch(model, config, device=SimulatedDevice(LINK), costs=COSTS, headroom_bytes=0)
            tier = runtime_of(model).device
            assert tier is not None
            if not is_ahead:
                tier.hosted.ahead = None
            for _ in range(2):
                with torch.no_grad():
                    assert torch.equal(model(prompt).logits, right)
            assert bool(tier.transfers.counts.copies[Priority.PREFETCH]) == is_ahead
            moert.close(model)
