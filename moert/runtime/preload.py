"""Filling the slots before the first step, with several reads in flight."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence

from moert.errors import MoertError
from moert.runtime.layer import Fetch, LayerCache
from moert.types import ExpertId

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as experts arrive."""


def preload(layers: Sequence[LayerCache], reads_in_flight: int, progress: Progress | None = None) -> None:
    """Make each layer's first experts resident, as many as it has slots. Blocks until done.

    Raises:
        CorruptFileError, TransferError: an expert could not be read; no read is under way any more.
    """
    total = sum(layer.residency.capacity * layer.spec.expert_bytes for layer in layers)
    done = 0
    started: deque[tuple[LayerCache, ExpertId, Fetch]] = deque()

    def take_over() -> None:
        nonlocal done
        layer, expert, fetch = started.popleft()
        layer.arrive(expert, fetch)
        done += layer.spec.expert_bytes
        if progress is not None:
            progress(done, total)

    try:
        for layer in layers:
            experts = [ExpertId(layer.spec.index, expert) for expert in range(layer.residency.capacity)]
            layer.residency.begin(experts)
            for expert in experts:
                if len(started) == reads_in_flight:
                    take_over()
                fetch = layer.start(expert)
                assert fetch is not None, "as many buffers as reads in flight, and a slot for each expert"
                started.append((layer, expert, fetch))
        while started:
            take_over()
    finally:
        while started:
            layer, expert, fetch = started.popleft()
            fetch.handle.cancel()
            with contextlib.suppress(MoertError):
                layer.arrive(expert, fetch)
        for layer in layers:
            layer.residency.end()
