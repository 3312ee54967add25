"""From the forward passes that recording noted to the sequences of a trace, and to what its header says of them."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from moert.hf.forwards import Rows
from moert.hf.recorded_model import config_hash, end_of_text
from moert.hf.recorded_passes import EvenCalls, Pending, apart, runs, to_numpy
from moert.hf.trace_sinks import Sink
from moert.trace.recorder import Batch, Block, Call, align, split_passes
from moert.trace.sequence import LayerInfo, Phase, TraceHeader


class RecordedSequences:
    """The sequences of one recording, as they grow."""

    def __init__(self, model: nn.Module, layers: tuple[LayerInfo, ...], sink: Sink, *, keep_weights: bool) -> None:
        """`sink` is given each sequence when it is over."""
        self._model = model
        self._layers = layers
        self._sink = sink
        self._keep_weights = keep_weights
        self._widths = [0] * len(layers)
        self._batches: dict[Rows, Batch] = {}
        self._next_step = 0
        self._decoded = self._given = False
        self._warned = False
        self.end = end_of_text(model)
        """How the model's texts end; whoever pads them otherwise says so here."""

    def add(self, pending: list[Pending]) -> None:
        """What ran next; hands on the sequences that are over. Blocks until the device is done."""
        for run in runs(pending):
            calls = [one.calls for one in run if isinstance(one.calls, EvenCalls)]
            if calls and calls[0].ids.shape[1] == run[0].n_tokens:
                self._put_even(run, calls)
            else:
                self._put_uneven(run[0])
        for rows in [rows for rows in self._batches if rows.is_over]:
            self._finish(rows)

    def finish(self) -> None:
        """Hand on all sequences."""
        for rows in list(self._batches):
            self._finish(rows)

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

    def _put_even(self, run: list[Pending], calls: list[EvenCalls]) -> None:
        assert run[0].shape is not None
        rows, columns = run[0].shape
        layers = list(calls[0].layers)

        def together(tensors: list[torch.Tensor]) -> npt.NDArray[Any]:
            """[C, T, n] of each pass -> [B, passes * S, C, n]"""
            flat = to_numpy(torch.cat(tensors)).reshape(len(run), len(layers), rows, columns, -1)
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

    def _put_uneven(self, one: Pending) -> None:
        calls = [
            Call(step.layer, to_numpy(step.ids), to_numpy(step.weights), scores)
            for step in apart(one.calls)
            for scores in [None if step.scores is None else to_numpy(step.scores)]
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
        run: list[Pending],
        layers: list[int],
        ids: npt.NDArray[Any],
        weights: npt.NDArray[Any],
        scores: npt.NDArray[Any] | None,
        shape: tuple[int, int],
    ) -> None:
        first = run[0]
        token_ids = real = None
        if all(one.token_ids is not None for one in run):
            token_ids = to_numpy(torch.cat([one.token_ids for one in run if one.token_ids is not None], dim=1))
        if first.real is not None:
            real = to_numpy(first.real)
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
