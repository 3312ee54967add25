"""What the measures and forecasts mean for whoever is to buy memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moert.config import format_bytes
from moert.suit.forecast import Forecast, enough_for, sweet_spot
from moert.suit.published import SRP_16, neighbours
from moert.suit.statistics import Consistency, Segments
from moert.trace import TraceHeader

TARGET = 0.9
"""The hit rate that the verdict also names a size for."""
LINKS = (("PCIe 4.0 x16", 25e9), ("NVMe", 7e9))
"""What experts come over, and its bytes per second at best."""
GOOD, POOR = 0.45, 0.25
"""How far the hit rate at the sweet spot lies above the share of experts that is held there: from the first on a model
suits offloading, below the second it hardly does. Where tokens choose at random it is 0, whatever the cache."""
SCH_RATIOS = (1, 2, 3)


def describe(
    header: TraceHeader, found: Consistency, sizes: Sequence[Forecast], policy: str, count: str
) -> dict[str, Any]:
    """Everything that was found, as plain values, and the verdict: sentences for whoever is to buy memory."""
    at_two = min(sizes, key=lambda one: (abs(one.ratio - 2), one.ratio))
    enough, best = enough_for(sizes, TARGET), sweet_spot(sizes)
    gain = best.hit_rate - best.share
    document: dict[str, Any] = {
        "model": header.model,
        "num_layers": len(header.layers),
        "num_experts": max(layer.num_experts for layer in header.layers),
        "top_k": max(layer.top_k for layer in header.layers),
        "sequences": found.num_sequences,
        "tokens": found.num_tokens,
        "reuse": found.reuse,
        "segments": [_segments(one, header.top_k) for one in found.segments],
        "policy": policy,
        "counted": count,
        "forecasts": [asdict(one) for one in sizes],
        "at_two": asdict(at_two),
        "sweet_spot": asdict(best),
        "enough": None if enough is None else asdict(enough),
        "suits": "well" if gain >= GOOD else "partly" if gain >= POOR else "hardly",
    }
    return {**document, "verdict": _verdict(document)}


def _segments(one: Segments, top_k: int) -> dict[str, Any]:
    sch = {str(ratio): one.sch[ratio * top_k - 1] for ratio in SCH_RATIOS if ratio * top_k <= len(one.sch)}
    return {
        "tokens": one.length,
        "windows": one.windows,
        "srp": one.srp.value,
        "srp_low": one.srp.low,
        "srp_high": one.srp.high,
        "size_ratio": one.size_ratio,
        "layer_srp": list(one.layer_srp),
        "sch": {ratio: asdict(estimate) for ratio, estimate in sch.items()},
    }


def _verdict(document: dict[str, Any]) -> list[str]:
    """What a user should know before buying hardware, sentence by sentence."""
    at_two, enough, policy = document["at_two"], document["enough"], document["policy"]
    slots = f"{at_two['slots']} of {document['num_experts']} in each layer"
    found = [
        (
            f"At {_times(at_two)} the experts that a token activates, {slots}, you will hit "
            f"{_percent(at_two['hit_rate'])} with {policy}; MIN, which knows the future, hits "
            f"{_percent(at_two['best_hit_rate'])}."
        )
    ]
    if at_two["nbytes"] is not None:
        share = _percent(at_two["share"])
        found.append(f"These slots take {format_bytes(at_two['nbytes'])} for all layers, {share} of all experts.")
    found.append(_fetches(at_two))
    best = document["sweet_spot"]
    if best["slots"] != at_two["slots"]:
        found.append(f"The most for its memory is {_size(best)}: {_percent(best['hit_rate'])}.")
    if enough is None or enough["slots"] >= document["num_experts"]:
        found.append(f"No cache smaller than the model hits {_percent(TARGET)} on this text.")
    elif enough["slots"] > at_two["slots"]:
        found.append(f"For {_percent(TARGET)} it takes {_size(enough)}.")
    consistency = _consistency(document)
    return [*found, consistency] if consistency else found


def _size(size: dict[str, Any]) -> str:
    nbytes = "" if size["nbytes"] is None else f", {format_bytes(size['nbytes'])}"
    return f"{_times(size)}, {size['slots']} experts in each layer{nbytes}"


def _times(size: dict[str, Any]) -> str:
    return f"{size['ratio']:.3g}x"


def _fetches(size: dict[str, Any]) -> str:
    nbytes = size["fetched_bytes_per_token"]
    text = f"A token then waits for {size['misses_per_token']:.1f} experts"
    if not nbytes:
        return f"{text}."
    limits = ", ".join(f"{_rounded(speed / nbytes)} from {name}" for name, speed in LINKS)
    return f"{text}, {format_bytes(nbytes)}, whatever computes: tokens a second are at most {limits}."


def _consistency(document: dict[str, Any]) -> str | None:
    """Where the model stands among those of the paper."""
    srp = next((one["srp"] for one in document["segments"] if one["tokens"] == 16), None)
    if srp is None:
        return None
    above, below = neighbours(srp)
    known = " and ".join(f"{name} ({_percent(SRP_16[name])})" for name in (above, below) if name is not None)
    place = "between" if above and below else "above" if below else "below"
    return f"Its routing is consistent to {_percent(srp)} over 16 tokens (SRP), {place} {known} as published."


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
