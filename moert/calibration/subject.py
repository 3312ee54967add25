"""What is timed: a model that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moert.runtime.layer import LayerCache
from moert.runtime.records import RecordSource

Ids = Callable[[int, int, int], torch.Tensor]
"""(a layer's number, T, K) -> the experts that its tokens are to choose, [T, K]."""


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
    disk_s: Callable[[], float]
    """Seconds in which at least one record was being read, so far."""
    forward_tokens: Sequence[int]
    """Prompts that are tried."""
