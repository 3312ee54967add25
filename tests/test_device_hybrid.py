"""Single tokens that the device runs by itself but for what it leaves to the CPU, under Triton's interpreter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import triton_support
from planned_support import (
    LAYERS,
    ON_DEVICE,
    TOP_K,
    Clock,
    check_rows,
    generate,
    make,
    patched,
    third_step_finds_no_memory,
    tier_of,
)

import moert
from moert.device.base import PinningRefusedError
from moert.device.simulated import Machine, SimulatedDevice
from moert.errors import ConfigError, KernelUnavailableError
from moert.hf import patching
from moert.kernels import post as post_module
from moert.runtime.device_sharing import Sharing, fetch_table
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import HYBRID, PLANNED, Ways
from moert.schedule import Costs, Curve

pytestmark = pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""For sums of fp32 in another order."""

TABLES: dict[str, Sequence[int]] = {"none": [0, 0, 0], "one of two": [0, 0, 1], "one": [0, 1, 1], "odd": [0, 1, 0]}


@pytest.fixture(scope="module")
def wanted() -> tuple[torch.Tensor, torch.Tensor]:
    """What the same kernels give where the host decides about every layer's step."""
    model, _ = patched(planned=False)
    found = generate(model, n=6)
    moert.close(model)
    return found


@pytest.fixture
def hybrid() -> Iterator[Callable[..., tuple[Any, DeviceTier]]]:
    models = []

    def make_one(table: Sequence[int] | None = (0, 0, 1), **options: Any) -> tuple[Any, DeviceTier]:
        model, tier = patched(**{"planned": HYBRID, **options})
        models.append(model)
        if tier.planned.sharing is not None:
            # Under the interpreter the default would take an hour.
            sharing_of(tier).most_polls = 1 << 18
        if table is not None:
            sharing_of(tier).forced = lambda top_k: table
        return model, tier

    yield make_one
    for model in models:
        moert.close(model)


def sharing_of(tier: DeviceTier) -> Sharing:
    assert tier.planned.sharing is not None
    return tier.planned.sharing


def close(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], **TOLERANCE)


@pytest.mark.parametrize(
    ("table", "policy", "share"),
    [
        ("one of two", "lru", "25%"),
        ("none", "ema", "50%"),
        *(
            pytest.param(table, policy, share, marks=pytest.mark.slow)
            for table, policy, share in (("one of two", "ema", "25%"), ("one", "ema", "25%"), ("odd", "lru", "25%"))
        ),
    ],
)
def test_tokens_are_those_that_the_host_decides_about(
    wanted: Any, hybrid: Callable[..., Any], table: str, policy: str, share: str
) -> None:
    model, tier = hybrid(TABLES[table], policy=policy, device_memory=share)
    sharing, steps = sharing_of(tier), []
    post = sharing.post

    def spy(layer: int, plan: Any, *given: Any) -> None:
        steps.append((int(plan.count), int(plan.on_cpu_count)))
        post(layer, plan, *given)

    sharing.post = spy  # type: ignore[method-assign]
    close(generate(model), wanted)
    assert tier.counts.ways == {"exact": LAYERS, HYBRID: 5 * LAYERS} and len(steps) == 5 * LAYERS
    assert all(come == TABLES[table][come + left] for come, left in steps)
    stats, counts = moert.stats(model), tier.counts
    assert counts.on_cpu == sum(left for _, left in steps) > 0
    assert stats.hits + stats.misses == counts.on_device + counts.on_cpu
    assert stats.misses == counts.fetched + counts.on_cpu
    close(generate(model), wanted)
    tier.settle()
    check_rows(tier)


def test_graphs_have_it_and_give_the_same_bits_each_time(hybrid: Callable[..., Any]) -> None:
    host, _ = hybrid(None, planned=False)
    wanted = generate(host, n=7, cache_implementation="static")
    found = []
    for _ in range(2):
        model, tier = hybrid([0, 0, 1], device_memory="25%")
        found.append(generate(model, n=7, cache_implementation="static"))
        close(found[-1], wanted)
        assert tier.counts.ways == {"exact": LAYERS, HYBRID: 6 * LAYERS}
        assert vars(model)["forward"].replayed == 4
        before = sharing_of(tier).mailbox.messages
        close(generate(model, n=7, cache_implementation="static"), wanted)
        assert vars(model)["forward"].replayed == 4 + 6 and sharing_of(tier).mailbox.messages > before
        tier.settle()
        check_rows(tier)
    assert torch.equal(found[0][1], found[1][1])


def test_where_all_is_fetched_it_is_what_the_device_does_alone(hybrid: Callable[..., Any]) -> None:
    alone, _ = hybrid(None, planned=True)
    model, tier = hybrid([0, 1, 2])
    found, right = generate(model, n=6), generate(alone, n=6)
    assert torch.equal(found[1], right[1])
    moert.stats(model)
    assert tier.counts.on_cpu == 0 and tier.counts.fetched and sharing_of(tier).mailbox.messages == 0


def test_in_real_time(wanted: Any) -> None:
    """Streams are threads, so the device waits on one of them while this one goes on."""
    model = make()
    device = SimulatedDevice(Machine())
    options = {"triton": True, "planned": HYBRID, "headroom_bytes": 0, "costs": ON_DEVICE, "promoting": False}
    config = moert.OffloadConfig(device_memory="50%", dense_kernels=False)
    patching.patch(model, config, device=device, guarded=False, **options)
    tier = tier_of(model)
    sharing_of(tier).forced = lambda top_k: [0, 0, 0]
    close(generate(model, n=6), wanted)
    moert.stats(model)
    assert tier.counts.on_cpu
    moert.close(model)


@pytest.mark.filterwarnings("ignore:experts on a GPU")
def test_the_self_check_tries_it(hybrid: Callable[..., Any]) -> None:
    model, tier = hybrid([0, 0, 0], check=True)
    assert tier.planned.why_not_shared is None
    moert.stats(model)
    assert tier.counts.on_cpu == 0, "steps of the check are not counted"


@pytest.mark.filterwarnings("ignore:experts on a GPU")
@pytest.mark.parametrize("forced", [True, False])
def test_the_self_check_finds_a_wrong_share(
    forced: bool, hybrid: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = post_module.post
    posted = []

    def wrong(letters: Any, layer: int, hidden: Any, ids: Any, weights: Any, *rest: Any) -> None:
        posted.append(layer)
        own(letters, layer, hidden, ids, weights * 1.05, *rest)

    monkeypatch.setattr(post_module, "post", wrong)
    with pytest.raises(
        KernelUnavailableError, match=r"does not compute what the CPU does.* 1 tokens of torch\.float32"
    ):
        hybrid(None, check=True, planned=HYBRID if forced else None, guarded=not forced)
    assert posted


def test_the_cpu_does_not_answer(hybrid: Callable[..., Any]) -> None:
    model, tier = hybrid([0, 0, 0])
    generate(model, n=3)
    sharing = sharing_of(tier)
    sharing.most_polls = 30
    sharing.mailbox.arm = lambda: None  # type: ignore[method-assign]
    sharing.mailbox.pause()
    token = torch.tensor([[7]])
    with torch.inference_mode():
        number = 7
        while not model(torch.tensor([[number]])).logits.isnan().any():
            number += 1
        with pytest.raises(KernelUnavailableError, match=r"did not give its share .*looked in vain.*are NaN"):
            model(token)
        # From here on without it.
        assert tier.planned.why_not_shared is not None
        before = dict(tier.counts.ways)
        assert torch.isfinite(model(token).logits).all()
    assert tier.counts.ways[PLANNED] == before.get(PLANNED, 0) + LAYERS
    assert tier.counts.ways[HYBRID] == before[HYBRID]
    moert.stats(model)


def test_what_it_is_told_late_is_said_by_the_statistics(hybrid: Callable[..., Any]) -> None:
    model, tier = hybrid([0, 0, 0])
    generate(model, n=3)
    sharing_of(tier).letters.failed.fill_(1)
    with pytest.raises(KernelUnavailableError, match="did not give its share"):
        moert.stats(model)
    moert.stats(model)


def test_host_memory_that_moves_is_computed_from_where_it_is(wanted: Any, hybrid: Callable[..., Any]) -> None:
    model, tier = hybrid([0, 0, 0])
    close(generate(model, n=6), wanted)
    sharing = sharing_of(tier)
    layers = []
    own = sharing.mailbox.set_layer

    def spy(layer: int, *rest: Any) -> None:
        layers.append(layer)
        own(layer, *rest)

    sharing.mailbox.set_layer = spy  # type: ignore[method-assign]
    close(generate(model, n=6), wanted)
    assert layers == []
    tier.before_host_changes()
    tier.after_host_changes()
    close(generate(model, n=6), wanted)
    assert layers == [*range(LAYERS)]


def test_a_device_without_memory_leaves_it_to_the_host(
    wanted: Any, hybrid: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier = hybrid([0, 0, 0])
    # What was posted for that step is never asked for.
    calls = third_step_finds_no_memory(tier, monkeypatch)
    with pytest.warns(RuntimeWarning, match="the device cannot run single tokens by itself while that is so"):
        close(generate(model, n=6), wanted)
    assert len(calls) > 3 and tier.counts.ways[HYBRID] > LAYERS
    tier.settle()
    check_rows(tier)


def test_a_closed_model_has_no_thread_left(hybrid: Callable[..., Any]) -> None:
    model, tier = hybrid([0, 0, 0])
    generate(model, n=3)
    mailbox = sharing_of(tier).mailbox
    mailbox.arm()
    moert.close(model)
    with pytest.raises(RuntimeError, match="has been stopped"):
        mailbox.arm()


def costs(cpu_s: float, move_s: float, device_s: float = 1e-5) -> Costs:
    return Costs(Curve.constant(cpu_s), Curve.constant(device_s), move_s=move_s)


def test_the_table_is_what_the_exact_scheduler_says() -> None:
    assert fetch_table(4, costs(cpu_s=1.0, move_s=1e-6)) == [0, 1, 2, 3, 4]
    assert fetch_table(4, costs(cpu_s=1e-6, move_s=1.0)) == [0, 0, 0, 0, 0]
    # The CPU computes two in the time that one takes to come.
    assert fetch_table(8, costs(cpu_s=1e-3, move_s=2.1e-3)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_table_follows_what_is_known_of_costs(hybrid: Callable[..., Any]) -> None:
    _, tier = hybrid(None)
    sharing = sharing_of(tier)
    table = sharing.split(0).fetch_of
    tier.hosted.costs = None
    sharing.begin(True)
    tier.device.synchronize()
    assert table.tolist() == [*range(TOP_K + 1)]
    tier.hosted.costs = costs(cpu_s=1e-6, move_s=1.0)
    sharing.begin(True)
    tier.device.synchronize()
    assert table.tolist() == [0] * (TOP_K + 1)
    sharing.begin(False)
    tier.device.synchronize()
    assert table.tolist() == [*range(TOP_K + 1)]
    sharing.leave()


def test_measured_costs_decide(wanted: Any, hybrid: Callable[..., Any]) -> None:
    """The link is slow and the prompt's step has measured it."""
    machine = Machine(up_bytes_per_s=1e5)
    model, tier = hybrid(None, costs=None, machine=machine, promoting=False)
    found = generate(model, n=6)
    assert torch.equal(found[0], wanted[0])
    moert.stats(model)
    assert tier.counts.on_cpu > 0 and sharing_of(tier).split(0).fetch_of.tolist()[1] == 0


@pytest.mark.parametrize("fastest", [PLANNED, HYBRID, "exact"])
def test_it_is_used_where_it_is_seen_to_be_faster(fastest: str) -> None:
    clock = Clock()
    ways = Ways("exact", clock)
    used = []
    for _ in range(900):
        ways.begin(1)
        used.append(ways.way)
        clock.now += 0.005 if ways.way == fastest else 0.01
    assert {PLANNED, HYBRID} <= set(used)
    assert used[-100:].count(fastest) > 90
    ways.do_not_share()
    assert ways.way != HYBRID
    for _ in range(400):
        ways.begin(1)
        clock.now += 0.01
        assert ways.way != HYBRID
    assert PLANNED in used


def test_who_asks_for_a_share_that_cannot_be_had_gets_none() -> None:
    ways = Ways("exact", Clock(), (), HYBRID)
    ways.begin(1)
    assert ways.way == HYBRID
    ways.do_not_share()
    assert ways.way == PLANNED
    ways.begin(1)
    assert ways.way == PLANNED
    ways.do_not_plan(ever=True)
    ways.begin(1)
    assert ways.way == "exact"
    with pytest.raises(ConfigError, match="planned='planed' is no way"):
        Ways("exact", Clock(), (), "planed")


def test_where_no_memory_can_be_locked_for_it_all_is_fetched(
    wanted: Any, hybrid: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Any, nbytes: int) -> torch.Tensor:
        raise PinningRefusedError("no more of it")

    monkeypatch.setattr(SimulatedDevice, "allocate_pinned", refuses)
    model, tier = hybrid(None)
    assert tier.planned.why_not_shared == "no more of it" and tier.planned.why_not is None
    close(generate(model, n=6), wanted)
    assert tier.counts.ways == {"exact": LAYERS, PLANNED: 5 * LAYERS}


def test_it_waits_for_messages_without_being_told_again(hybrid: Callable[..., Any], wanted: Any) -> None:
    """The host has armed it for a pass that the device begins much later."""
    model, tier = hybrid([0, 0, 0])
    generate(model, n=3)
    sharing = sharing_of(tier)
    sharing.mailbox.arm = lambda: None  # type: ignore[method-assign]
    time.sleep(1.2)
    with torch.inference_mode():
        assert torch.isfinite(model(torch.tensor([[7]])).logits).all()
    moert.stats(model)
