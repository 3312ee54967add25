"""The counts of a model's layers together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moert.runtime.layer import LayerCache
from moert.runtime.pace import Decoding, Sums
from moert.runtime.stats import Stats


def total(layers: Sequence[LayerCache], *, read_s: float, slot_bytes: int, shrinks: int, decoding: Decoding) -> Stats:
    """A snapshot of all layers' counts, and of what is counted for the model as a whole."""
    each = tuple(replace(layer.stats) for layer in layers)
    return Stats(
        hits=sum(one.hits for one in each),
        misses=sum(one.misses for one in each),
        bytes_read=sum(one.bytes_read for one in each),
        read_s=read_s,
        stall_s=sum(one.stall_s for one in each),
        compute_s=sum(one.compute_s for one in each),
        resident_bytes=sum(one.resident_bytes for one in each),
        expert_bytes=sum(layer.spec.num_experts * layer.spec.expert_bytes for layer in layers),
        slot_bytes=slot_bytes,
        shrinks=shrinks,
        device_steps=sum(one.device_steps for one in each),
        decoding=decoding,
        layers=each,
    )


def sums(layers: Sequence[LayerCache]) -> Sums:
    """Hits, misses, stall_s, compute_s and bytes_read of all layers so far."""
    stats = [layer.stats for layer in layers]
    return (
        sum(one.hits for one in stats),
        sum(one.misses for one in stats),
        sum(one.stall_s for one in stats),
        sum(one.compute_s for one in stats),
        sum(one.bytes_read for one in stats),
    )
