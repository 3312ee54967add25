"""From a trace and its simulations to what a report shows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.config import format_bytes
from moert.report.study import CurveLine, LayerUse, Row, TraceStudy
from moert.simulate import Result
from moert.trace import Phase, TraceHeader, TraceLike

_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
_HEAT_COLUMNS = 8


def curve_shares(header: TraceHeader, asked: Sequence[float]) -> list[float]:
    """The capacities of a miss-ratio curve, ascending shares of all experts: round ones and those that were asked for.

    None is smaller than what one token needs in a layer, nor than one expert.
    """
    least = max(layer.top_k / layer.num_experts for layer in header.layers)
    found = {round(share, 6) for share in (*_SHARES, *asked) if least <= share <= 1}
    return sorted(found) or [1.0]


def share_of(capacity_experts: int, header: TraceHeader) -> float:
    """The share of a model's experts that a number of slots is, at most 1."""
    return min(1.0, capacity_experts / sum(layer.num_experts for layer in header.layers))


def facts(trace: TraceLike) -> list[tuple[str, str]]:
    """What a trace is, in words."""
    header = trace.header
    made = {True: "the model chose the tokens", False: "of a given text", None: ""}[header.sampled]
    found = [
        ("model", header.model or "unknown"),
        ("tokens", f"{trace.n_tokens:,} in {len(trace):,} sequence{'s' if len(trace) != 1 else ''}"),
        ("experts", _experts(header)),
        ("source", header.source + (f", {made}" if made else "")),
    ]
    reduced = {layer.native_top_k for layer in header.layers if layer.native_top_k not in (None, layer.top_k)}
    if reduced:
        found.append(
            ("caution", f"recorded with fewer experts a token than the model's own {max(filter(None, reduced))}")
        )
    return found


def _experts(header: TraceHeader) -> str:
    def one_or_range(values: list[int]) -> str:
        return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"

    layers = header.layers
    text = (
        f"{len(layers)} layers of {one_or_range([layer.num_experts for layer in layers])}, "
        f"{one_or_range([layer.top_k for layer in layers])} for each token"
    )
    if all(layer.expert_bytes for layer in layers):
        total = sum(layer.num_experts * layer.expert_bytes for layer in layers)
        text += f"; {format_bytes(total)} in all, {format_bytes(layers[0].expert_bytes)} each"
    return text


def layer_use(trace: TraceLike) -> list[npt.NDArray[np.float64]]:
    """For each layer, every expert's share of the picks, the most used first; padding is left out. Reads all of it."""
    counts = [np.zeros(layer.num_experts, np.int64) for layer in trace.header.layers]
    for sequence in trace:
        experts = sequence.experts[sequence.phases != Phase.PADDING]
        for layer, count in enumerate(counts):
            ids = experts[:, layer]
            count += np.bincount(ids[ids >= 0], minlength=len(count))
    return [np.sort(count)[::-1] / max(1, count.sum()) for count in counts]


def collect(
    trace: TraceLike,
    *,
    name: str,
    layer_names: Sequence[str],
    rows: Sequence[Row],
    results: Sequence[Result],
    curves: Sequence[Result],
    bounds: Sequence[str],
) -> TraceStudy:
    """Everything a report shows of one trace.

    Args:
        rows: of the table.
        results: what the rows were made from.
        curves: of each policy at each capacity of the curves.
        bounds: the policies that know the future.
    """
    header = trace.header
    policies = list(dict.fromkeys(result.policy for result in curves))
    lines = []
    for policy in policies:
        own = sorted((r for r in curves if r.policy == policy), key=lambda r: r.capacity_experts)
        shares = [share_of(r.capacity_experts, header) for r in own]
        lines.append(CurveLine(policy, shares, [1 - r.hit_rate for r in own], policy in bounds))
    live = [line for line in lines if not line.is_bound] or lines
    best = min(live, key=lambda line: sum(line.miss_ratio)).policy
    own = sorted((r for r in curves if r.policy == best), key=lambda r: r.capacity_experts)
    heat = [own[place] for place in sorted({round(x) for x in np.linspace(0, len(own) - 1, _HEAT_COLUMNS)})]
    rates = np.array([[_rate(h, a) for h, a in zip(r.layer_hits, r.layer_accesses, strict=True)] for r in heat], float)
    use = layer_use(trace)
    return TraceStudy(
        name=name,
        facts=facts(trace),
        rows=rows,
        curves=lines,
        compulsory=min(r.compulsory_misses / max(1, r.accesses) for r in results),
        marks=sorted({share_of(r.capacity_experts, header) for r in results}),
        heat_policy=best,
        heat_capacities=[f"{100 * share_of(r.capacity_experts, header):.3g} %" for r in heat],
        layers=[
            LayerUse(
                layer_names[place],
                layer.num_experts,
                use[place].tolist(),
                [None if np.isnan(rate) else float(rate) for rate in rates[:, place]],
            )
            for place, layer in enumerate(header.layers)
        ],
    )


def _rate(hits: Any, accesses: Any) -> float:
    return float(hits / accesses) if accesses else float("nan")
