"""Filling the slots before the first step, with several reads in flight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moert.runtime.layer import LayerCache
from moert.runtime.pipeline import Pipeline
from moert.types import ExpertId

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as experts arrive."""


def preload(layers: Sequence[LayerCache], pipeline: Pipeline, progress: Progress | None = None) -> None:
    """Make each layer's first experts resident, as many as it has slots. Blocks until done.

    Raises:
        CorruptFileError, TransferError: an expert could not be read; no read is under way any more.
    """
    size = {layer.spec.index: layer.spec.expert_bytes for layer in layers}
    total = sum(layer.residency.capacity * layer.spec.expert_bytes for layer in layers)
    done = 0
    for layer in layers:
        pipeline.demand(ExpertId(layer.spec.index, expert) for expert in range(layer.residency.capacity))
    try:
        while pipeline.busy:
            pipeline.pump()
            for expert in pipeline.wait():
                done += size[expert.layer]
                if progress is not None:
                    progress(done, total)
    except BaseException:
        pipeline.drain()
        raise
