"""The routing that a plan expects: that of usual models, or of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moert.errors import ConfigError

if TYPE_CHECKING:
    from moert.planning.forecast import HitCurve, Prompts
    from moert.planning.model import ModelNeeds
    from moert.trace import TraceLike

_POINTS = 16
"""Of the curves that a trace gives."""


class Routing(NamedTuple):
    """What is expected of tokens to come."""

    hits: HitCurve
    """While decoding."""
    prompts: Prompts | None
    """Of prompts; None: routing without any preference."""
    source: str
    """Where it is from, in words."""


def read_routing(trace: Path | None, needs: ModelNeeds) -> Routing:
    """What `trace` says; None: what is usual.

    Raises:
        ConfigError: it is of a model with other layers or experts than `needs`.
        MoertError: what opening it raises.
    """
    from moert.planning.forecast import typical_hits

    if trace is None:
        text = "the median of 15 traces of trained models; models differ by 15 points each way"
        return Routing(typical_hits, None, text)
    from moert.cli.traces import open_trace
    from moert.simulate import simulate

    experts = max(need.num_experts for need in needs.layers)
    slots = sorted({round(experts * part / _POINTS) for part in range(1, _POINTS + 1)} - {0})
    with ExitStack() as stack:
        opened = open_trace(stack, trace, experts)
        _check_shape(trace, opened, needs)
        decode = [(0.0, 0.0), *((n / experts, simulate(opened, "ema", n).hit_rate) for n in slots)]
        prompts = _prompts(opened, slots, experts)
    return Routing(_curve(decode), prompts, str(trace))


def _check_shape(path: Path, trace: TraceLike, needs: ModelNeeds) -> None:
    traced, layers = trace.header.layers, needs.layers
    ours = f"trace {str(path)!r} is of another model: it has"
    if len(traced) != len(layers):
        raise ConfigError(
            f"{ours} {len(traced)} layers of experts, and {needs.name} has {len(layers)}; give a trace of {needs.name}"
        )
    for theirs, need in zip(traced, layers, strict=True):
        if theirs.num_experts != need.num_experts:
            raise ConfigError(
                f"{ours} {theirs.num_experts} experts in {theirs.name}, and {needs.name} has {need.num_experts} in "
                f"{need.name}; give a trace of {needs.name}"
            )


def _prompts(opened: Any, slots: Sequence[int], experts: int) -> Prompts | None:
    """Of the prompts in a trace; None where it has none."""
    import numpy as np

    from moert.planning.forecast import Prompts
    from moert.simulate import simulate
    from moert.trace import Phase, Trace

    sequences = list(opened)
    lengths, used = [], []
    for sequence in sequences:
        ids = sequence.experts[sequence.phases == Phase.PREFILL]
        if len(ids) > 1:
            lengths.append(len(ids))
            used += [len(np.unique(layer[layer >= 0])) / experts for layer in ids.transpose(1, 0, 2)]
    if not lengths:
        return None
    # Once more after itself: what the first prompt finds says nothing of the ones to come.
    after = 1 + max(int(sequence.steps.max()) for sequence in sequences)
    again = [replace(sequence, steps=sequence.steps + after) for sequence in sequences]
    twice = Trace(opened.header, [*sequences, *again])
    points = [(0.0, 0.0)]
    for n in slots:
        hits = accesses = 0
        for trace, sign in ((twice, 1), (Trace(opened.header, sequences), -1)):
            both, decode = (simulate(trace, "ema", n, count=count) for count in ("all", "decode"))
            hits += sign * (both.hits - decode.hits)
            accesses += sign * (both.accesses - decode.accesses)
        points.append((n / experts, hits / accesses))
    return Prompts(round(float(np.median(lengths))), float(np.mean(used)), _curve(points))


def _curve(points: Sequence[tuple[float, float]]) -> HitCurve:
    def hits(share: float) -> float:
        (x0, y0), (x1, y1) = next(
            (pair for pair in pairwise(points) if pair[1][0] >= share - 1e-9), (points[-2], points[-1])
        )
        return y0 + (y1 - y0) * (min(share, x1) - x0) / (x1 - x0)

    return hits
