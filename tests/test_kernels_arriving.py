"""One token's experts that are still being read: the bits of all being there, whoever comes when or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import native_support
import pytest
import torch
from native_support import MIB, await_native, set_lanes, submit, unreadable

from moert.kernels import cpu
from moert.kernels.arriving import run_arriving
from moert.kernels.cpu_ffn import Expert, ExpertFfn
from moert.kernels.gate import Gate
from moert.tiers.arena import SlotBank
from moert.tiers.disk import DiskReader, ShardFile

arena, slots = native_support.arena, native_support.slots
content, path, file = native_support.content, native_support.path, native_support.file

D, F, K = 64, 48, 4
PLACES = [2, 0, 3, 1]


def make(dtype: torch.dtype) -> tuple[ExpertFfn, list[Expert], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    ffn = ExpertFfn(Gate(), D, F, dtype)
    experts = [ffn.expert(cpu.Matrix("plain", numbers(2 * F, D)), cpu.Matrix("plain", numbers(D, F))) for _ in range(K)]
    return ffn, experts, numbers(1, D), torch.rand(K, generator=generator)


@pytest.fixture
def reader() -> Iterator[DiskReader]:
    with DiskReader() as reader:
        yield reader


@pytest.mark.parametrize("dtype", list(cpu.NUMBERS), ids=str)
def test_all_there_are_the_bits_of_a_token(isa: str, dtype: torch.dtype) -> None:
    ffn, experts, hidden, weights = make(dtype)
    found = run_arriving(ffn, hidden, experts, PLACES, weights, [None] * K)
    assert found.output is not None
    assert torch.equal(found.output, ffn.run_token(hidden, experts, PLACES, weights))
    assert found.is_computed == [True] * K
    for expert, row in zip(experts, found.held, strict=True):
        alone = torch.zeros(1, D)
        ffn.run(hidden, [expert], [None], [None], alone)
        assert torch.equal(row, alone[0])


def test_each_is_waited_for(reader: DiskReader, file: ShardFile, slots: SlotBank) -> None:
    ffn, experts, hidden, weights = make(torch.bfloat16)
    set_lanes(reader, file, 0)
    handles = {at: submit(reader, file, slots.slot(at), at * MIB, MIB) for at in (1, 3)}
    timer = threading.Timer(0.15, set_lanes, (reader, file, 1))  # longer than it is deaf to signals
    timer.start()
    records = [handles[at].native if at in handles else None for at in range(K)]
    found = run_arriving(ffn, hidden, experts, PLACES, weights, records)
    timer.join()
    assert all(handle.ready for handle in handles.values())
    assert found.wait_s > 0.1
    assert found.output is not None
    assert torch.equal(found.output, ffn.run_token(hidden, experts, PLACES, weights))


def test_one_that_cannot_be_read_is_left_out(reader: DiskReader, file: ShardFile, slots: SlotBank) -> None:
    ffn, experts, hidden, weights = make(torch.bfloat16)
    with unreadable(file):
        bad = submit(reader, file, slots.slot(0), 0, MIB)
        await_native(bad)
    record = bad.native
    good = submit(reader, file, slots.slot(1), MIB, MIB)
    found = run_arriving(ffn, hidden, experts, PLACES, weights, [None, good.native, record, None])
    assert found.output is None
    assert found.is_computed == [True, True, False, True]
    whole = run_arriving(ffn, hidden, experts, PLACES, weights, [None] * K)
    assert torch.equal(found.held[2], torch.zeros(D))
    assert torch.equal(found.held[[0, 1, 3]], whole.held[[0, 1, 3]])


def test_a_signal_ends_the_waiting(reader: DiskReader, file: ShardFile, slots: SlotBank) -> None:
    ffn, experts, hidden, weights = make(torch.bfloat16)
    set_lanes(reader, file, 0)
    handle = submit(reader, file, slots.slot(0), 0, MIB)
    timer = threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_arriving(ffn, hidden, experts, PLACES, weights, [handle.native, None, None, None])
    timer.join()
    set_lanes(reader, file, 1)
    handle.wait()


def test_bad_input(reader: DiskReader) -> None:
    ffn, experts, hidden, weights = make(torch.bfloat16)
    with pytest.raises(ValueError, match="place 4 of 4 weights"):
        run_arriving(ffn, hidden, experts, [0, 1, 2, 4], weights, [None] * K)
    with pytest.raises(ValueError, match="hidden states must be"):
        run_arriving(ffn, hidden.float(), experts, PLACES, weights, [None] * K)
    with pytest.raises(ValueError, match="weights must be"):
        run_arriving(ffn, hidden, experts, PLACES, weights.double(), [None] * K)
    with pytest.raises(TypeError, match=r"moert\.record"):
        run_arriving(ffn, hidden, experts, PLACES, weights, [experts[0].capsule, None, None, None])
