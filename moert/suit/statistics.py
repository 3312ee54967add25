"""Local routing consistency: how alike the experts of neighbouring tokens are.

The measures are those of "Not All Models Suit Expert Offloading" (Liang et al., 2025, arXiv 2505.16056).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moert.suit._scans import Counts, segment_cache_hits, window_histogram
from moert.trace.reuse import Reuse
from moert.trace.sequence import Phase, Sequence, TraceHeader

Values = npt.NDArray[np.float64]

LENGTHS = (4, 16, 64, 256)
"""The windows of the paper, in tokens."""

CONFIDENCE = 0.95
_RESAMPLES_AT_ONCE = 50


@dataclass(frozen=True)
class Estimate:
    """A value over all sequences, and its basic bootstrap interval over them; none with fewer than two sequences."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Segments:
    """What windows of one length say of a model."""

    length: int
    """In tokens."""
    windows: int
    """How many there are, over all sequences; each is looked at in every layer."""
    srp: Estimate
    """Segment routing best performance, 0 to 1: how well one set of experts, the same over a whole window, foretells
    the window's activations (F1), if the set is "every expert with at least t activations there" and t the best."""
    size_ratio: float
    """The experts of those sets, per activated one; how many times the picks of a token a cache should hold."""
    layer_srp: tuple[float, ...]
    """Of each layer, each with a threshold of its own."""
    sch: tuple[Estimate, ...]
    """Segment cache best hit rate at 1, 2, ... slots a layer: of a cache that knows the next `length` tokens, the
    present one included, and takes experts in for nothing while there is room."""


@dataclass(frozen=True)
class Consistency:
    """Local routing consistency of a model over a trace."""

    num_sequences: int
    num_tokens: int
    """Without padding."""
    activations: int
    """Picks, over all layers."""
    decoded_tokens: int
    """Those that the model had generated before, as far as the trace says."""
    reuse: float | None
    """The share of a token's experts that the token before had chosen too; None without such a pair."""
    segments: tuple[Segments, ...]
    """By window length, without those that no sequence fills."""


class ConsistencyMeter:
    """Takes a trace sequence by sequence; keeps a few numbers of each, not its tokens."""

    def __init__(self, header: TraceHeader, lengths: SequenceOf[int] = LENGTHS) -> None:
        self._header = header
        self._lengths = tuple(lengths)
        self._max_experts = max(layer.num_experts for layer in header.layers)
        self._tokens: list[int] = []
        self._decoded = 0
        self._activations: list[int] = []
        self._reuse = Reuse(len(header.layers))
        self._of_sequence: dict[int, list[Counts]] = {length: [] for length in self._lengths}
        self._of_layer = {length: np.zeros((len(header.layers), length + 1), np.int64) for length in self._lengths}
        self._hits: dict[int, list[Counts]] = {length: [] for length in self._lengths}

    def add(self, sequence: Sequence) -> None:
        """Count a sequence; padding is left out. Blocks for about O(tokens x picks x experts)."""
        experts = np.ascontiguousarray(sequence.experts[sequence.phases != Phase.PADDING].transpose(1, 0, 2))
        self._tokens.append(experts.shape[1])
        self._decoded += int((sequence.phases == Phase.DECODE).sum())
        self._activations.append(int((experts >= 0).sum()))
        self._reuse.add(sequence)
        for length in self._lengths:
            histogram = np.zeros((len(self._header.layers), length + 1), np.int64)
            hits = np.zeros((len(self._header.layers), self._max_experts), np.int64)
            for layer, info in enumerate(self._header.layers):
                window_histogram(experts[layer], info.num_experts, length, histogram[layer])
                segment_cache_hits(experts[layer], info.num_experts, length, hits[layer])
            self._of_layer[length] += histogram
            self._of_sequence[length].append(histogram.sum(axis=0))
            self._hits[length].append(hits.sum(axis=0).cumsum())

    def result(self, *, resamples: int = 1000, seed: int = 0) -> Consistency:
        """The measures over all sequences so far.

        Args:
            resamples: of the bootstrap, which draws sequences with replacement.
            seed: makes it repeatable.
        """
        resampled = _Bootstrap(len(self._tokens), resamples, seed)
        return Consistency(
            num_sequences=len(self._tokens),
            num_tokens=sum(self._tokens),
            decoded_tokens=self._decoded,
            activations=sum(self._activations),
            reuse=self._reuse.mean,
            segments=tuple(
                self._segments(length, resampled)
                for length in self._lengths
                if any(tokens >= length for tokens in self._tokens)
            ),
        )

    def _segments(self, length: int, resampled: _Bootstrap) -> Segments:
        histograms = np.stack(self._of_sequence[length])
        srp, size_ratio = _best_f1(histograms.sum(axis=0))
        low, high = resampled.interval(srp, [histograms], lambda sums: _best_f1(sums)[0])
        hits, activations = np.stack(self._hits[length]), np.array(self._activations)
        rates = hits.sum(axis=0) / max(1, activations.sum())
        lows, highs = resampled.interval(
            rates, [hits, activations[:, None]], lambda served, asked: served / np.maximum(1, asked)
        )
        return Segments(
            length=length,
            windows=sum(max(0, tokens - length + 1) for tokens in self._tokens),
            srp=_estimate(float(srp), float(low), float(high)),
            size_ratio=float(size_ratio),
            layer_srp=tuple(_best_f1(self._of_layer[length])[0].tolist()),
            sch=tuple(_estimate(*row) for row in zip(rates, lows, highs, strict=True)),
        )


def _best_f1(histogram: Counts) -> tuple[Values, Values]:
    """SRP and its size ratio, each [...], from how often each count occurs in a window, [..., length + 1]."""
    counts = np.arange(histogram.shape[-1])
    matches = _sums_from(histogram * counts)
    predicted = _sums_from(histogram) * counts[-1]
    activated = matches[..., :1]
    f1 = 2 * matches / np.maximum(1, predicted + activated)
    best = f1.argmax(axis=-1)[..., None]
    ratio = np.take_along_axis(predicted, best, axis=-1) / np.maximum(1, activated)
    return np.take_along_axis(f1, best, axis=-1)[..., 0], ratio[..., 0]


def _sums_from(values: Counts) -> Counts:
    """[..., t]: the sum of values[..., t:]."""
    sums: Counts = values[..., ::-1].cumsum(axis=-1)[..., ::-1]
    return sums


class _Bootstrap:
    """Intervals from draws of sequences with replacement, the same draws for each value that is asked about."""

    def __init__(self, num_sequences: int, resamples: int, seed: int) -> None:
        self._num_sequences = num_sequences
        self._resamples = resamples if num_sequences > 1 else 0
        self._seed = seed

    def interval(
        self, value: Values, parts: SequenceOf[Counts], statistic: Callable[..., Values]
    ) -> tuple[Values, Values]:
        """The basic interval of a value: low and high, of its shape; NaN where there is nothing to draw from.

        Args:
            value: [...], as all sequences give it.
            parts: what each sequence adds, [sequences, ...].
            statistic: takes the sums of each part over a draw, [draws, ...], and gives values of [draws, ...].
        """
        if not self._resamples:
            return np.full_like(value, np.nan), np.full_like(value, np.nan)
        rng = np.random.default_rng(self._seed)
        chances = np.full(self._num_sequences, 1 / self._num_sequences)
        drawn = []
        for first in range(0, self._resamples, _RESAMPLES_AT_ONCE):
            count = min(_RESAMPLES_AT_ONCE, self._resamples - first)
            draws = rng.multinomial(self._num_sequences, chances, size=count)
            drawn.append(statistic(*(draws @ part for part in parts)))
        tail = (1 - CONFIDENCE) / 2
        lower, upper = np.quantile(np.concatenate(drawn), (tail, 1 - tail), axis=0)
        return 2 * value - upper, 2 * value - lower


def _estimate(value: float, low: float, high: float) -> Estimate:
    if np.isnan(low):
        return Estimate(float(value))
    return Estimate(float(value), max(0.0, float(low)), min(1.0, float(high)))
