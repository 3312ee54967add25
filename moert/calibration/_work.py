"""Experts that are in memory, and the runtime's step around them."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator
from functools import partial
from time import perf_counter

import torch

from moert.calibration.result import Shape, as_curve
from moert.calibration.sampling import Measured, sampled
from moert.calibration.subject import Subject
from moert.kernels.cpu_ffn import Expert
from moert.runtime.layer import LayerCache
from moert.types import ExpertId

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SAMPLE_S = 0.01
"""A sample of what is shorter is of several."""
LONG_S = 0.3
"""No more tokens are tried once a sample takes so long; the curve goes on as it was."""


class Work:
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
        # Where the machine was busy the one may have taken longer than all: then neither is nothing.
        call = Measured.exactly(min(start, one.seconds / 2, whole.seconds / 2))
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


def _difference(found: list[float]) -> Measured:
    """The median of differences between two times, which noise may make negative."""
    ordered = sorted(max(0.0, s) for s in found) or [0.0]
    quarter = len(ordered) // 4
    middle = max(0.0, statistics.median(found or [0.0]))
    return Measured(middle, min(middle, ordered[quarter]), max(middle, ordered[-1 - quarter]), len(ordered))
