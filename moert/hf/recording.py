"""`moert.record`: hooks that note which experts a model's tokens choose, while it runs as always."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import nn

from moert.errors import ConfigError, MoertError, UnsupportedModelError
from moert.hf.adapters import ExpertsAdapter, find_experts
from moert.hf.experts import OffloadedExperts
from moert.hf.forwards import Forward, ForwardWatch, Rows, real_tokens
from moert.hf.layers import top_k_of
from moert.hf.model import offloaded_modules
from moert.hf.patching import sharing
from moert.hf.scores import ScoreTap
from moert.trace.recorder import Batch, Block, Call, EndOfText, align, split_passes, widened
from moert.trace.sequence import NO_EXPERT, LayerInfo, Phase, Sequence, TraceHeader
from moert.trace.trace import Trace
from moert.trace.writer import TraceWriter

HELD_NUMBERS = 1 << 20
"""So many ids, weights and scores are kept as tensors before they are put in order."""

HELD_FORWARDS = 256
"""And those of so many forward passes."""

_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config", "use_cache")


class _Experts(NamedTuple):
    """One experts module."""

    module: nn.Module
    adapter: ExpertsAdapter
    layer: int


class _Step(NamedTuple):
    """One call of an experts module, as it came."""

    layer: int
    ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor | None
    version: int | None
    """How often the ids had been written to; None: it is not counted."""


class _Even(NamedTuple):
    """The C calls of a forward pass, all with the same tokens and picks; copies."""

    layers: tuple[int, ...]
    ids: torch.Tensor
    """[C, T, K]"""
    weights: torch.Tensor
    scores: torch.Tensor | None
    """[C, T, E]"""


class _Pending(NamedTuple):
    """One forward pass, as tensors."""

    rows: Rows
    shape: tuple[int, int] | None
    token_ids: torch.Tensor | None
    real: torch.Tensor | None
    begins: bool
    """Whether the sequences begin with it."""
    calls: _Even | list[_Step]
    """Copies."""

    @property
    def n_tokens(self) -> int:
        return 0 if self.shape is None else self.shape[0] * self.shape[1]

    @property
    def key(self) -> object:
        """What passes of one token have in common that can be put in order together; None: with no other."""
        if self.begins or self.real is not None or self.shape is None or self.shape[1] != 1:
            return None
        if not isinstance(self.calls, _Even) or len(set(self.calls.layers)) < len(self.calls.layers):
            return None
        has_scores = self.calls.scores is not None
        return self.rows, self.calls.layers, self.calls.ids.shape, has_scores, self.token_ids is None


class Recording:
    """The hooks of one `record`, and what they have noted so far."""

    def __init__(self, model: nn.Module, sink: _Sink, *, scores: bool, weights: bool) -> None:
        """`sink` is given each sequence when it is over."""
        self._model = model
        self._sink = sink
        self._keep_weights = weights
        self._modules = _experts_of(model)
        self._layers = _layers_of(self._modules)
        path, experts = next(iter(self._modules.items()))
        holder, _, self._leaf = path.rpartition(".")
        self._holder, self._first = model.get_submodule(holder)._modules, experts.module
        self._widths = [0] * len(self._layers)
        self._batches: dict[Rows, Batch] = {}
        self._pending: list[_Pending] = []
        self._numbers = 0
        self._forward: Forward | None = None
        self._steps: list[_Step] = []
        self._token_ids: torch.Tensor | None = None
        self._next_step = 0
        self._names: list[str] = []
        self._decoded = self._given = False
        self._warned = False
        self.end = _end_of_text(model)
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
            step = _Step(layer, ids, weights, scores, None if ids.is_inference() else ids._version)
            if self._forward is not None:
                self._steps.append(step)
            elif len(ids):
                self._hold(_Pending(Rows(1, None), None, None, None, True, _copy([step])))

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
        calls = _copy(steps)
        if not calls:
            return
        decodes = forward.shape is not None and forward.shape[1] == 1
        self._hold(
            _Pending(
                forward.rows,
                forward.shape,
                self._token_ids,
                None if decodes else real_tokens(forward),
                forward.is_new and not (decodes and forward.length),
                calls,
            )
        )

    def _hold(self, pending: _Pending) -> None:
        self._pending.append(pending)
        calls = [pending.calls] if isinstance(pending.calls, _Even) else pending.calls
        for call in calls:
            self._numbers += call.ids.numel() * 2 + (0 if call.scores is None else call.scores.numel())
        if self._numbers >= HELD_NUMBERS or len(self._pending) >= HELD_FORWARDS:
            self.flush()

    def flush(self) -> None:
        """Put what is held in order, and hand on the sequences that are over. Blocks until the device is done."""
        pending, self._pending, self._numbers = self._pending, [], 0
        for run in _runs(pending):
            calls = [one.calls for one in run if isinstance(one.calls, _Even)]
            if calls and calls[0].ids.shape[1] == run[0].n_tokens:
                self._put_even(run, calls)
            else:
                self._put_uneven(run[0])
        for rows in [rows for rows in self._batches if rows.is_over]:
            self._finish(rows)

    def _put_even(self, run: list[_Pending], calls: list[_Even]) -> None:
        assert run[0].shape is not None
        rows, columns = run[0].shape
        layers = list(calls[0].layers)

        def together(tensors: list[torch.Tensor]) -> npt.NDArray[Any]:
            """[C, T, n] of each pass -> [B, passes * S, C, n]"""
            flat = _to_numpy(torch.cat(tensors)).reshape(len(run), len(layers), rows, columns, -1)
            return flat.transpose(2, 0, 3, 1, 4).reshape(rows, len(run) * columns, len(layers), -1)

        scores = [one.scores for one in calls if one.scores is not None]
        self._add(
            run,
            layers,
            together([one.ids for one in calls]),
            together([one.weights for one in calls]),
            together(scores) if scores else None,
            run[0].shape,
        )

    def _put_uneven(self, one: _Pending) -> None:
        calls = [
            Call(step.layer, _to_numpy(step.ids), _to_numpy(step.weights), scores)
            for step in _apart(one.calls)
            for scores in [None if step.scores is None else _to_numpy(step.scores)]
        ]
        other = next((call for call in calls if len(call.ids) != one.n_tokens), None)
        if other is not None and one.shape is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._layers[other.layer].name} ran {len(other.ids)} tokens in a forward pass of {one.n_tokens}, "
                "and nothing says which; the trace has them as the first ones: its events are right, its tokens not",
                RuntimeWarning,
                stacklevel=2,
            )
        most = max(len(call.ids) for call in calls)
        shape = one.shape
        if shape is None or most > one.n_tokens:  # tokens that are not the text's own, say of an image
            one, shape = one._replace(rows=Rows(1, None), token_ids=None, real=None, begins=True), (1, most)
        layers = [call.layer for call in calls]
        self._add([one], layers, *align(calls, *shape), shape)

    def _add(
        self,
        run: list[_Pending],
        layers: list[int],
        ids: npt.NDArray[Any],
        weights: npt.NDArray[Any],
        scores: npt.NDArray[Any] | None,
        shape: tuple[int, int],
    ) -> None:
        first = run[0]
        token_ids = real = None
        if all(one.token_ids is not None for one in run):
            token_ids = _to_numpy(torch.cat([one.token_ids for one in run if one.token_ids is not None], dim=1))
        if first.real is not None:
            real = _to_numpy(first.real)
        for layer in layers:
            self._widths[layer] = max(self._widths[layer], ids.shape[-1])
        batch = self._batches.get(first.rows)
        if batch is None:
            batch = self._batches[first.rows] = Batch(first.rows.rows, names=first.rows.names)
        decodes = not first.begins and shape[1] == 1
        for part in split_passes(layers):
            steps = self._next_step + np.repeat(np.arange(len(run)), shape[1])
            self._next_step += len(run)
            batch.add(
                Block(
                    layers[part],
                    ids[:, :, part],
                    weights[:, :, part],
                    None if scores is None else scores[:, :, part],
                    steps.tolist(),
                    Phase.DECODE if decodes else Phase.PREFILL,
                    may_be_drafts=not first.begins,
                    token_ids=token_ids,
                    real=real,
                ),
                self._layers,
            )

    def _finish(self, rows: Rows) -> None:
        batch = self._batches.pop(rows)
        batch.took_back = rows.took_back
        header = self.header()
        top_k = header.top_k
        for sequence in batch.finish(top_k, self.end, keep_weights=self._keep_weights):
            decoded = bool((sequence.phases == Phase.DECODE).any())
            self._decoded |= decoded
            self._given |= not decoded
            self._sink.add(sequence, header)

    def header(self) -> TraceHeader:
        """Of the trace, with the picks per token as far as they have been seen."""
        config = getattr(self._model, "config", None)
        layers = tuple(
            replace(layer, top_k=min(width or layer.top_k, layer.num_experts))
            for layer, width in zip(self._layers, self._widths, strict=True)
        )
        return TraceHeader(
            layers,
            model=os.path.basename(str(getattr(config, "_name_or_path", "") or "").rstrip("/")),
            config_hash=config_hash(config),
            sampled=self._decoded if self._decoded != self._given else None,
        )

    def finish(self) -> None:
        """Hand on everything."""
        self.flush()
        for rows in list(self._batches):
            self._finish(rows)


@contextmanager
def record(
    model: nn.Module, path: str | os.PathLike[str] | None, *, scores: bool, weights: bool
) -> Iterator[tuple[Trace, Recording]]:
    """See `moert.record`. The trace is filled in when the block ends, and stays empty if it is written to `path`."""
    sink = _Memory() if path is None else _File(path, exact=scores)
    recording = Recording(model, sink, scores=scores, weights=weights)
    trace = Trace(recording.header())
    try:
        try:
            yield trace, recording
            recording.check()
        finally:
            recording.remove()
        recording.finish()
        sink.close(recording.header(), trace)
    finally:
        sink.discard()


class _Sink(Protocol):
    """Where sequences go."""

    def add(self, sequence: Sequence, header: TraceHeader) -> None:
        """One that is over; `header` as it is so far."""

    def close(self, header: TraceHeader, trace: Trace) -> None:
        """All are over."""

    def discard(self) -> None:
        """Leave nothing behind, unless it has been closed."""


class _Memory:
    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def add(self, sequence: Sequence, header: TraceHeader) -> None:
        self._sequences.append(sequence)

    def close(self, header: TraceHeader, trace: Trace) -> None:
        object.__setattr__(trace, "header", header)
        for sequence in sorted(self._sequences, key=lambda sequence: int(sequence.steps[0])):
            weights = sequence.weights
            trace.sequences.append(
                replace(
                    sequence,
                    experts=widened(sequence.experts, header.top_k, NO_EXPERT),
                    weights=None if weights is None else widened(weights, header.top_k, 0),
                )
            )

    def discard(self) -> None:
        self._sequences = []


class _File:
    def __init__(self, path: str | os.PathLike[str], *, exact: bool) -> None:
        self._path = path
        self._exact = exact
        self._writer: TraceWriter | None = None
        writable = Path(path).absolute()
        if writable.is_dir() or not writable.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: give the name of a file in a folder that exists")

    def _open(self, header: TraceHeader) -> TraceWriter:
        if self._writer is None:
            self._writer = TraceWriter(self._path, header, exact=self._exact)
        return self._writer

    def add(self, sequence: Sequence, header: TraceHeader) -> None:
        writer = self._open(header)
        if writer.header.layers != header.layers:
            raise MoertError("the model's experts were called with more picks a token than at first; record in memory")
        writer.add(sequence)

    def close(self, header: TraceHeader, trace: Trace) -> None:
        writer = self._open(header)
        writer.header = replace(header, layers=writer.header.layers)
        writer.close()
        object.__setattr__(trace, "header", writer.header)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.discard()


def _experts_of(model: nn.Module) -> dict[str, _Experts]:
    """Module path -> module, in module order, of a model that is patched or not."""
    offloaded = offloaded_modules(model)
    if offloaded:
        return {path: _Experts(module, module.adapter, module.layer) for path, module in offloaded.items()}
    adapters = find_experts(model)
    same_as = sharing(adapters)
    layers: dict[str, int] = {}
    for path in adapters:
        layers[path] = layers[same_as[path]] if path in same_as else len(set(layers.values()))
    return {path: _Experts(adapter.module, adapter, layers[path]) for path, adapter in adapters.items()}


def _layers_of(modules: Mapping[str, _Experts]) -> tuple[LayerInfo, ...]:
    layers: dict[int, LayerInfo] = {}
    for path, (module, adapter, layer) in modules.items():
        if layer in layers:
            continue
        if isinstance(module, OffloadedExperts) and module.runtime is not None:
            expert_bytes = module.runtime.layers[layer].spec.expert_bytes
        else:
            expert_bytes = sum(spec.nbytes for spec in adapter.specs)
        top_k = top_k_of(adapter)
        layers[layer] = LayerInfo(path, adapter.num_experts, top_k, top_k if top_k > 1 else None, expert_bytes)
    return tuple(layers[layer] for layer in sorted(layers))


def _runs(pending: list[_Pending]) -> Iterator[list[_Pending]]:
    """Forward passes of one token that are alike, together; all others each for itself."""
    run: list[_Pending] = []
    key: object = None
    for one in pending:
        own = one.key
        if run and (own is None or own != key):
            yield run
            run = []
        run.append(one)
        key = own
        if own is None:
            yield run
            run = []
    if run:
        yield run


def _copy(steps: list[_Step]) -> _Even | list[_Step]:
    """Copies of what the model may write to again.

    Raises:
        MoertError: it has done so already.
    """
    for step in steps:
        if step.version is not None and step.version != step.ids._version:
            raise MoertError(
                "the model wrote into a layer's expert ids after its experts had been called with them: it cannot be "
                "recorded"
            )
    if not steps or not len(steps[0].ids):
        steps = [step for step in steps if len(step.ids)]
    if not steps:
        return []
    with torch.no_grad():
        try:
            scores = [step.scores for step in steps if step.scores is not None]
            return _Even(
                tuple([step.layer for step in steps]),
                torch.stack([step.ids for step in steps]),
                torch.stack([step.weights for step in steps]),
                torch.stack(scores) if scores else None,
            )
        except RuntimeError:  # of different shapes, or on different devices
            kept = [step for step in steps if len(step.ids)]
            return [step._replace(ids=step.ids.clone(), weights=step.weights.clone()) for step in kept]


def _apart(calls: _Even | list[_Step]) -> list[_Step]:
    if not isinstance(calls, _Even):
        return calls
    scores = [None] * len(calls.layers) if calls.scores is None else list(calls.scores)
    each = zip(calls.layers, calls.ids, calls.weights, scores, strict=True)
    return [_Step(layer, ids, weights, found, None) for layer, ids, weights, found in each]


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _end_of_text(model: nn.Module) -> EndOfText:
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    end_ids = frozenset([ends] if isinstance(ends, int) else ends or ())
    # generate pads with the first end where no padding is configured.
    pad_id = pad if isinstance(pad, int) else next(iter([ends] if isinstance(ends, int) else ends or ()), None)
    return EndOfText(end_ids, pad_id)


def config_hash(config: Any) -> str:
    """Of a model's configuration, but for what says nothing of its routing; empty if there is none."""
    if not hasattr(config, "to_dict"):
        return ""
    return xxhash.xxh3_128(json.dumps(_lasting(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(name): _lasting(item)
            for name, item in value.items()
            if name not in _VOLATILE and not str(name).startswith("_attn")
        }
    return [_lasting(item) for item in value] if isinstance(value, (list, tuple)) else value
