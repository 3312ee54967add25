"""How the GPU benchmark takes time: replays of CUDA graphs between events, contenders in turns, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch

SAMPLE_S = 2e-3
"""At least this long is each sample, so that what replaying costs the host does not show."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Taken:
    """Seconds a call."""

    median: float
    least: float
    most: float
    how: str
    """ "graph"; "eager" where a graph cannot be captured, so that the host's time is in it; "interpreted" """

    @property
    def us(self) -> float:
        return 1e6 * self.median


def race(
    contenders: Mapping[str, Sequence[Call]],
    device: torch.device,
    rounds: int = 9,
    *,
    may_fail: Container[str] = (),
) -> dict[str, Taken]:
    """Time contenders in turns; each one's calls are one graph, and a sample is of all of them.

    Give the calls inputs of their own, so that together they read more than the caches hold: then each finds its
    weights in memory, as a model's layers do. Those of `may_fail` that cannot be run at all are not in the result; it
    is said why. Of any other contender that is an error: what is to be measured must not drop out unseen.
    """
    ready: dict[str, tuple[Call, str, int]] = {}
    for name, calls in contenders.items():
        try:
            run, how = _prepared(calls, device)
        except (RuntimeError, ValueError, NotImplementedError) as problem:
            if name not in may_fail:
                raise
            print(f"  {name} cannot run: {str(problem).splitlines()[0]}", flush=True)
            continue
        repeats = 1
        if device.type != "cpu":
            repeats = max(1, round(SAMPLE_S / max(_sample(run, 1, device), 1e-7)))
        ready[name] = run, how, repeats
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(1 if device.type == "cpu" else rounds):
        for name, (run, _, repeats) in ready.items():
            samples[name].append(_sample(run, repeats, device) / len(contenders[name]))
    return {
        name: Taken(statistics.median(taken), min(taken), max(taken), ready[name][1]) for name, taken in samples.items()
    }


def _prepared(calls: Sequence[Call], device: torch.device) -> tuple[Call, str]:
    def all_of_them() -> None:
        for call in calls:
            call()

    if device.type == "cpu":
        return all_of_them, "interpreted"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or allocated at first must not be captured
        all_of_them()
        all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_of_them()
    except RuntimeError as problem:
        torch.cuda.synchronize()
        print(f"  no graph: {str(problem).splitlines()[0]}", flush=True)
        return all_of_them, "eager"
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, "graph"


def _sample(run: Call, repeats: int, device: torch.device) -> float:
    """Seconds of one run."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def elapsed(work: Call, device: torch.device, repeats: int = 7) -> Taken:
    """Time work that is not one graph: several streams, or copies of the host."""
    is_dry = device.type == "cpu"
    if not is_dry:
        work()
    taken = [_sample(work, 1, device) for _ in range(1 if is_dry else repeats)]
    how = "interpreted" if is_dry else "eager"
    return Taken(statistics.median(taken), min(taken), max(taken), how)
