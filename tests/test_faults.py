"""Failing disks beneath the real reader, pipeline and slots: what is raised, what is counted, and that work goes on."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_support import (
    DIRECT,
    HAS_CHECKSUM,
    LAYERS,
    NEEDED,
    ROUTING,
    STAGED,
    E,
    Experts,
    check_books,
    formula,
    is_arena,
    read_threads,
    right,
    step,
)
from faulty_disk import PATIENCE_S, Fault, FaultyDisk

from moert.config import parse_budget
from moert.errors import CorruptFileError, MoertError, TransferError
from moert.runtime import runtime as runtime_module
from moert.runtime.runtime import OffloadRuntime
from moert.tiers import shard_file
from moert.types import ExpertId

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    return Experts(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def experts(made: Experts) -> Iterator[Experts]:
    yield made
    for file in range(len(made.paths)):
        made.restore(file)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    fds = set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert read_threads() == []
    assert set(os.listdir("/proc/self/fd")) - fds == set()


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk(seed=5)


@pytest.fixture
def open_runtime(experts: Experts, disk: FaultyDisk) -> Iterator[Callable[..., OffloadRuntime]]:
    opened = []

    def make(**options: Any) -> OffloadRuntime:
        opened.append(experts.runtime(disk, **{"host_memory": "50%", **options}))
        return opened[-1]

    yield make
    disk.release()
    for runtime in opened:
        runtime.close()


def middle(runtime: OffloadRuntime, layer: int, expert: int) -> tuple[str, int]:
    """A byte of a record in a block that belongs to no other one: its file and where."""
    source = runtime._source
    assert source is not None
    span = source.record(layer, expert).reads[0]
    return str(source.files[span.file].path), span.offset + span.nbytes // 2


def at_middle(runtime: OffloadRuntime, layer: int, expert: int) -> dict[str, Any]:
    path, offset = middle(runtime, layer, expert)
    return {"path": path, "begin": offset, "end": offset + 1}


@pytest.mark.parametrize("layer", LAYERS)
def test_without_faults_it_is_the_formula(
    layer: int, experts: Experts, open_runtime: Callable[..., OffloadRuntime]
) -> None:
    runtime = open_runtime()
    found = step(runtime, layer, ROUTING)
    torch.testing.assert_close(found.double(), formula(experts, layer, ROUTING), rtol=1e-4, atol=1e-4)
    assert torch.equal(found, right(experts, layer))
    check_books(runtime, experts)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "fault",
    [Fault(errno.EIO, times=1), Fault(errno.EINTR, times=7), Fault(keep_bytes=4096, times=4), Fault(keep_bytes=5000)],
    ids=["EIO once", "EINTR", "one block", "odd length"],
)
def test_what_passes_is_not_noticed(
    layer: int, fault: Fault, experts: Experts, disk: FaultyDisk, open_runtime: Callable[..., OffloadRuntime]
) -> None:
    runtime = open_runtime()
    disk.add(dataclasses.replace(fault))
    calls = disk.count
    assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer))
    assert disk.count - calls > len(NEEDED), "the fault has not shown"
    stats = runtime.layers[layer].stats
    assert (stats.misses, stats.failed_prefetches) == (len(NEEDED), 0)
    source = runtime._source
    assert source is not None
    assert stats.bytes_read == sum(source.record(layer, expert).read_bytes for expert in NEEDED), "each counted once"
    check_books(runtime, experts)


@pytest.mark.parametrize("layer", LAYERS)
def test_an_error_that_stays_is_the_steps_and_names_its_place(
    layer: int, experts: Experts, disk: FaultyDisk, open_runtime: Callable[..., OffloadRuntime]
) -> None:
    runtime = open_runtime()
    path, offset = middle(runtime, layer, 3)
    disk.add(Fault(errno.EIO, path=path, begin=offset, end=offset + 1))
    source = runtime._source
    assert source is not None
    window = source.record(layer, 3).reads[0].offset // 4096 * 4096
    for turn in range(1, 4):
        with pytest.raises(TransferError, match=f"Input/output error reading [0-9]+ bytes at {window}") as caught:
            step(runtime, layer, ROUTING)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, path)
        check_books(runtime, experts)
        assert ExpertId(layer, 3) not in runtime.layers[layer].residency
        assert runtime.layers[layer].stats.failed_prefetches == 0, "a demand is no prefetch"
        stats = runtime.layers[layer].stats
        assert stats.hits + stats.misses == turn * len(NEEDED)
    others = [[0, 1], [4, 5]]
    assert torch.equal(step(runtime, layer, others), right(experts, layer, others)), "the rest of the file is sound"
    disk.mend()
    assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer))
    check_books(runtime, experts)


def test_a_prefetch_that_fails_is_counted_and_read_again_by_who_needs_it(
    experts: Experts, disk: FaultyDisk, open_runtime: Callable[..., OffloadRuntime]
) -> None:
    runtime = open_runtime()
    stats = runtime.layers[STAGED].stats
    disk.add(Fault(errno.EIO, **at_middle(runtime, STAGED, 3)))
    runtime.prefetch([ExpertId(STAGED, 3)])
    (transfer,) = runtime.pipeline._in_flight.values()
    with pytest.raises(TransferError):
        transfer.fetch.handle.wait(PATIENCE_S)
    step(runtime, DIRECT, ROUTING)  # collects whatever has come
    assert (stats.failed_prefetches, stats.misses, stats.bytes_read, stats.resident_bytes) == (1, 0, 0, 0)
    check_books(runtime, experts)
    disk.mend()
    assert torch.equal(step(runtime, STAGED, ROUTING), right(experts, STAGED))
    assert (stats.failed_prefetches, stats.misses, stats.forwarded) == (1, len(NEEDED), 0)


def test_a_step_waits_for_the_rest_of_a_prefetch_only(
    experts: Experts, disk: FaultyDisk, open_runtime: Callable[..., OffloadRuntime]
) -> None:
    runtime = open_runtime()
    disk.hold()
    runtime.prefetch([ExpertId(STAGED, 3)])
    disk.wait_held(1)
    disk.release()
    calls = disk.count
    assert torch.equal(step(runtime, STAGED, ROUTING), right(experts, STAGED))
    stats = runtime.layers[STAGED].stats
    assert (stats.misses, stats.forwarded) == (len(NEEDED), 1)
    assert disk.count - calls == 2 * len(NEEDED) - 1, "two calls for each record, one of them made before"


def test_bytes_in_flight_are_bounded(
    experts: Experts, disk: FaultyDisk, open_runtime: Callable[..., OffloadRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = max(open_runtime().layers[DIRECT].read_bytes(expert) for expert in range(E))
    monkeypatch.setattr(runtime_module, "MAX_BYTES_IN_FLIGHT", 4 * record)
    runtime = open_runtime(host_memory="100%")
    disk.hold()
    runtime.prefetch([ExpertId(DIRECT, expert) for expert in range(E)])
    assert record < runtime.pipeline.bytes_in_flight <= 2 * record, "half of it is all that guesses may take"
    disk.release()
    assert torch.equal(step(runtime, DIRECT, ROUTING), right(experts, DIRECT))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_change_of_the_file_is_found_and_undone_again(
    layer: int, experts: Experts, open_runtime: Callable[..., OffloadRuntime]
) -> None:
    runtime = open_runtime()
    file = runtime._source.record(layer, 3).reads[0].file  # type: ignore[union-attr]
    path = experts.paths[file]

    def truncate() -> None:
        os.truncate(path, 5000)

    def overwrite() -> None:
        with open(path, "r+b") as writer:
            writer.seek(20_000)
            writer.write(b"other weights")
        os.utime(path, ns=(10**18, 10**18))

    for change in (truncate, overwrite):
        change()
        for _ in range(2):
            with pytest.raises(CorruptFileError, match=f"{Path(path).name} was changed while it was in use: "):
                step(runtime, layer, ROUTING)
            check_books(runtime, experts)
            assert not runtime.pipeline.has_queued_demands
        # One under way that began before would take what it has read for the file's own.
        runtime.pipeline.drain()
        experts.restore(file)
        assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer))


def test_a_file_replaced_by_rename_is_read_on_as_it_was(tmp_path: Path, disk: FaultyDisk, experts: Experts) -> None:
    own = Experts(tmp_path / "own")
    with own.runtime(disk, host_memory="34%") as runtime:
        for path in own.paths:
            (tmp_path / "new").write_bytes(b"z" * 300_000)
            os.rename(tmp_path / "new", path)
        for layer in LAYERS:
            assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer))


@pytest.mark.filterwarnings("ignore:.*O_DIRECT:RuntimeWarning")
@pytest.mark.parametrize("when", ["from the start", "in between"])
def test_without_o_direct_the_bits_are_the_same(
    when: str,
    experts: Experts,
    disk: FaultyDisk,
    open_runtime: Callable[..., OffloadRuntime],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_file, "_warned_devices", set())
    disk.refuses_direct = when == "from the start"
    runtime = open_runtime(host_memory="34%")
    for layer in LAYERS:
        disk.refuses_direct |= layer == STAGED
        assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer))
    assert not runtime._source.files[4].direct  # type: ignore[union-attr]
    check_books(runtime, experts)


@pytest.mark.parametrize("layer", HAS_CHECKSUM)
def test_a_flipped_bit_is_found_at_the_first_read(
    layer: int, experts: Experts, disk: FaultyDisk, open_runtime: Callable[..., OffloadRuntime]
) -> None:
    runtime = open_runtime()
    path, offset = middle(runtime, layer, 3)
    flip = {"flip_at": offset, **at_middle(runtime, layer, 3)}
    disk.add(Fault(**flip))
    for _ in range(2):
        calls = disk.count
        with pytest.raises(CorruptFileError, match=rf"{Path(path).name}: expert 3 of layer {layer} .* read twice"):
            runtime.weights(layer, 3)
        assert disk.count - calls == 2
        check_books(runtime, experts)
    disk.mend()
    disk.add(Fault(**flip, times=1))
    calls = disk.count
    assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer)), "what is wrong once is read again"
    assert disk.count - calls == len(NEEDED) + 1


@pytest.mark.parametrize("layer", LAYERS)
def test_a_closed_runtime_has_nothing_left(layer: int, experts: Experts, disk: FaultyDisk) -> None:
    fds, runtime = set(os.listdir("/proc/self/fd")), experts.runtime(disk, host_memory="34%")
    assert runtime._tier is not None
    address = runtime._tier.arena.address
    assert is_arena(address)
    step(runtime, layer, ROUTING)
    disk.hold()
    runtime.prefetch([ExpertId(other, expert) for other in LAYERS for expert in range(E)])
    disk.wait_held(1)
    closing = threading.Thread(target=runtime.close)
    closing.start()
    disk.release()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    uses: list[Callable[[], object]] = [
        lambda: step(runtime, layer, ROUTING),
        lambda: runtime.prefetch([]),
        lambda: runtime.withdraw([]),
        lambda: runtime.weights(0, 0),
        lambda: runtime.resize(parse_budget("100%", "")),
    ]
    for use in uses:
        with pytest.raises(MoertError, match="were closed"):
            use()
    runtime.close()
    assert read_threads() == []
    assert set(os.listdir("/proc/self/fd")) <= fds
    assert not is_arena(address)


def test_uses_by_several_threads_come_one_after_the_other(
    experts: Experts, open_runtime: Callable[..., OffloadRuntime]
) -> None:
    runtime, want = open_runtime(host_memory="34%"), {layer: right(experts, layer) for layer in LAYERS}
    errors: list[BaseException] = []

    def work(turns: int) -> None:
        try:
            for turn in range(turns, turns + 40):
                layer = turn % len(LAYERS)
                runtime.prefetch([ExpertId((layer + 1) % len(LAYERS), turn % E)])
                assert torch.equal(step(runtime, layer, ROUTING), want[layer])
                if turn % 7 == 0:
                    runtime.resize(parse_budget(["34%", "67%", "100%"][turn % 3], ""))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(turns,), daemon=True) for turns in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors, errors
    check_books(runtime, experts)
