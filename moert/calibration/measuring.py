"""A model's parts, timed one by one on this machine, with the kernels, files and runtime that run it."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch

from moert.calibration.residual import Residual
from moert.calibration.result import Calibration, Fingerprint, Shape, as_curve
from moert.calibration.sampling import Measured, sampled
from moert.errors import ConfigError
from moert.kernels.cpu import Expert
from moert.runtime.layer import LayerCache
from moert.runtime.records import RecordSource
from moert.schedule import Costs, Curve, Item, Place, make_scheduler, makespan
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import BLOCK_BYTES, DiskReader, Read, ReadHandle, measure_read_bandwidth
from moert.types import ExpertId

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEP_TOKENS = (1, 16, 256)
SAMPLE_S = 0.01
"""A sample of what is shorter is of several."""
LONG_S = 0.3
"""No more tokens are tried once a sample takes so long; the curve goes on as it was."""
TOGETHER_S = 0.1
LOOK_S = 0.2
LOOKS = 3
NOISE = 0.1
"""By so much two looks at a disk differ that has not changed."""
READS = 8
"""Records of one sample of the disk, and how many are queued while the CPU computes."""
READ_TOKENS = 128
"""Of a prompt that most of its experts have to be read for."""
PROMPT_TOKENS = 64
MORE_TOKENS = 16
"""Of a text that is continued to see what a token takes."""

Ids = Callable[[int, int, int], torch.Tensor]
"""(a layer's number, T, K) -> the experts that its tokens are to choose, [T, K]."""


def read_factor(found: Calibration, paths: Sequence[str]) -> float:
    """How many times as long a read of these files takes now as when they were calibrated, by a short look. Blocks.

    Raises:
        TransferError, CorruptFileError: as reading raises them.
    """
    seen = Residual()
    with contextlib.suppress(ValueError):  # none of them is as large as a record
        seen.note(1 / found.disk_bytes_per_s, 1 / look(paths, found.shape.slot_bytes))
    return 1.0 if abs(seen.factor - 1) < NOISE else seen.factor


def look(paths: Sequence[str], record_bytes: int) -> float:
    """Bytes per second of random records of these files, on a short look. Blocks.

    Raises:
        ValueError, TransferError, CorruptFileError: as `measure_read_bandwidth`.
    """
    return statistics.median(measure_read_bandwidth(paths, record_bytes, 4, LOOK_S) for _ in range(LOOKS))


@dataclass
class Subject:
    """A model that runs, and how its parts are called."""

    layers: Sequence[LayerCache]
    """Of one shape, all of their slots filled, and not all of their experts in slots."""
    source: RecordSource
    io_depth: int | None
    run: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """A layer's number, hidden states [T, D], ids [T, K] and weights [T, K] -> [T, D]."""
    generate: Callable[[int, int, Ids], tuple[float, float]]
    """(seconds until the first new token, seconds from that to the last) of a prompt of so many tokens and so many new
    ones, with these ids in place of the routers'."""
    forward_tokens: Sequence[int]
    """Prompts that are tried."""


def measure(
    subject: Subject, fingerprint: Fingerprint, shape: Shape, progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """Time everything. Blocks for some ten seconds; nothing else should run, neither here nor on the machine.

    Raises:
        ConfigError: the layers' experts are not computed by moert's kernels.
        TransferError, CorruptFileError: as reading records raises them.
    """
    tell = progress or (lambda done, total: None)
    parts = 6
    layer = subject.layers[0]
    if layer.spec.fused is None:
        raise ConfigError(f"{layer.spec.name} cannot be calibrated: {layer.spec.unfused_reason}")
    with torch.inference_mode():
        work = _Work(subject, shape)
        call, expert = work.experts()
        tell(1, parts)
        with _Disk(subject) as disk:
            read = disk.alone()
            tell(2, parts)
            expert_together, read_together = disk.beside(work, call.seconds)
        tell(3, parts)
        step = {n: work.step(n, call.seconds, expert) for n in STEP_TOKENS}
        tell(4, parts)
        model = _Model(subject, shape, work, call.seconds, as_curve(expert), as_curve(step))
        rest = {n: model.prompt(n) for n in subject.forward_tokens}
        whole, token = model.token()
        tell(5, parts)
        paths = [str(file.path) for file in subject.source.files]
        looked = look(paths, shape.slot_bytes)
        without = Calibration(
            fingerprint=fingerprint,
            shape=shape,
            expert=expert,
            call=call,
            read=read,
            read_together=read_together,
            read_step=read,
            read_prompt=read,
            read_start=Measured.exactly(0.0),
            expert_together=expert_together,
            step=step,
            rest=rest,
            token=token,
            disk_bytes_per_s=looked,
        )
        read_step, read_start = model.reads(without.costs(), whole.seconds)
        found = replace(without, read_step=read_step, read_start=read_start)
        found = replace(found, read_prompt=model.prompt_reads(found))
    tell(6, parts)
    return found


class _Work:
    """The experts in memory, taken in turns so that none is in a cache when its turn comes."""

    def __init__(self, subject: Subject, shape: Shape) -> None:
        fused = subject.layers[0].spec.fused
        assert fused is not None
        self.ffn = fused.ffn
        self.top_k = shape.top_k
        self._spread = max(1, shape.num_experts // shape.top_k)
        self._subject = subject
        self._draw = random.Random(0)
        self._turns = self._sets()

    def _sets(self) -> Iterator[tuple[LayerCache, list[int]]]:
        """`top_k` residents of a layer, then of the next; all of them before one comes again."""
        queues: list[list[int]] = [[] for _ in self._subject.layers]
        for place in itertools.cycle(range(len(queues))):
            layer, queue = self._subject.layers[place], queues[place]
            queue[:] = [expert for expert in queue if ExpertId(layer.spec.index, expert) in layer.residency]
            if len(queue) < self.top_k:
                fresh = self.residents(layer)
                self._draw.shuffle(fresh)
                queue += [expert for expert in fresh if expert not in queue]
            yield layer, [queue.pop(0) for _ in range(self.top_k)]

    def residents(self, layer: LayerCache) -> list[int]:
        return [e for e in range(layer.spec.num_experts) if ExpertId(layer.spec.index, e) in layer.residency]

    def experts(self) -> tuple[Measured, dict[int, Measured]]:
        """The fixed start of a call, and one expert by tokens."""
        one = sampled(lambda: self._call_s(1, 1))
        whole = sampled(lambda: self._call_s(1, self.top_k))
        start = max(0.0, (self.top_k * one.seconds - whole.seconds) / (self.top_k - 1)) if self.top_k > 1 else 0.0
        call = Measured.exactly(min(start, one.seconds / 2))
        found = {1: self._less(whole, call.seconds)}
        for n in TOKENS[1:]:
            of_all = sampled(partial(self._call_s, n, self.top_k))
            found[n] = self._less(of_all, call.seconds)
            if of_all.seconds > LONG_S:
                break
        return call, found

    def _less(self, of_all: Measured, start_s: float) -> Measured:
        """One expert's share of a call."""
        low, middle, high = (max(0.0, s - start_s) / self.top_k for s in (of_all.low, of_all.seconds, of_all.high))
        return Measured(middle, low, high, of_all.repeats, of_all.is_steady)

    def _call_s(self, tokens: int, n_experts: int) -> float:
        """One call, on average over as many as make a sample long enough."""
        hidden = torch.randn(tokens * self._spread if tokens > 1 else 1, self.ffn.hidden).to(self.ffn.dtype)
        out = torch.zeros(len(hidden), self.ffn.hidden)
        total = calls = 0.0
        while total < SAMPLE_S:
            _, experts = self.next_experts(n_experts)
            total += self.run_s(experts, tokens, hidden, out)
            calls += 1
        return total / calls

    def next_experts(self, count: int) -> tuple[LayerCache, list[Expert]]:
        layer, chosen = next(self._turns)
        return layer, [layer.fused_expert(expert) for expert in chosen[:count]]

    def run_s(self, experts: list[Expert], tokens: int, hidden: torch.Tensor, out: torch.Tensor) -> float:
        weights = [torch.full((tokens,), 1 / len(experts))] * len(experts)
        rows: list[torch.Tensor | None] = [None] * len(experts)
        if tokens > 1:
            rows = [torch.randperm(len(hidden))[:tokens].sort().values for _ in experts]
        begin = perf_counter()
        self.ffn.run(hidden, experts, rows, weights, out)
        return perf_counter() - begin

    def step(self, tokens: int, call_s: float, expert: dict[int, Measured]) -> Measured:
        """What a step of resident experts takes besides computing them."""
        curve = as_curve(expert)

        def sample() -> float:
            layer, _ = next(self._turns)
            residents = self.residents(layer)
            ids = torch.tensor([self._draw.sample(residents, self.top_k) for _ in range(tokens)])
            hidden, weights = self._inputs(tokens)
            counts = torch.bincount(ids.flatten()).tolist()
            predicted = call_s + sum(curve(n) for n in counts if n)
            if tokens == 1:
                # Just now and of other experts of the same layer: a memory that is slower for a while cancels out.
                others = [layer.fused_expert(e) for e in self._draw.sample(residents, self.top_k)]
                predicted = self.run_s(others, 1, hidden, torch.zeros(1, self.ffn.hidden))
            begin = perf_counter()
            self._subject.run(layer.spec.index, hidden, ids, weights)
            return perf_counter() - begin - predicted

        differences = [sample() for _ in range(40 if tokens == 1 else 8)]
        return _difference(differences)

    def _inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.randn(tokens, self.ffn.hidden).to(self.ffn.dtype)
        return hidden, torch.full((tokens, self.top_k), 1 / self.top_k)


class _Model:
    """The whole model, with experts that are chosen so that as many are missing as wanted."""

    def __init__(self, subject: Subject, shape: Shape, work: _Work, call_s: float, expert: Curve, step: Curve) -> None:
        self._subject, self._shape, self._work = subject, shape, work
        self._call_s, self._expert, self._step = call_s, expert, step
        self._draw = random.Random(2)
        self._layers = {layer.spec.index: layer for layer in subject.layers}
        self._resident = {index: work.residents(layer) for index, layer in self._layers.items()}
        self._pools: dict[tuple[int, int], Iterator[torch.Tensor]] = {}
        self._counts: dict[int, list[int]] = {}

    def _found(self, layer: int, tokens: int, k: int) -> torch.Tensor:
        """Ids of residents only; made beforehand, so that choosing them takes no time."""
        key = (layer, tokens)
        if key not in self._pools:
            resident = self._resident[layer]
            some = [self._draw.sample(resident, k) for _ in range(max(tokens, 4 * self._shape.num_experts))]
            pool = torch.tensor(some)
            starts = range(0, len(pool) - tokens + 1, tokens)
            self._pools[key] = itertools.cycle([pool[at : at + tokens] for at in starts])
        ids = next(self._pools[key])
        if tokens > 1:
            self._counts[layer] = torch.bincount(ids.flatten()).tolist()
        return ids

    def prompt(self, tokens: int) -> Measured:
        """A prompt's forward besides experts and steps."""
        self._subject.generate(tokens, 1, self._found)

        def sample() -> float:
            self._counts = {}
            seconds, _ = self._subject.generate(tokens, 1, self._found)
            known = sum(
                self._call_s + self._step(tokens) + sum(self._expert(n) for n in counts if n)
                for counts in self._counts.values()
            )
            if tokens == 1:
                known = len(self._layers) * self._layer_s()
            return max(0.0, seconds - known)

        return sampled(sample)

    def _layer_s(self) -> float:
        return self._call_s + self._step(1) + self._shape.top_k * self._expert(1)

    def _token_s(self, ids: Ids) -> float:
        _, seconds = self._subject.generate(PROMPT_TOKENS, 1 + MORE_TOKENS, ids)
        return seconds / MORE_TOKENS

    def token(self) -> tuple[Measured, Measured]:
        """(one more token whose experts are all there, what of it is besides experts and steps)"""
        whole = sampled(lambda: self._token_s(self._found))
        known = len(self._layers) * self._layer_s()
        low, middle, high = (max(0.0, s - known) for s in (whole.low, whole.seconds, whole.high))
        return whole, Measured(middle, low, high, whole.repeats, whole.is_steady)

    def reads(self, costs: Costs, whole_s: float) -> tuple[Measured, Measured]:
        """(a record more that a step waits for, what the first of them takes besides)

        Found as the two numbers with which the costs say of steps with one miss, and of steps with as many as a token
        can have, what these took in the running model.
        """
        shape = self._shape
        most = min(shape.top_k, *(shape.num_experts - len(r) for r in self._resident.values()))
        if most < 1:
            return Measured.exactly(costs.read_s), Measured.exactly(0.0)
        waits = {n: self._waits(n, whole_s) for n in {1, most}}
        found = []
        for pick in ("low", "seconds", "high"):
            wait_s = {n: getattr(wait, pick) for n, wait in waits.items()}
            found.append(_solve(costs, shape.top_k, wait_s))
        steady = all(wait.is_steady for wait in waits.values())
        repeats = sum(wait.repeats for wait in waits.values())

        def joined(place: int) -> Measured:
            middle = found[1][place]
            ends = [one[place] for one in found]
            return Measured(middle, min(ends), max(ends), repeats, steady)

        return joined(0), joined(1)

    def _waits(self, misses: int, whole_s: float) -> Measured:
        """How much longer a layer's step takes with so many experts missing."""

        def ids(layer: int, tokens: int, k: int) -> torch.Tensor:
            if tokens > 1:
                # The prompt's step may choose what it likes, but for a layer whose residents have changed.
                return self._some(layer, 0, k).expand(tokens, k)
            return self._some(layer, misses, k)

        def sample() -> float:
            return max(0.0, self._token_s(ids) - whole_s) / len(self._layers)

        return sampled(sample)

    def prompt_reads(self, found: Calibration) -> Measured:
        """A record more that a prompt waits for whose tokens choose among all experts."""
        tokens = max((n for n in self._subject.forward_tokens if n <= READ_TOKENS), default=1)
        if tokens <= self._shape.top_k:
            return found.read_step
        costs = found.costs()
        events: list[tuple[list[Item], int]] = []

        def ids(layer: int, count: int, k: int) -> torch.Tensor:
            chosen = torch.tensor([self._draw.sample(range(self._shape.num_experts), k) for _ in range(count)])
            resident = set(self._work.residents(self._layers[layer]))
            used = torch.bincount(chosen.flatten()).tolist()
            items = [
                Item(ExpertId(layer, e), n, Place.HOST if e in resident else Place.DISK)
                for e, n in enumerate(used)
                if n
            ]
            events.append((items, len(resident) - sum(item.place is Place.HOST for item in items)))
            return chosen

        def sample() -> float:
            events.clear()
            seconds, _ = self._subject.generate(tokens, 1, ids)
            other_s = found.dense_s(tokens) + found.steps_s(tokens)

            def predicted(read_s: float) -> float:
                given = replace(costs, read_many_s=read_s)
                plans = [(make_scheduler("cpu_all").plan(items, given), room) for items, room in events]
                return other_s + sum(makespan(plan, given, room).makespan_s for plan, room in plans)

            return _root(lambda s: predicted(s) - seconds, costs.read_s / 8, 8 * costs.read_s)

        return sampled(sample)

    def _some(self, layer: int, misses: int, k: int) -> torch.Tensor:
        resident = self._work.residents(self._layers[layer])
        missing = sorted(set(range(self._shape.num_experts)).difference(resident))
        return torch.tensor([self._draw.sample(resident, k - misses) + self._draw.sample(missing, misses)])


def _solve(costs: Costs, top_k: int, wait_s: dict[int, float]) -> tuple[float, float]:
    """(read_s, read_start_s) with which steps take longer than without misses by `wait_s`, of as many misses."""
    few, most = min(wait_s), max(wait_s)

    def longer(misses: int, read_s: float, start_s: float) -> float:
        with_them = replace(costs, read_s=read_s, read_start_s=start_s)
        return _event_s(with_them, top_k, misses) - _event_s(with_them, top_k, 0)

    longest = 8 * costs.read_s
    read_s, start_s = costs.read_s, 0.0

    def of_most(start: float, read: float) -> float:
        return longer(most, read, start) - wait_s[most]

    def of_few(read: float, start: float) -> float:
        return longer(few, read, start) - wait_s[few]

    for _ in range(8):
        read_s = _root(partial(of_most, start_s), costs.read_s / 8, longest)
        if few < most:
            start_s = _root(partial(of_few, read_s), 0.0, longest)
    return read_s, start_s


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where it crosses 0; the nearer end if it does not."""
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return low if low and rising(low) >= 0 else high if rising(high) <= 0 else (low + high) / 2


def _event_s(costs: Costs, top_k: int, misses: int) -> float:
    items = [Item(ExpertId(0, e), 1, Place.DISK if e < misses else Place.HOST) for e in range(top_k)]
    return makespan(make_scheduler("cpu_all").plan(items, costs), costs).makespan_s


class _Disk:
    """Records read as the runtime reads them, into memory of their own."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        slots = 2 * READS
        self._arena = HostArena(_record_bytes(subject) * slots)
        self._bank = SlotBank(self._arena, 0, _record_bytes(subject), slots)
        self._reader = DiskReader(subject.io_depth)
        self._free = list(range(slots))
        self._draw = random.Random(1)

    def __enter__(self) -> _Disk:
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

    def beside(self, work: _Work, call_s: float) -> tuple[Measured, Measured]:
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


def _difference(found: list[float]) -> Measured:
    """The median of differences between two times, which noise may make negative."""
    ordered = sorted(max(0.0, s) for s in found) or [0.0]
    quarter = len(ordered) // 4
    middle = max(0.0, statistics.median(found or [0.0]))
    return Measured(middle, min(middle, ordered[quarter]), max(middle, ordered[-1 - quarter]), len(ordered))


def _record_bytes(subject: Subject) -> int:
    spec = subject.layers[0].spec
    most = max(subject.source.record(spec.index, e).buffer_bytes for e in range(spec.num_experts))
    return -(-most // BLOCK_BYTES) * BLOCK_BYTES
