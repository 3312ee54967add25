"""From what experts modules were called with, forward pass by forward pass, to the sequences of a trace."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moert.trace.sequence import NO_EXPERT, LayerInfo, Phase, Sequence

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]


class Call(NamedTuple):
    """One call of a layer's experts with T tokens."""

    layer: int
    ids: Ints
    """[T, K]; some may name no expert."""
    weights: Floats
    """[T, K]"""
    scores: Floats | None = None
    """[T, E]"""


@dataclass(frozen=True)
class Block:
    """T tokens of each of B sequences, and the C layers that ran them, none of them twice."""

    layers: Seq[int]
    """[C]"""
    ids: Ints
    """[B, T, C, K]; some may name no expert."""
    weights: Floats
    """[B, T, C, K]"""
    scores: Floats | None
    """[B, T, C, E]"""
    steps: Seq[int]
    """[T]"""
    phase: Phase
    """Of tokens that are no padding."""
    may_be_drafts: bool = False
    """Whether it is of a forward pass of several tokens that is not the first: drafts, if tokens are taken back."""
    token_ids: Ints | None = None
    """[B, T]"""
    real: npt.NDArray[np.bool_] | None = None
    """[B, T]: what is no padding; None: all of it."""


@dataclass(frozen=True)
class EndOfText:
    """How a generation says that a sequence is over, as far as it is known."""

    end_ids: frozenset[int] = frozenset()
    pad_id: int | None = None


@dataclass
class Batch:
    """Sequences that go through the same forward passes, as they grow."""

    rows: int
    names: Seq[str] = ()
    """Of the sequences, row by row."""
    took_back: bool = False
    """Whether tokens were removed again."""
    _parts: list[_Part] = field(default_factory=list)

    def add(self, block: Block, layers: Seq[LayerInfo]) -> None:
        """What these sequences ran next; its arrays may be reused."""
        self._parts.append(_Part(*_picks(block, layers), _scores(block, layers), block))

    def finish(self, top_k: int, end: EndOfText, *, keep_weights: bool = True) -> list[Sequence]:
        """The sequences, row by row, with `top_k` places for a token's picks."""
        blocks = [part.block for part in self._parts]
        experts = np.concatenate([widened(part.experts, top_k, NO_EXPERT) for part in self._parts], axis=1)
        weights = None
        if keep_weights:
            weights = np.concatenate([widened(part.weights, top_k, 0) for part in self._parts], axis=1)
        scores = _together([part.scores for part in self._parts])
        steps = np.concatenate([np.asarray(block.steps, dtype=np.int64) for block in blocks])
        token_ids = _together([block.token_ids for block in blocks])
        phases = np.concatenate([self._phases(block) for block in blocks], axis=1)
        if token_ids is not None:
            phases[_after_the_end(token_ids, phases, end)] = Phase.PADDING
        return [
            Sequence(
                experts=experts[row],
                steps=steps,
                phases=phases[row],
                weights=None if weights is None else weights[row],
                scores=None if scores is None else scores[row],
                token_ids=None if token_ids is None else token_ids[row].astype(np.int64),
                name=self.names[row] if row < len(self.names) else "",
            )
            for row in range(self.rows)
        ]

    def _phases(self, block: Block) -> npt.NDArray[np.uint8]:
        phase = Phase.DECODE if self.took_back and block.may_be_drafts else block.phase
        phases = np.full((self.rows, len(block.steps)), phase, dtype=np.uint8)
        if block.real is not None:
            phases[~block.real] = Phase.PADDING
        return phases


class _Part(NamedTuple):
    experts: npt.NDArray[np.int32]
    """[B, T, L, K]"""
    weights: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32] | None
    """[B, T, L, E]"""
    block: Block


def split_passes(layers: Seq[int]) -> list[slice]:
    """The calls of one forward pass, cut before each layer that comes once more: its experts are another event."""
    begins = [0]
    seen: set[int] = set()
    for place, layer in enumerate(layers):
        if layer in seen:
            begins.append(place)
            seen.clear()
        seen.add(layer)
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(layers)], strict=True)]


def align(calls: Seq[Call], rows: int, columns: int) -> tuple[Ints, Floats, Floats | None]:
    """Ids and weights [B, T, C, K] and scores [B, T, C, E] of calls that differ in tokens or picks.

    A layer that did not run all tokens is taken to have run the first ones.
    """
    n, width = rows * columns, max(call.ids.shape[1] for call in calls)
    ids = np.full((n, len(calls), width), NO_EXPERT, dtype=np.int32)
    weights = np.zeros(ids.shape, dtype=np.float32)
    known = [call.scores for call in calls if call.scores is not None]
    scores = np.zeros((n, len(calls), max(found.shape[1] for found in known)), np.float32) if known else None
    for place, call in enumerate(calls):
        tokens, k = call.ids.shape
        ids[:tokens, place, :k] = call.ids
        weights[:tokens, place, :k] = call.weights
        if call.scores is not None and scores is not None:
            scores[:tokens, place, : call.scores.shape[1]] = call.scores
    shape = (rows, columns, len(calls), -1)
    return ids.reshape(shape), weights.reshape(shape), None if scores is None else scores.reshape(shape)


def widened(picks: npt.NDArray[Any], top_k: int, fill: int) -> npt.NDArray[Any]:
    """[..., K] with at least `top_k` places."""
    more = top_k - picks.shape[-1]
    return np.pad(picks, [(0, 0)] * (picks.ndim - 1) + [(0, more)], constant_values=fill) if more > 0 else picks


def _picks(block: Block, layers: Seq[LayerInfo]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """[B, T, L, K] ids and weights. What fetches nothing (no expert with weights, or weight 0) is left out."""
    rows, columns, _, width = block.ids.shape
    ids = np.full((rows, columns, len(layers), width), NO_EXPERT, dtype=np.int32)
    weights = np.zeros(ids.shape, dtype=np.float32)
    ids[:, :, list(block.layers)] = block.ids
    weights[:, :, list(block.layers)] = block.weights
    num_experts = np.array([layer.num_experts for layer in layers], dtype=np.int32)[:, None]
    counts = (ids >= 0) & (ids < num_experts) & (weights != 0)
    _merge_repeated(ids, weights, counts)
    if not counts.all():
        ids[~counts], weights[~counts] = NO_EXPERT, 0
    if (counts[..., 1:] & ~counts[..., :-1]).any():
        order = np.argsort(~counts, axis=-1, kind="stable")
        ids, weights = np.take_along_axis(ids, order, axis=-1), np.take_along_axis(weights, order, axis=-1)
    return ids, weights


def _scores(block: Block, layers: Seq[LayerInfo]) -> npt.NDArray[np.float32] | None:
    """[B, T, L, E]"""
    if block.scores is None:
        return None
    rows, columns, _, width = block.scores.shape
    num_experts = np.array([layer.num_experts for layer in layers])
    scores = np.zeros((rows, columns, len(layers), int(num_experts.max())), dtype=np.float32)
    kept = min(width, scores.shape[-1])
    scores[:, :, list(block.layers), :kept] = block.scores[..., :kept]
    scores[..., np.arange(scores.shape[-1]) >= num_experts[:, None]] = 0
    return scores


def _merge_repeated(
    ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32], counts: npt.NDArray[np.bool_]
) -> None:
    """An expert that a token has twice counts once, with both weights."""
    ordered = np.sort(ids, axis=-1)
    if not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NO_EXPERT)).any():
        return
    for later in range(1, ids.shape[-1]):
        for earlier in range(later):
            same = counts[..., later] & counts[..., earlier] & (ids[..., later] == ids[..., earlier])
            weights[..., earlier][same] += weights[..., later][same]
            counts[..., later][same] = False


def _after_the_end(token_ids: Ints, phases: npt.NDArray[np.uint8], end: EndOfText) -> npt.NDArray[np.bool_]:
    """[B, T]: tokens that only keep a row in the batch whose text has ended."""
    if end.pad_id is None or not end.end_ids:
        return np.zeros(token_ids.shape, dtype=np.bool_)
    decoded = phases == Phase.DECODE
    ends = decoded & np.isin(token_ids, list(end.end_ids))
    ended_before = (np.cumsum(ends, axis=1) - ends) > 0
    return decoded & ended_before & (token_ids == end.pad_id)


def _together(parts: Seq[npt.NDArray[Any] | None]) -> npt.NDArray[Any] | None:
    """Joined along the tokens; None if any is unknown."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known, axis=1) if len(known) == len(parts) else None
