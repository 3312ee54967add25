"""The device tier in virtual time, under any order of steps, guesses, promotions, failures and changes of size."""

from __future__ import annotations

import warnings

import pytest
from device_support import NumberTier
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from moert.device.base import DeviceLostError
from moert.device.simulated import Machine
from moert.errors import MoertError, TransferError
from moert.schedule import Costs, Curve, scheduler_names
from moert.types import ExpertId

E, LAYERS = 6, 2
EXPERTS = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, E - 1))
SECONDS = st.sampled_from([0.0, 1e-3, 4e-3])


class TierMachine(RuleBasedStateMachine):
    """After anything that may happen, a step gives the right numbers or the disk's error, and the books agree."""

    tier: NumberTier

    @initialize(
        host_slots=st.integers(1, E),
        device_slots=st.integers(1, E),
        spare_rows=st.integers(1, 5),
        schedule=st.sampled_from(scheduler_names()),
        policy=st.sampled_from(["ema", "lru"]),
        latency_s=SECONDS,
        launch_s=SECONDS,
        lockable_bytes=st.sampled_from([None, 0]),
        max_bytes=st.sampled_from([None, 1, 12]),
        cpu_s=st.sampled_from([1e-4, 3e-3, 1.0]),
        poison=st.booleans(),
    )
    def start(
        self,
        host_slots: int,
        device_slots: int,
        spare_rows: int,
        schedule: str,
        policy: str,
        latency_s: float,
        launch_s: float,
        lockable_bytes: int | None,
        max_bytes: int | None,
        cpu_s: float,
        poison: bool,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.tier = NumberTier(
                layers=LAYERS,
                num_experts=E,
                host_slots=host_slots,
                device_slots=device_slots,
                spare_rows=spare_rows,
                schedule=schedule,
                policy=policy,
                machine=Machine(latency_s=latency_s, launch_s=launch_s, lockable_bytes=lockable_bytes),
                costs=Costs(Curve.proportional(cpu_s), Curve.constant(1e-3), move_s=2e-3, read_s=1e-2, merge_s=1e-3),
                max_bytes=max_bytes,
                poison=poison,
            )
        self.doubtful: set[ExpertId] = set()

    @rule(
        layer=st.integers(0, LAYERS - 1),
        event=st.lists(st.lists(st.integers(0, E - 1), min_size=2, max_size=2, unique=True), min_size=1, max_size=4),
    )
    def step(self, layer: int, event: list[list[int]]) -> None:
        needed = {ExpertId(layer, expert) for token in event for expert in token}
        try:
            found = self.tier.step(layer, event)
        except TransferError:
            # A read that began before the disk was mended may fail as well.
            assert needed & (self.tier.disk.failing | self.doubtful)
        else:
            assert found == self.tier.right(layer, event)

    @rule(layer=st.integers(0, LAYERS - 1), tokens=st.integers(E, 2 * E), most=st.integers(1, 2 * E))
    def prompt(self, layer: int, tokens: int, most: int) -> None:
        """Every expert is needed, of so many tokens also the next layer's, and perhaps of a few tokens at a time."""
        self.tier.tier.hosted.parts.most_tokens = most
        self.step(layer, [[token % E, (token + 1) % E] for token in range(tokens)])
        self.tier.tier.hosted.parts.most_tokens = None

    @rule(experts=st.lists(EXPERTS, max_size=4))
    def prefetch(self, experts: list[tuple[int, int]]) -> None:
        self.tier.tier.prefetch(ExpertId(*expert) for expert in experts)

    @rule(experts=st.lists(EXPERTS, max_size=4))
    def withdraw(self, experts: list[tuple[int, int]]) -> None:
        self.tier.tier.withdraw([ExpertId(*expert) for expert in experts])

    @rule(seconds=st.sampled_from([5e-4, 2e-3, 1e-2]))
    def time_passes(self, seconds: float) -> None:
        self.tier.device.sleep(seconds)

    @rule(data=st.data())
    def disk_finishes(self, data: st.DataObject) -> None:
        if self.tier.disk.reads:
            data.draw(st.sampled_from(self.tier.disk.reads)).finish()
            self.tier.pipeline.collect()

    @rule(expert=EXPERTS)
    def break_or_mend(self, expert: tuple[int, int]) -> None:
        self.tier.disk.failing ^= {ExpertId(*expert)}
        self.doubtful.add(ExpertId(*expert))

    @rule(layer=st.integers(0, LAYERS - 1), n=st.integers(1, E))
    def resize_host(self, layer: int, n: int) -> None:
        self.tier.tier.before_host_changes()
        self.tier.pipeline.drain()
        self.tier.hosts[layer].resize(n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.tier.tier.after_host_changes()

    @rule(layer=st.integers(0, LAYERS - 1), n=st.integers(1, E))
    def resize_device(self, layer: int, n: int) -> None:
        cache = self.tier.caches[layer]
        if n <= cache.residency.capacity:
            cache.resize(n)

    @rule(layer=st.integers(0, LAYERS - 1))
    def lose_residents(self, layer: int) -> None:
        cache = self.tier.caches[layer]
        cache.drop(cache.residency.residents[:1])

    @rule()
    def recover(self) -> None:
        """As after an interrupt between two steps."""
        self.tier.tier.recover()
        self.tier.pipeline.drain()
        for host in self.tier.hosts:
            host.recover(keep=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.tier.tier.after_host_changes()

    @rule()
    def others_take_the_memory_and_give_it_back(self) -> None:
        device = self.tier.device
        device.others_bytes = 0 if device.others_bytes else device.machine.total_bytes

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "tier"):
            self.tier.check()
            self.doubtful -= {expert for expert in self.doubtful if not self.tier.pipeline.is_in_flight(expert)}

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.settle()
            self.tier.check()
            self.tier.tier.close()
            assert not self.tier.device.locked_bytes
            with pytest.raises((MoertError, RuntimeError)):
                self.tier.step(0, [[0, 1]])


TierMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestTier = pytest.mark.filterwarnings("ignore::RuntimeWarning")(TierMachine.TestCase)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_for_longer() -> None:
    run_state_machine_as_test(TierMachine, settings=settings(max_examples=3000, stateful_step_count=40, deadline=None))


ALL_ON_DEVICE = Costs(Curve.constant(10.0), Curve.constant(1e-3), move_s=1e-3)
EVERYTHING = [[expert, (expert + 1) % E] for expert in range(E)]


def test_an_event_larger_than_the_cache_reuses_rows_behind_their_readers() -> None:
    """One row to come up in, and kernels slower than copies: each copy waits for the launch that reads its row."""
    for device_slots in (1, 2):
        tier = NumberTier(
            device_slots=device_slots,
            spare_rows=1,
            host_slots=E,
            schedule="fetch_all",
            costs=ALL_ON_DEVICE,
            machine=Machine(latency_s=1e-4, launch_s=5e-3),
            promoting=False,
            poison=False,
        )
        for _ in range(3):
            assert tier.step(0, EVERYTHING) == tier.right(0, EVERYTHING)
            tier.check()
        assert tier.tier.counts.on_cpu == 0
        tier.tier.close()


def test_hits_are_computed_while_misses_are_on_the_link() -> None:
    """In virtual time the whole step takes what its longest chain takes, not the sum."""
    tier = NumberTier(
        device_slots=3,
        spare_rows=3,
        schedule="fetch_all",
        costs=ALL_ON_DEVICE,
        machine=Machine(latency_s=1e-3, launch_s=1e-3),
        promoting=False,
    )
    tier.step(0, [[0, 1, 2]])
    begin = tier.device.now()
    assert tier.step(0, [[0, 1, 2]]) == tier.right(0, [[0, 1, 2]])
    only_hits = tier.device.now() - begin
    assert only_hits == pytest.approx(2e-3)  # all hits in one launch, and the sum
    begin = tier.device.now()
    assert tier.step(0, [[0, 1, 2, 3, 4]]) == tier.right(0, [[0, 1, 2, 3, 4]])
    # Two copies one after the other; the hits and the first of them are computed meanwhile.
    assert tier.device.now() - begin == pytest.approx(2e-3 + 2e-3)


def test_a_prefetch_that_is_needed_is_waited_for_and_not_copied_again() -> None:
    tier = NumberTier(schedule="fetch_all", costs=ALL_ON_DEVICE, machine=Machine(latency_s=1e-2), promoting=False)
    tier.step(0, [[0, 1]])
    counts = tier.tier.transfers.counts
    copies = sum(counts.copies.values())
    tier.tier.prefetch([ExpertId(0, 4)])
    while tier.tier.transfers.coming(ExpertId(0, 4)) is None:  # it is read from disk first
        tier.pipeline.wait()
        tier.tier.prefetch([])
    assert tier.tier.transfers.coming(ExpertId(0, 4)) is not None
    assert tier.step(0, [[4, 0]]) == tier.right(0, [[4, 0]])
    assert sum(counts.copies.values()) == copies + 1
    assert counts.forwarded >= 1
    assert tier.hosts[0].stats.forwarded == 1


def test_a_prefetch_that_has_not_started_is_cancelled() -> None:
    tier = NumberTier(promoting=False, max_bytes=1)
    tier.step(0, [[0, 1]])
    wanted = [ExpertId(0, expert) for expert in (2, 3, 4)]
    tier.tier.prefetch(wanted)
    tier.tier.withdraw(wanted)
    assert tier.tier.transfers.counts.cancelled == 3
    assert not tier.tier.transfers.busy
    assert not tier.pipeline.busy


def test_a_guess_that_was_wrong_leaves_with_the_step_it_was_for() -> None:
    tier = NumberTier(promoting=False, schedule="fetch_all", costs=ALL_ON_DEVICE)
    tier.step(0, [[2, 4]])
    tier.step(0, [[0, 1]])
    tier.tier.prefetch([ExpertId(0, 4)])
    assert tier.tier.transfers.coming(ExpertId(0, 4)) is not None
    tier.step(1, [[0, 1]])
    assert tier.tier.transfers.coming(ExpertId(0, 4)) is not None
    tier.step(0, [[0, 1]])
    assert tier.tier.transfers.coming(ExpertId(0, 4)) is None
    tier.check()


def test_a_demand_overtakes_what_nobody_waits_for() -> None:
    """On the link: a prefetch that has begun is finished, and the demand comes before those behind it."""
    tier = NumberTier(
        layers=2,
        num_experts=8,
        host_slots=8,
        device_slots=1,
        spare_rows=6,
        schedule="fetch_all",
        costs=ALL_ON_DEVICE,
        machine=Machine(latency_s=1.0),
        promoting=False,
    )
    for expert in range(8):
        tier.step(0, [[expert]])
        tier.step(1, [[expert]])
    tier.tier.prefetch(ExpertId(1, expert) for expert in (0, 1, 2))
    begin = tier.device.now()
    tier.step(0, [[0]])
    assert tier.device.now() - begin == pytest.approx(2.0)
    tier.device.synchronize()
    assert tier.device.now() - begin == pytest.approx(4.0)


def test_a_device_that_is_lost_says_so_and_closes() -> None:
    for virtual in (True, False):
        tier = NumberTier(virtual=virtual)
        tier.step(0, [[0, 1]])
        tier.device.lose("fell off the bus")
        for _ in range(2):
            with pytest.raises(DeviceLostError, match=r"lost in mid-run \(fell off the bus\); load the model again"):
                tier.step(0, [[0, 1]])
        tier.tier.close()
        assert not tier.device.locked_bytes


def test_pages_that_cannot_be_locked_are_copied_through_buffers_with_one_warning() -> None:
    with pytest.warns(RuntimeWarning, match="only 0 B of 4.0 KiB .*the others are copied to simulated") as found:
        tier = NumberTier(machine=Machine(lockable_bytes=0), schedule="fetch_all", costs=ALL_ON_DEVICE, layers=1)
    for _ in range(3):
        assert tier.step(0, EVERYTHING) == tier.right(0, EVERYTHING)
        tier.check()
    assert len(found) == 1
    assert not tier.device.locked_bytes


def test_an_expert_that_cannot_be_read_fails_its_step_alone() -> None:
    tier = NumberTier()
    tier.disk.failing = {ExpertId(0, 3)}
    with pytest.raises(TransferError, match="no luck with expert 3 of layer 0"):
        tier.step(0, [[1, 3], [2, 4]])
    tier.check()
    assert tier.step(0, [[1, 2]]) == tier.right(0, [[1, 2]])
    tier.disk.failing = set()
    assert tier.step(0, [[1, 3], [2, 4]]) == tier.right(0, [[1, 3], [2, 4]])
    tier.check()


def test_a_step_that_failed_keeps_no_row() -> None:
    tier = NumberTier(device_slots=1, spare_rows=1, schedule="fetch_all", costs=ALL_ON_DEVICE, promoting=False)
    for layer in (0, 1):
        for expert in (0, 1):
            tier.step(layer, [[expert]])
    tier.disk.failing = {ExpertId(0, 3)}
    (missing,) = {ExpertId(0, 0), ExpertId(0, 1)} - set(tier.caches[0].residency.residents)
    with pytest.raises(TransferError):
        tier.step(0, [[missing.expert, 3]])
    for expert in (0, 1):
        assert tier.step(1, [[expert]]) == tier.right(1, [[expert]])
    tier.check()


def test_costs_are_measured_where_nobody_gives_them() -> None:
    tier = NumberTier(costs=None, virtual=False, host_slots=E)
    for _ in range(3):
        assert tier.step(0, [[0, 1]]) == tier.right(0, [[0, 1]])
    assert tier.tier.hosted.costs is not None
    assert tier.tier.hosted.costs.move_s > 0
    tier.check()
    tier.tier.close()
