"""Transfers under any order of demands, guesses, arrivals, failures, changes of size and withdrawals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from fake_disk import READ_BYTES, FakeDisk, FakeLayer, FakeRead
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from moert.errors import MoertError, TransferError
from moert.runtime.layer import Fetch, Place
from moert.runtime.pipeline import Pipeline
from moert.runtime.step import run_step
from moert.tiers.disk import Priority
from moert.types import ExpertId

E, LAYERS = 6, 3


def compute(hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return hidden * weights["w"]


def step(layer: FakeLayer, pipeline: Pipeline, experts: list[int]) -> float:
    """The sum over the experts, each with weight 1, of a token of one number, 1."""
    ids = torch.tensor([experts])
    out = run_step(layer, compute, torch.ones(1, 1), ids, torch.ones(ids.shape), pipeline=pipeline, check=True)
    return out.item()


class PipelineMachine(RuleBasedStateMachine):
    """Layers on one fake disk. After anything that may happen, a step gives the right number or the disk's error."""

    @initialize(capacity=st.integers(1, E), in_flight=st.integers(1, 5), bytes_in_flight=st.integers(0, 4))
    def start(self, capacity: int, in_flight: int, bytes_in_flight: int) -> None:
        self.disk = FakeDisk()
        self.layers = [FakeLayer(index, E, capacity, self.disk) for index in range(LAYERS)]
        self.max_in_flight = in_flight
        self.max_bytes = bytes_in_flight * READ_BYTES or None
        self.pipeline = Pipeline(self.layers, in_flight, self.max_bytes)

    @rule(layer=st.integers(0, LAYERS - 1), event=st.sets(st.integers(0, E - 1), min_size=1))
    def step(self, layer: int, event: set[int]) -> None:
        experts = sorted(event)
        failing = {expert.expert for expert in self.disk.failing if expert.layer == layer}
        stats, before = self.layers[layer].stats, self.layers[layer].residency.residents
        counted = stats.hits, stats.misses
        try:
            found = step(self.layers[layer], self.pipeline, experts)
        except TransferError:
            # A read that began before the disk was mended may fail as well.
            assert failing & event or self.doubtful & {ExpertId(layer, expert) for expert in event}
        else:
            assert found == sum(self.layers[layer].factor(expert) for expert in experts)
        hits = {expert.expert for expert in before} & event
        assert (stats.hits - counted[0], stats.misses - counted[1]) == (len(hits), len(event - hits))
        self.doubtful -= {expert for expert in self.doubtful if not self.pipeline.is_in_flight(expert)}

    @rule(
        experts=st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, E - 1)), max_size=6),
        priority=st.sampled_from([Priority.PROMOTION, Priority.PREFETCH]),
    )
    def prefetch(self, experts: list[tuple[int, int]], priority: Priority) -> None:
        self.pipeline.prefetch((ExpertId(*expert) for expert in experts), priority)
        self.pipeline.pump()

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.disk.reads:
            data.draw(st.sampled_from(self.disk.reads)).finish()

    @rule(data=st.data(), all_of_it=st.booleans())
    def begin_reading(self, data: st.DataObject, all_of_it: bool) -> None:
        if self.disk.reads:
            read = data.draw(st.sampled_from(self.disk.reads))
            read.started = True
            read.all_begun |= all_of_it

    @rule()
    def collect(self) -> None:
        for expert in self.pipeline.collect():
            assert expert in self.layers[expert.layer].residency

    @rule(expert=st.tuples(st.integers(0, LAYERS - 1), st.integers(0, E - 1)))
    def break_or_mend(self, expert: tuple[int, int]) -> None:
        self.disk.failing ^= {ExpertId(*expert)}
        self.doubtful.add(ExpertId(*expert))

    @rule(experts=st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, E - 1)), max_size=4))
    def withdraw(self, experts: list[tuple[int, int]]) -> None:
        self.pipeline.withdraw(ExpertId(*expert) for expert in experts)

    @rule(layer=st.integers(0, LAYERS - 1), capacity=st.integers(1, E))
    def resize(self, layer: int, capacity: int) -> None:
        self.pipeline.drain()
        self.layers[layer].resize(capacity)

    @rule()
    def drain(self) -> None:
        self.pipeline.drain()
        assert not self.disk.reads
        assert not self.pipeline.busy

    doubtful: set[ExpertId]

    def __init__(self) -> None:
        super().__init__()
        self.doubtful = set()

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "pipeline"):
            return
        self.pipeline.check_integrity()
        in_flight = [ExpertId(layer.spec.index, e) for layer in self.layers for e in range(E)]
        in_flight = [expert for expert in in_flight if self.pipeline.is_in_flight(expert)]
        assert len(in_flight) <= self.max_in_flight
        assert self.max_bytes is None or self.pipeline.bytes_in_flight <= max(self.max_bytes, READ_BYTES)
        for layer in self.layers:
            layer.residency.check_integrity()
            for expert in layer.residency.residents:
                assert layer.weights(expert.expert)["w"].item() == layer.factor(expert.expert)

    def teardown(self) -> None:
        if hasattr(self, "pipeline"):
            self.drain()


PipelineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPipeline = PipelineMachine.TestCase


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


def ids(*experts: int, layer: int = 0) -> list[ExpertId]:
    return [ExpertId(layer, expert) for expert in experts]


def classes(disk: FakeDisk) -> list[Priority]:
    return [read.priority for read in disk.reads]


def test_demands_start_before_what_nobody_waits_for(disk: FakeDisk) -> None:
    pipeline = Pipeline([FakeLayer(0, E, E, disk)], 6)
    pipeline.prefetch(ids(0))
    pipeline.prefetch(ids(1), Priority.PROMOTION)
    pipeline.demand(ids(2))
    pipeline.pump()
    assert classes(disk) == [Priority.DEMAND, Priority.PROMOTION, Priority.PREFETCH]


def test_what_nobody_waits_for_takes_half(disk: FakeDisk) -> None:
    layer = FakeLayer(0, E, E, disk)
    pipeline = Pipeline([layer], 4)
    pipeline.prefetch(ids(0, 1, 2, 3))
    pipeline.pump()
    assert len(disk.reads) == 2
    pipeline.demand(ids(4, 5))
    pipeline.pump()
    assert classes(disk) == [Priority.PREFETCH] * 2 + [Priority.DEMAND] * 2
    half = Pipeline([FakeLayer(0, E, E, disk := FakeDisk())], 6, max_bytes=3 * READ_BYTES)
    half.prefetch(ids(0, 1, 2, 3))
    half.pump()
    assert len(disk.reads) == 1


def test_a_demand_waits_for_the_rest_of_a_prefetch(disk: FakeDisk) -> None:
    layer = FakeLayer(0, E, E, disk)
    pipeline = Pipeline([layer], 4)
    pipeline.prefetch(ids(3))
    pipeline.pump()
    (read,) = disk.reads
    assert step(layer, pipeline, [1, 3]) == layer.factor(1) + layer.factor(3)
    assert read.priority is Priority.DEMAND
    assert (layer.stats.misses, layer.stats.forwarded) == (2, 1)
    assert layer.stats.bytes_read == 2 * READ_BYTES, "one read for each expert"


def test_a_queued_prefetch_becomes_the_demand(disk: FakeDisk) -> None:
    pipeline = Pipeline([FakeLayer(0, E, E, disk)], 1)
    pipeline.prefetch(ids(0, 1, 2))
    pipeline.demand(ids(2))
    pipeline.pump()
    assert classes(disk) == [Priority.DEMAND]
    assert pipeline.is_in_flight(ExpertId(0, 2))
    pipeline.drain()
    assert not disk.reads


def begun(layer: FakeLayer, pipeline: Pipeline, expert: int) -> FakeRead:
    """Its read, as a prefetch of which a part has been begun."""
    pipeline.prefetch(ids(expert))
    pipeline.pump()
    read = layer.disk.reads[-1]
    read.started = True
    return read


def test_what_is_withdrawn_is_read_no_further(disk: FakeDisk) -> None:
    layer = FakeLayer(0, E, 2, disk)
    pipeline = Pipeline([layer], 4)
    read = begun(layer, pipeline, 3)
    pipeline.withdraw(ids(3))
    assert pipeline.bytes_ahead == 0
    assert pipeline.is_in_flight(ExpertId(0, 3))
    read.finish()
    assert pipeline.collect() == []
    assert layer.residency.n_free == 2
    assert layer.stats.failed_prefetches == 0
    whole = begun(layer, pipeline, 4)
    whole.all_begun = True
    pipeline.withdraw(ids(4))
    whole.finish()
    assert pipeline.collect() == ids(4), "nothing was left to give up"


@pytest.mark.parametrize(("is_over", "n_reads"), [(False, 1), (True, 2)])
def test_what_was_withdrawn_and_is_needed_is_read_whole(disk: FakeDisk, is_over: bool, n_reads: int) -> None:
    layer = FakeLayer(0, E, 2, disk)
    pipeline = Pipeline([layer], 4)
    read = begun(layer, pipeline, 3)
    pipeline.withdraw(ids(3))
    if is_over:
        read.finish()
    assert step(layer, pipeline, [3]) == layer.factor(3)
    assert disk.n_submitted == n_reads
    assert (layer.stats.misses, layer.stats.forwarded, layer.stats.failed_prefetches) == (1, 1, 0)


@pytest.mark.parametrize("priority", [Priority.PROMOTION, Priority.PREFETCH])
def test_what_was_withdrawn_and_is_guessed_again_is_read_on(disk: FakeDisk, priority: Priority) -> None:
    layer = FakeLayer(0, E, 2, disk)
    pipeline = Pipeline([layer], 4)
    read = begun(layer, pipeline, 3)
    pipeline.withdraw(ids(3))
    assert not pipeline.is_coming(ExpertId(0, 3))
    pipeline.prefetch(ids(3), priority)
    assert pipeline.is_coming(ExpertId(0, 3))
    assert (read.priority, read.given_up) == (priority, False)
    assert pipeline.bytes_ahead == READ_BYTES
    pipeline.check_integrity()
    layer.residency.check_integrity()
    read.finish()
    assert pipeline.collect() == ids(3)
    assert disk.n_submitted == 1


def test_what_is_ending_and_is_guessed_again_is_read_then(disk: FakeDisk) -> None:
    layer = FakeLayer(0, E, 3, disk)
    pipeline = Pipeline([layer], 8)

    def ending(expert: int) -> FakeRead:
        read = begun(layer, pipeline, expert)
        pipeline.withdraw(ids(expert))
        read.all_begun = True
        pipeline.prefetch(ids(expert), due=7)
        pipeline.prefetch(ids(expert), due=8)
        pipeline.check_integrity()
        assert not pipeline.is_coming(ExpertId(0, expert))
        return read

    read = ending(3)
    assert (disk.n_submitted, pipeline.bytes_ahead) == (1, READ_BYTES)
    pipeline.prefetch(ids(4), due=8)
    read.finish()
    assert pipeline.collect() == []
    assert list(pipeline._queues[Priority.PREFETCH]) == ids(3, 4), "in the order of when they are due"
    pipeline.pump()
    assert pipeline.is_coming(ExpertId(0, 3))
    pipeline.drain()
    # Unless it is withdrawn or taken off the queue again, or a step needs it first.
    for take_back in (pipeline.withdraw, pipeline.dequeue):
        read = ending(5)
        take_back(ids(5))
        assert pipeline.bytes_ahead == 0
        read.finish()
        pipeline.collect()
        assert not pipeline.busy
    ending(5)
    assert step(layer, pipeline, [5]) == layer.factor(5)
    assert not pipeline.busy
    assert layer.stats.failed_prefetches == 0


def test_a_promotion_of_a_prefetch_is_no_demand(disk: FakeDisk) -> None:
    pipeline = Pipeline([FakeLayer(0, E, E, disk)], 4)
    pipeline.prefetch(ids(3))
    pipeline.pump()
    pipeline.prefetch(ids(3), Priority.PROMOTION)
    assert classes(disk) == [Priority.PROMOTION]
    assert not pipeline.waits
    pipeline.prefetch(ids(3))
    pipeline.demand(ids(3))
    assert classes(disk) == [Priority.DEMAND]


def test_an_event_takes_the_slots_of_what_is_withdrawn(disk: FakeDisk) -> None:
    layer = FakeLayer(0, E, 3, disk)
    pipeline = Pipeline([layer], 6)
    step(layer, pipeline, [0, 1])
    begun(layer, pipeline, 3)
    pipeline.withdraw(ids(3))
    assert step(layer, pipeline, [4]) == layer.factor(4)
    assert layer.residency.residents == tuple(ids(0, 1, 4)), "somebody left for a slot that was as good as free"


def test_experts_that_are_there_are_not_fetched_again(disk: FakeDisk) -> None:
    layer = FakeLayer(0, E, E, disk)
    pipeline = Pipeline([layer], 4)
    step(layer, pipeline, [0, 1])
    pipeline.prefetch(ids(0, 1))
    assert not pipeline.busy


def test_a_prefetch_that_fails_is_read_again_by_who_needs_it(disk: FakeDisk) -> None:
    layer = FakeLayer(0, E, E, disk)
    pipeline = Pipeline([layer], 4)
    disk.failing = {ExpertId(0, 2)}
    pipeline.prefetch(ids(2))
    pipeline.pump()
    disk.reads[0].finish()
    disk.failing.clear()
    assert pipeline.collect() == []
    assert layer.stats.failed_prefetches == 1
    assert step(layer, pipeline, [2]) == layer.factor(2)


def test_a_demand_that_fails_is_the_steps_error(disk: FakeDisk) -> None:
    layer = FakeLayer(0, E, E, disk)
    pipeline = Pipeline([layer], 4)
    disk.failing = {ExpertId(0, 2)}
    with pytest.raises(TransferError, match="no luck"):
        step(layer, pipeline, [1, 2, 3])
    disk.failing.clear()
    assert step(layer, pipeline, [1, 2, 3]) == sum(map(layer.factor, (1, 2, 3)))


def test_guesses_for_other_layers_never_block_a_step(disk: FakeDisk) -> None:
    layers = [FakeLayer(index, E, 1, disk) for index in range(2)]
    pipeline = Pipeline(layers, 2)
    pipeline.prefetch(ids(0, 1, 2, layer=1))
    pipeline.pump()
    assert step(layers[0], pipeline, [0, 1, 2, 3]) == sum(map(layers[0].factor, range(4)))


def test_a_guess_in_the_only_slot_makes_way(disk: FakeDisk) -> None:
    layer = FakeLayer(0, E, 1, disk)
    pipeline = Pipeline([layer], 4)
    pipeline.prefetch(ids(5))
    pipeline.pump()
    assert step(layer, pipeline, [0, 1]) == layer.factor(0) + layer.factor(1)


class Batches(FakeLayer):
    """Notes what is submitted at once, has buffers for so many reads, and may refuse."""

    def __init__(self, index: int, capacity: int, disk: FakeDisk, buffers: int = E) -> None:
        super().__init__(index, E, capacity, disk)
        self.batches: list[list[int]] = []
        self.buffers = buffers
        self.refuses = False

    def _can_submit(self, others: int = 0) -> bool:
        # Those that are admitted are arriving already.
        return len(self.residency.arriving) < self.buffers

    def _submit(self, places: Sequence[Place], priority: Priority) -> list[Fetch]:
        if self.refuses:
            raise MoertError("the disk reader is closed")
        self.batches.append([expert for expert, _ in places])
        return super()._submit(places, priority)


def test_an_event_is_submitted_at_once(disk: FakeDisk) -> None:
    layers = [Batches(index, E, disk) for index in range(2)]
    pipeline = Pipeline(layers, 8)
    pipeline.demand(ids(4, 0, 2))
    pipeline.prefetch([*ids(1), *ids(3, 5, layer=1), *ids(5)])
    pipeline.pump()
    assert layers[0].batches == [[4, 0, 2], [1]]
    assert layers[1].batches == []
    pipeline.drain()


def test_a_batch_is_of_one_layer_and_has_room(disk: FakeDisk) -> None:
    layers = [Batches(index, E, disk) for index in range(2)]
    pipeline = Pipeline(layers, 10)
    pipeline.prefetch([*ids(4, 0), *ids(3, 5, layer=1), *ids(1, 2)])
    pipeline.pump()
    assert [layer.batches for layer in layers] == [[[4, 0], [1]], [[3, 5]]]
    narrow = Pipeline([Batches(0, E, disk)], 8, max_bytes=2 * READ_BYTES)
    narrow.demand(ids(0, 1, 2))
    narrow.pump()
    assert narrow._layers[0].batches == [[0, 1]]  # type: ignore[attr-defined]
    assert narrow.has_queued_demands


def test_a_batch_takes_the_slots_and_buffers_there_are(disk: FakeDisk) -> None:
    layer, other = Batches(0, 2, disk), Batches(1, E, disk, buffers=1)
    pipeline = Pipeline([layer, other], 20)
    pipeline.demand(ids(0, 1, 2))
    pipeline.prefetch(ids(3, layer=1))
    pipeline.pump()
    assert layer.batches == [[0, 1]]
    assert other.batches == [], "what nobody waits for must not take what is freed next"
    pipeline.drain()
    pipeline.prefetch([*ids(0, 1, 2), *ids(3, 4, layer=1)])
    pipeline.pump()
    assert layer.batches[1:] == [[0, 1]]
    assert other.batches == [[3]]
    pipeline.check_integrity()


def test_demands_start_in_their_order(disk: FakeDisk) -> None:
    layer = Batches(0, 2, disk)
    pipeline = Pipeline([layer], 8)
    layer.residency.begin(ids(0))
    layer.residency.promise()
    pipeline.demand(ids(1, 0))
    pipeline.pump()
    assert layer.batches == [], "the free slots are promised, and not to the first"


def test_a_batch_that_cannot_be_queued_leaves_nothing(disk: FakeDisk) -> None:
    layer = Batches(0, E, disk)
    pipeline = Pipeline([layer], 8)
    layer.refuses = True
    pipeline.demand(ids(0, 1, 2))
    with pytest.raises(MoertError, match="closed"):
        pipeline.pump()
    assert not layer.residency.arriving
    assert layer.residency.n_free == E
    pipeline.check_integrity()
    layer.refuses = False
    pipeline.pump()
    assert layer.batches == [[0, 1, 2]]
    pipeline.drain()
