"""Everything that may happen to a runtime, in any order, over a disk whose reads end and fail when the test says so."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_support import HAS_CHECKSUM, LAYERS, TOP_K, E, Experts, check_books, read_threads, step
from faulty_disk import PATIENCE_S, Fault, FaultyDisk, HeldRead
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moert.config import parse_budget
from moert.errors import CorruptFileError, MoertError, TransferError
from moert.runtime.runtime import OffloadRuntime
from moert.tiers.disk import Priority
from moert.types import ExpertId

EXPERTS = st.builds(ExpertId, st.sampled_from(LAYERS), st.integers(0, E - 1))
TOKENS = st.lists(st.lists(st.integers(0, E - 1), min_size=TOP_K, max_size=TOP_K), min_size=1, max_size=4)
BUDGETS = st.sampled_from(["34%", "50%", "84%", "100%"])


class Machine(RuleBasedStateMachine):
    """Between uses of the runtime no read gets past the disk's gate unless a rule lets it; within one all do."""

    runtime: OffloadRuntime

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self.reference = experts.undisturbed()
        self.fds = set(os.listdir("/proc/self/fd"))
        self.broken: dict[ExpertId, Fault] = {}
        self.changed: set[int] = set()
        self.doubtful: set[ExpertId] = set()

    @initialize(budget=BUDGETS, io_depth=st.integers(1, 3), direct=st.booleans(), seed=st.integers(0, 99))
    def start(self, budget: str, io_depth: int, direct: bool, seed: int) -> None:
        self.disk = FaultyDisk(seed)
        self.runtime = self.experts.runtime(self.disk, direct=direct, host_memory=budget, io_depth=io_depth)
        self.disk.hold()

    def files_of(self, expert: ExpertId) -> set[int]:
        source = self.runtime._source
        assert source is not None
        return {read.file for read in source.record(*expert).reads}

    def is_checked(self, expert: ExpertId) -> bool:
        """Whether the expert's checksum has been looked at, or there is none: then nobody would notice other bits."""
        source = self.runtime._source
        assert source is not None
        check = source.record(*expert).check
        return check is None or check.is_over

    def fails(self, expert: ExpertId) -> bool:
        """Whether a read of it that begins now fails."""
        return expert in self.broken or bool(self.files_of(expert) & self.changed)

    def use(self, layer: int, event: set[int]) -> tuple[set[ExpertId], set[ExpertId]]:
        """Before a use of experts: those that are missing, and of them those that can only fail."""
        residency, pipeline = self.runtime.layers[layer].residency, self.runtime.pipeline
        missing = {ExpertId(layer, e) for e in event if ExpertId(layer, e) not in residency}
        doomed = {expert for expert in missing if self.fails(expert) and not pipeline.is_in_flight(expert)}
        self.disk.release()
        return missing, doomed

    def failed(self, error: MoertError, missing: set[ExpertId]) -> None:
        assert any(self.fails(expert) or expert in self.doubtful for expert in missing), error
        if isinstance(error, TransferError):
            assert error.errno == errno.EIO
            assert error.filename in self.experts.paths
            assert " bytes at " in str(error)
        else:
            assert any(path in str(error) for path in self.experts.paths)

    def over(self) -> None:
        """After a use."""
        self.disk.hold()
        self.doubtful = {expert for expert in self.doubtful if self.runtime.pipeline.is_in_flight(expert)}

    @rule(layer=st.sampled_from(LAYERS), routing=TOKENS)
    def step(self, layer: int, routing: list[list[int]]) -> None:
        event = {expert for token in routing for expert in token}
        stats, residency = self.runtime.layers[layer].stats, self.runtime.layers[layer].residency
        counted = stats.hits, stats.misses, stats.forwarded
        arriving = {expert.expert for expert in residency.arriving}
        missing, doomed = self.use(layer, event)
        try:
            found = step(self.runtime, layer, routing)
        except (TransferError, CorruptFileError) as error:
            self.failed(error, missing)
        else:
            assert not doomed
            assert torch.equal(found, step(self.reference, layer, routing))
        new = len(event) - len(missing), len(missing), len(event & arriving)
        assert (stats.hits, stats.misses, stats.forwarded) == tuple(a + b for a, b in zip(counted, new, strict=True))
        self.over()

    @rule(expert=EXPERTS)
    def weights(self, expert: ExpertId) -> None:
        missing, doomed = self.use(expert.layer, {expert.expert})
        try:
            found = self.runtime.weights(*expert)
        except (TransferError, CorruptFileError) as error:
            self.failed(error, missing)
        else:
            assert not doomed
            for name, tensor in self.experts.weights[expert.layer][expert.expert].items():
                assert torch.equal(found[name], tensor)
        self.over()

    @rule(experts=st.lists(EXPERTS, max_size=6), priority=st.sampled_from([Priority.PROMOTION, Priority.PREFETCH]))
    def prefetch(self, experts: list[ExpertId], priority: Priority) -> None:
        self.runtime.prefetch(experts, priority)

    @rule(experts=st.lists(EXPERTS, max_size=6))
    def withdraw(self, experts: list[ExpertId]) -> None:
        self.runtime.withdraw(experts)

    @rule(index=st.integers(0, 5))
    def let_one_through(self, index: int) -> None:
        held = self.quiet()
        if held:
            self.disk.let_through(held[index % len(held)])
            self.quiet()

    def quiet(self) -> list[HeldRead]:
        """Wait until each of the reader's threads has a call at the gate, or nothing to do."""
        depth = self.runtime.config.io_depth
        assert depth is not None
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            handles = [transfer.fetch.handle for transfer in self.runtime.pipeline._in_flight.values()]
            demands = [handle.priority is Priority.DEMAND for handle in handles if not handle.ready]
            busy = min(depth, demands.count(True) + min(demands.count(False), max(1, depth // 2)))
            held = self.disk.held()
            if len(held) >= busy:
                return held
            time.sleep(0)
        raise AssertionError("the reader's threads neither read nor rest")

    @rule(size=BUDGETS)
    def resize(self, size: str) -> None:
        self.disk.release()
        resized = self.runtime.resize(parse_budget(size, ""))
        assert resized.slots == tuple(layer.residency.capacity for layer in self.runtime.layers)
        assert not self.runtime.pipeline.busy
        self.over()

    @rule(expert=EXPERTS)
    def break_expert(self, expert: ExpertId) -> None:
        if expert not in self.broken:
            self.broken[expert] = self.disk.add(Fault(errno.EIO, **self.place(expert)))
            self.doubtful.add(expert)

    @rule(layer=st.sampled_from(HAS_CHECKSUM), expert=st.integers(0, E - 1), times=st.sampled_from([1, None]))
    def flip(self, layer: int, expert: int, times: int | None) -> None:
        identity = ExpertId(layer, expert)
        residency, place = self.runtime.layers[layer].residency, self.place(identity)
        is_flipped = any(fault.flip_at == place["begin"] and fault.path == place["path"] for fault in self.disk.faults)
        if (
            not (self.is_checked(identity) or is_flipped or identity in self.broken)
            and residency.slot_of(identity) is None
        ):
            fault = self.disk.add(Fault(flip_at=place["begin"], times=times, **place))
            if times is None:
                self.broken[identity] = fault
                self.doubtful.add(identity)

    def place(self, expert: ExpertId) -> dict[str, Any]:
        source = self.runtime._source
        assert source is not None
        read = source.record(*expert).reads[0]
        # In the middle of a record is a block that is no other's.
        middle = read.offset + read.nbytes // 2
        return {"path": self.experts.paths[read.file], "begin": middle, "end": middle + 1}

    @rule(kind=st.sampled_from(["EIO", "EINTR", "short"]))
    def pass_by(self, kind: str) -> None:
        """What is over when the same is asked for again; two EIO in one record are not."""
        fault = {
            "EIO": Fault(errno.EIO, times=1),
            "EINTR": Fault(errno.EINTR, times=3),
            "short": Fault(keep_bytes=4096, times=2),
        }[kind]
        if all(other.code != errno.EIO for other in self.disk.faults):
            self.disk.add(fault)

    @rule(file=st.integers(0, 4), truncate=st.booleans())
    def change_file(self, file: int, truncate: bool) -> None:
        self.changed.add(file)
        self.doubtful |= {ExpertId(layer, expert) for layer in LAYERS for expert in range(E)}
        if truncate:
            os.truncate(self.experts.paths[file], 7000)
        else:
            os.utime(self.experts.paths[file], ns=(10**18, 10**18))

    @precondition(lambda self: hasattr(self, "runtime"))
    @rule()
    def mend(self) -> None:
        self.disk.mend()
        self.broken.clear()
        if self.changed:
            # A read under way would take what it has of the changed file for the file's own.
            self.disk.release()
            self.runtime.pipeline.drain()
            self.over()
        self.restore()

    def restore(self) -> None:
        for file in self.changed:
            self.experts.restore(file)
        self.changed.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "runtime"):
            return
        check_books(self.runtime, self.experts)
        # What has been looked at once is not looked at again, so no flip may be left for it.
        for fault in list(self.disk.faults):
            if fault.flip_at is not None and fault not in self.broken.values():
                by_place = {(self.place(e)["path"], self.place(e)["begin"]): e for e in self.all_checked()}
                if self.is_checked(by_place[fault.path, fault.flip_at]):
                    self.disk.faults.remove(fault)

    def all_checked(self) -> list[ExpertId]:
        return [ExpertId(layer, expert) for layer in HAS_CHECKSUM for expert in range(E)]

    def teardown(self) -> None:
        if not hasattr(self, "runtime"):
            return
        self.disk.release()
        self.runtime.close()
        self.restore()
        with pytest.raises(MoertError, match="were closed"):
            self.runtime.weights(0, 0)
        assert read_threads() == []
        assert set(os.listdir("/proc/self/fd")) <= self.fds


@pytest.mark.timeout(240)
def test_whatever_happens_the_bits_are_right(tmp_path: Path) -> None:
    made = Experts(tmp_path)

    class OverTheseFiles(Machine):
        def __init__(self) -> None:
            super().__init__(made)

    run_state_machine_as_test(
        OverTheseFiles,
        settings=settings(
            max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
