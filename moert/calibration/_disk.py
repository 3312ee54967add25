"""Records read from the disk, alone and while the CPU computes."""

from __future__ import annotations

import random
import statistics
from time import perf_counter

import torch

from moert.calibration._work import Work
from moert.calibration.sampling import Measured, sampled
from moert.calibration.subject import Subject
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import BLOCK_BYTES, DiskReader, Read, ReadHandle

TOGETHER_S = 0.1
READS = 8
"""Records of one sample of the disk, and how many are queued while the CPU computes."""


class Disk:
    """Records read as the runtime reads them, into memory of their own."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        slots = 2 * READS
        self._arena = HostArena(_record_bytes(subject) * slots)
        self._bank = SlotBank(self._arena, 0, _record_bytes(subject), slots)
        self._reader = DiskReader(subject.io_depth)
        self._free = list(range(slots))
        self._draw = random.Random(1)

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._reader.close()
        self._arena.close()

    def _submit(self) -> tuple[int, ReadHandle]:
        subject, slot = self._subject, self._free.pop()
        layer = self._draw.choice(subject.layers).spec
        record = subject.source.record(layer.index, self._draw.randrange(layer.num_experts))
        memory = self._bank.slot(slot)
        reads = [
            Read(subject.source.files[span.file], span.offset, span.nbytes, memory[at : at + span.window_bytes])
            for span, at in zip(record.reads, record.positions, strict=True)
        ]
        return slot, self._reader.submit_read(reads)

    def _reads_s(self, count: int) -> float:
        begin = perf_counter()
        handles = [self._submit() for _ in range(count)]
        for slot, handle in handles:
            handle.wait()
            self._free.append(slot)
        return perf_counter() - begin

    def alone(self) -> Measured:
        """One record of as many as are read at once."""
        self._reads_s(READS)
        return sampled(lambda: self._reads_s(READS) / READS)

    def beside(self, work: Work, call_s: float) -> tuple[Measured, Measured]:
        """(one expert and one token while records are read, one record while experts are computed)"""
        reads: list[float] = []

        def sample() -> float:
            hidden = torch.randn(1, work.ffn.hidden).to(work.ffn.dtype)
            out = torch.zeros(1, work.ffn.hidden)
            waiting = [self._submit() for _ in range(READS)]
            computed = done = calls = 0.0
            begin = perf_counter()
            while perf_counter() - begin < TOGETHER_S or done < READS:
                _, experts = work.next_experts(work.top_k)
                computed += work.run_s(experts, 1, hidden, out)
                calls += 1
                while waiting and waiting[0][1].ready:
                    slot, handle = waiting.pop(0)
                    handle.wait()
                    self._free.append(slot)
                    done += 1
                    waiting.append(self._submit())
            reads.append((perf_counter() - begin) / done)
            for slot, handle in waiting:
                handle.wait()
                self._free.append(slot)
            return max(0.0, computed / calls - call_s) / work.top_k

        expert = sampled(sample)
        ordered = sorted(reads)
        low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
        return expert, Measured(statistics.median(reads), low, high, len(reads), expert.is_steady)


def _record_bytes(subject: Subject) -> int:
    # Layers of one shape still begin anywhere in their blocks.
    most = max(
        subject.source.record(layer.spec.index, expert).buffer_bytes
        for layer in subject.layers
        for expert in range(layer.spec.num_experts)
    )
    return -(-most // BLOCK_BYTES) * BLOCK_BYTES
