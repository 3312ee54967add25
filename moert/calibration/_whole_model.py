"""Prompts and tokens of the whole model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

import torch

from moert.calibration._solving import root, solve
from moert.calibration._work import Work
from moert.calibration.result import Calibration, Shape
from moert.calibration.sampling import Measured, sampled, sampled_together
from moert.calibration.subject import Ids, Subject
from moert.schedule import Costs, Curve, Item, Place, make_scheduler, makespan
from moert.types import ExpertId

READ_TOKENS = 128
"""Of a prompt that most of its experts have to be read for."""
PROMPT_TOKENS = 64
MORE_TOKENS = 16
"""Of a text that is continued to see what a token takes."""


class Reads(NamedTuple):
    """Those of `Calibration`."""

    read_step: Measured
    read_start: Measured
    miss: Measured
    miss_start: Measured


class Tokens(NamedTuple):
    """One more token of the running model; seconds."""

    whole: Measured
    """With all experts there."""
    waits: Mapping[int, Measured]
    """By how many each of its layers misses, none left out: how much longer a layer's step takes."""
    disk: Mapping[int, Measured]
    """For how much of a step the disk is at work."""


class WholeModel:
    """The whole model, with experts that are chosen so that as many are missing as wanted."""

    def __init__(self, subject: Subject, shape: Shape, work: Work, call_s: float, expert: Curve, step: Curve) -> None:
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

    def tokens(self) -> Tokens:
        """Tokens with no expert missing, with one in each layer, and with as many as a token can have.

        They take turns, and what a miss costs is by how much two of the same turn differ: a machine that is slower for
        some seconds is so for both.
        """
        shape = self._shape
        most = min(shape.top_k, *(shape.num_experts - len(r) for r in self._resident.values()))
        counts = sorted({0, min(1, most), most})
        layers = len(self._layers)

        def turn() -> dict[tuple[str, int], float]:
            taken = {n: self._token_s(n) for n in counts}
            whole_s = taken[0][0]
            seconds = {("whole", 0): whole_s}
            for n in counts[1:]:
                seconds["wait", n] = max(0.0, taken[n][0] - whole_s) / layers
                seconds["disk", n] = taken[n][1] / layers
            return seconds

        found = sampled_together(turn)
        waits, disk = ({n: found[what, n] for n in counts[1:]} for what in ("wait", "disk"))
        return Tokens(found["whole", 0], waits, disk)

    def _token_s(self, misses: int) -> tuple[float, float]:
        """What one more token takes, and for how much of it the disk is at work."""

        def ids(layer: int, tokens: int, k: int) -> torch.Tensor:
            # The prompt's step may choose what it likes, but for a layer whose residents have changed.
            return self._some(layer, misses if tokens == 1 else 0, k).expand(tokens, k)

        before_s = self._subject.disk_s()
        _, seconds = self._generate_s(PROMPT_TOKENS, 1 + MORE_TOKENS, ids)
        disk_s = self._subject.disk_s() - before_s
        return seconds / MORE_TOKENS, disk_s / MORE_TOKENS

    def _generate_s(self, prompt: int, new_tokens: int, ids: Ids) -> tuple[float, float]:
        """`Subject.generate` of a prompt of several tokens, less what it takes to choose their experts."""
        first_s = later_s = 0.0

        def timed(layer: int, tokens: int, k: int) -> torch.Tensor:
            nonlocal first_s, later_s
            begin = perf_counter()
            chosen = ids(layer, tokens, k)
            if tokens > 1:
                first_s += perf_counter() - begin
            else:
                later_s += perf_counter() - begin
            return chosen

        first, later = self._subject.generate(prompt, new_tokens, timed)
        return max(0.0, first - first_s), max(0.0, later - later_s)

    def besides(self, whole: Measured) -> Measured:
        """What of a token without misses is besides experts and steps."""
        known = len(self._layers) * self._layer_s()
        low, seconds, high = (max(0.0, s - known) for s in (whole.low, whole.seconds, whole.high))
        return Measured(seconds, low, high, whole.repeats, whole.is_steady)

    def reads(self, costs: Costs, tokens: Tokens) -> Reads:
        """What records take that a step waits for.

        Found as the numbers with which the costs say of steps with one miss, and of steps with as many as a token can
        have, what these took in the running model, and for how much of that the disk was at work.
        """
        if not tokens.waits:
            return Reads(Measured.exactly(costs.read_s), *[Measured.exactly(0.0)] * 3)
        found = []
        for pick in ("low", "seconds", "high"):
            wait_s, disk_s = ({n: getattr(s, pick) for n, s in each.items()} for each in (tokens.waits, tokens.disk))
            found.append(solve(costs, self._shape.top_k, wait_s, disk_s))
        steady = all(one.is_steady for each in (tokens.waits, tokens.disk) for one in each.values())
        repeats = sum(wait.repeats for wait in tokens.waits.values())

        def joined(place: int) -> Measured:
            ends = [one[place] for one in found]
            return Measured(found[1][place], min(ends), max(ends), repeats, steady)

        return Reads(*map(joined, range(4)))

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
            seconds, _ = self._generate_s(tokens, 1, ids)
            other_s = found.dense_s(tokens) + found.steps_s(tokens)

            def predicted(read_s: float) -> float:
                given = replace(costs, read_many_s=read_s)
                plans = [(make_scheduler("cpu_all").plan(items, given), room) for items, room in events]
                return other_s + sum(makespan(plan, given, room).makespan_s for plan, room in plans)

            return root(lambda s: predicted(s) - seconds, costs.read_s / 8, 8 * costs.read_s)

        return sampled(sample)

    def _some(self, layer: int, misses: int, k: int) -> torch.Tensor:
        resident = self._work.residents(self._layers[layer])
        missing = sorted(set(range(self._shape.num_experts)).difference(resident))
        return torch.tensor([self._draw.sample(resident, k - misses) + self._draw.sample(missing, misses)])
