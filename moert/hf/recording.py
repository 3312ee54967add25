"""`moert.record`: hooks that note which experts a model's tokens choose, while it runs as always."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moert.errors import MoertError, UnsupportedModelError
from moert.hf.forwards import Forward, ForwardWatch, Rows, real_tokens
from moert.hf.recorded_model import experts_of, layers_of
from moert.hf.recorded_passes import EvenCalls, Pending, Step, copied
from moert.hf.recorded_sequences import RecordedSequences
from moert.hf.scores import ScoreTap
from moert.hf.trace_sinks import FileSink, MemorySink, Sink
from moert.trace.trace import Trace

HELD_NUMBERS = 1 << 20
"""So many ids, weights and scores are kept as tensors before they are put in order."""

HELD_FORWARDS = 256
"""And those of so many forward passes."""


class Recording:
    """The hooks of one `record`, and what they have noted so far."""

    def __init__(self, model: nn.Module, sink: Sink, *, scores: bool, weights: bool) -> None:
        """`sink` is given each sequence when it is over."""
        self._model = model
        self._modules = experts_of(model)
        self.sequences = RecordedSequences(model, layers_of(self._modules), sink, keep_weights=weights)
        path, experts = next(iter(self._modules.items()))
        holder, _, self._leaf = path.rpartition(".")
        self._holder, self._first = model.get_submodule(holder)._modules, experts.module
        self._pending: list[Pending] = []
        self._numbers = 0
        self._forward: Forward | None = None
        self._steps: list[Step] = []
        self._token_ids: torch.Tensor | None = None
        self._names: list[str] = []
        self._handles: list[Any] = []
        self._taps: list[ScoreTap] = []
        self._watch: ForwardWatch | None = None
        try:
            self._watch = ForwardWatch(model, self._begin_forward, self._end_forward)
            for path, (module, adapter, layer) in self._modules.items():
                tap = ScoreTap(model, path, adapter.num_experts + adapter.num_identity) if scores else None
                if tap is not None:
                    self._taps.append(tap)
                hook = self._make_hook(path, layer, tap)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks out. Idempotent."""
        if self._watch is not None:
            self._watch.remove()
        for tap in self._taps:
            tap.remove()
        while self._handles:
            self._handles.pop().remove()

    def name(self, names: list[str]) -> None:
        """The names of the sequences that begin next, row by row."""
        self._names = names

    def check(self) -> None:
        """Raise MoertError if the experts modules are others than when recording began."""
        for path, experts in self._modules.items():
            try:
                same = self._model.get_submodule(path) is experts.module
            except AttributeError:
                same = False
            if not same:
                raise MoertError(
                    f"{path} is another module than when recording began: patch or unpatch the model before or after "
                    "`with moert.record(...)`, not within"
                )

    def _make_hook(self, path: str, layer: int, tap: ScoreTap | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
            weights = args[2] if len(args) > 2 else kwargs["top_k_weights"]
            scores = None
            if tap is not None and len(ids):
                scores = tap.take(ids, weights)
                if scores is None:
                    raise UnsupportedModelError(
                        f"{type(self._model).__name__}: no module beside {path} puts out a score for each expert from "
                        "which the router's weights follow; record without scores"
                    )
            # Copied when the pass ends, all of them at once: that is much cheaper than one by one.
            step = Step(layer, ids, weights, scores, None if ids.is_inference() else ids._version)
            if self._forward is not None:
                self._steps.append(step)
            elif len(ids):
                self._hold(Pending(Rows(1, None), None, None, None, True, copied([step])))

        hook.only_looks = True  # type: ignore[attr-defined]  # see `MoeBlock.tell`
        return hook

    def _begin_forward(self, forward: Forward) -> None:
        if self._holder.get(self._leaf) is not self._first:
            self.check()
        self._forward, self._steps = forward, []
        if forward.is_new:
            forward.rows.names, self._names = self._names, []
        # Now, as the caller may write to it; what may be looked at later is.
        ids = forward.token_ids
        self._token_ids = None if ids is None else ids.detach().clone()

    def _end_forward(self, forward: Forward) -> None:
        steps, self._forward, self._steps = self._steps, None, []
        calls = copied(steps)
        if not calls:
            return
        decodes = forward.shape is not None and forward.shape[1] == 1
        self._hold(
            Pending(
                forward.rows,
                forward.shape,
                self._token_ids,
                None if decodes else real_tokens(forward),
                forward.is_new and not (decodes and forward.length),
                calls,
            )
        )

    def _hold(self, pending: Pending) -> None:
        self._pending.append(pending)
        calls = [pending.calls] if isinstance(pending.calls, EvenCalls) else pending.calls
        for call in calls:
            self._numbers += call.ids.numel() * 2 + (0 if call.scores is None else call.scores.numel())
        if self._numbers >= HELD_NUMBERS or len(self._pending) >= HELD_FORWARDS:
            self.flush()

    def flush(self) -> None:
        """Put what is held in order, and hand on the sequences that are over. Blocks until the device is done."""
        pending, self._pending, self._numbers = self._pending, [], 0
        self.sequences.add(pending)

    def finish(self) -> None:
        """Hand on everything."""
        self.flush()
        self.sequences.finish()


@contextmanager
def record(
    model: nn.Module, path: str | os.PathLike[str] | None, *, scores: bool, weights: bool
) -> Iterator[tuple[Trace, Recording]]:
    """See `moert.record`. The trace is filled in when the block ends, and stays empty if it is written to `path`."""
    sink = MemorySink() if path is None else FileSink(path, exact=scores)
    recording = Recording(model, sink, scores=scores, weights=weights)
    trace = Trace(recording.sequences.header())
    try:
        try:
            yield trace, recording
            recording.check()
        finally:
            recording.remove()
        recording.finish()
        sink.close(recording.sequences.header(), trace)
    finally:
        sink.discard()
