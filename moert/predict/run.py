"""A predictor's worth on sequences that it has not seen."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError, MoertError
from moert.predict.driving import replay
from moert.predict.metrics import Row, Tally
from moert.predict.recorded import Recorded, Recording
from moert.predictors._choice import make_predictor, read_predictor
from moert.predictors.base import MOST_LAYERS, MOST_TOKENS, Need, Predictor

FIRST_TOKENS = 500
"""So many of a test are all asked about: there what is learned on the way shows."""
WINDOWS = (0, 20, 100, 500, 1000, 2000, 4000)
"""Tokens of the test where the windows of `Result.by_tokens` begin."""
ASKED_TOKENS = 2000


@dataclass(frozen=True)
class Horizons:
    """How far ahead is asked."""

    layers: tuple[int, ...] = (1, 2, 3)
    """After each layer, for the ones so many layers later in the same token."""
    tokens: tuple[int, ...] = (1, 2, 4, 8)
    """After each token, for all layers of the tokens so many later."""

    def __post_init__(self) -> None:
        for name, values, most in (("layers", self.layers, MOST_LAYERS), ("tokens", self.tokens, MOST_TOKENS)):
            if not all(1 <= value <= most for value in values):
                raise ConfigError(f"horizons of {values} {name}: each must be from 1 to {most}")
        if not self.layers and not self.tokens:
            raise ConfigError("there is no horizon to ask for")


@dataclass(frozen=True)
class Study:
    """What to train on, and what to test on."""

    tested: Recording
    test: Sequence[int]
    """Indices of its sequences."""
    trained: Recording | None = None
    """None: on nothing."""
    train: Sequence[int] = ()
    trained_on: str = "nothing"
    """In words."""

    def sequences(self) -> Iterable[Recorded]:
        """Those to train on."""
        return () if self.trained is None else (self.trained.sequences[index] for index in self.train)


@dataclass(frozen=True)
class Result:
    """How good one predictor was in one study."""

    predictor: str
    trace: str
    trained_on: str
    train_tokens: int
    test_tokens: int
    asked_tokens: int
    observe_us: float
    """Microseconds a layer in which the predictor was told what one token chose, and given its hidden state if it
    takes that."""
    rows: list[Row]
    by_tokens: list[tuple[int, int, float]] = field(default_factory=list)
    """Windows of the test: first token, tokens asked about, recall of k one layer ahead."""

    def row(self, layers: int = 0, tokens: int = 0) -> Row:
        """The row of a horizon.

        Raises:
            KeyError: it was not asked for.
        """
        for row in self.rows:
            if (row.ahead_layers, row.ahead_tokens) == (layers, tokens):
                return row
        raise KeyError((layers, tokens))


def evaluate(
    text: str,
    study: Study,
    horizons: Horizons | None = None,
    *,
    asked_tokens: int = ASKED_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Train the predictor that `text` names, and ask it on the test's sequences while it goes on learning. Blocks.

    Every token is a forward pass of its own. `Predictor.ahead` is set to what is asked for.

    Args:
        text: as `make_predictor` reads it.
        study: what to train on, and what to test on.
        horizons: how far ahead to ask; None: all.
        asked_tokens: about so many tokens of the test are asked about, evenly spread but for the first ones; the
            predictor is told of all.
        progress: called with (tokens done, tokens in all).

    Raises:
        ConfigError: what `make_predictor` raises, or a predictor of one's own that fails or breaks its contract.
    """
    horizons = horizons or Horizons()
    tested = study.tested
    kind, _ = read_predictor(text)
    predictor = make_predictor(text, tested.model, tested.at_hand, f"in {tested.name}")
    predictor.ahead = max((predictor.ahead, *horizons.layers))
    try:
        train_tokens = sum(len(one.sequence.steps) for one in study.sequences())
        test_tokens = sum(len(tested.sequences[index].sequence.steps) for index in study.test)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None and done % 64 == 0:
                progress(done, train_tokens + test_tokens)

        for recorded in study.sequences():
            replay(predictor, recorded, advance=advance)
        asking = _Asking(tested, horizons, kind.gives_probabilities, _asked(test_tokens, asked_tokens))
        for index in study.test:
            recorded = tested.sequences[index]
            asking.begin(recorded)
            replay(predictor, recorded, asking, advance=advance)
    except MoertError:
        raise
    except Exception as error:
        if ":" not in text:
            raise
        raise ConfigError(f"predictor {text!r} failed: {_why(error)}") from error
    finally:
        predictor.close()
    return Result(
        predictor=text,
        trace=tested.name,
        trained_on=study.trained_on,
        train_tokens=train_tokens,
        test_tokens=test_tokens,
        asked_tokens=asking.asked_tokens,
        observe_us=asking.observe_us,
        rows=asking.rows(),
        by_tokens=asking.by_tokens(),
    )


def _asked(tokens: int, most: int) -> npt.NDArray[np.bool_]:
    """[tokens] which are asked about."""
    asked = np.zeros(tokens, np.bool_)
    first = min(FIRST_TOKENS, most, tokens)
    asked[:first] = True
    rest = min(most - first, tokens - first)
    if rest > 0:
        asked[first + np.arange(rest) * (tokens - first) // rest] = True
    return asked


class _Asking:
    """The questions of a test, and how good the answers are."""

    def __init__(
        self, recording: Recording, horizons: Horizons, are_probabilities: bool, asked: npt.NDArray[np.bool_]
    ) -> None:
        model = recording.model
        self._sizes = np.array(model.num_experts)
        self._top_k = np.array(model.top_k)
        self._horizons = horizons
        has_residual = Need.HIDDEN in recording.at_hand
        self._keys = [(gap, 0) for gap in (([0] if has_residual else []) + list(horizons.layers))]
        self._keys += [(0, tokens) for tokens in horizons.tokens]
        self._tallies = {key: Tally(self._top_k, are_probabilities) for key in self._keys}
        shape = (len(self._sizes), int(self._sizes.max()))
        self._scores = {key: np.full(shape, -np.inf, np.float32) for key in self._keys}
        self._answered = {key: np.zeros(shape[0], np.bool_) for key in self._keys}
        self._asked = asked
        self._first = self._token = 0
        self._observe_ns = self._observed = 0
        self._hits: list[tuple[int, int, int]] = []
        self._truth: npt.NDArray[np.int32] = np.zeros((0, *shape), np.int32)

    def begin(self, recorded: Recorded) -> None:
        """The next sequence."""
        self._first += len(self._truth)
        sequence = recorded.sequence
        self._truth = sequence.experts[sequence.phases != 2]

    def begin_token(self, predictor: Predictor, token: int) -> None:
        for key in self._keys:
            self._answered[key][:] = False

    def entered(self, predictor: Predictor, token: int, layer: int) -> None:
        if self._is_asked(token):
            self._ask(predictor, (0, 0), layer)

    def observed(self, predictor: Predictor, token: int, layer: int, took_ns: int) -> None:
        self._observe_ns += took_ns
        self._observed += 1
        if self._is_asked(token):
            for gap in self._horizons.layers:
                if layer + gap < len(self._sizes):
                    self._ask(predictor, (gap, 0), layer + gap)

    def end_token(self, predictor: Predictor, token: int) -> None:
        if not self._is_asked(token):
            return
        for gap, tokens in self._keys:
            if tokens == 0 and self._answered[gap, 0].any():
                hits, picks = self._count((gap, 0), token, gap)
                if gap == 1:
                    self._hits.append((self._first + token, hits, picks))
            elif tokens == 0 and gap:
                self._count((gap, 0), token, gap)
            elif tokens and token + tokens < len(self._truth):
                for layer in range(len(self._sizes)):
                    self._ask(predictor, (0, tokens), layer)
                self._count((0, tokens), token + tokens, 0)

    @property
    def asked_tokens(self) -> int:
        """How many were asked about."""
        return int(self._asked.sum())

    @property
    def observe_us(self) -> float:
        """See `Result`."""
        return self._observe_ns / max(1, self._observed) / 1000

    def rows(self) -> list[Row]:
        """One for each horizon that came up."""
        return [tally.row(*key) for key, tally in self._tallies.items() if tally.cells]

    def by_tokens(self) -> list[tuple[int, int, float]]:
        """See `Result`."""
        found = []
        for begin, end in zip(WINDOWS, [*WINDOWS[1:], None], strict=True):
            within = [hit for hit in self._hits if hit[0] >= begin and (end is None or hit[0] < end)]
            picks = sum(picks for _, _, picks in within)
            if picks:
                found.append((begin, len(within), sum(hits for _, hits, _ in within) / picks))
        return found

    def _is_asked(self, token: int) -> bool:
        number = self._first + token
        return number < len(self._asked) and bool(self._asked[number])

    def _ask(self, predictor: Predictor, key: tuple[int, int], layer: int) -> None:
        began = perf_counter_ns()
        scores = predictor.scores(layer, key[1])
        tally = self._tallies[key]
        tally.ask_ns += perf_counter_ns() - began
        tally.asks += 1
        self._answered[key][layer] = scores is not None
        if scores is not None:
            size = self._sizes[layer]
            if scores.shape != (size,) or not np.isfinite(scores).all():
                raise ConfigError(
                    f"scores of layer {layer}, {horizon_name(*key)} ahead, must be {size} finite numbers, "
                    f"and are {np.array2string(np.asarray(scores), threshold=4)}; see moert.predictors.base.Predictor"
                )
            self._scores[key][layer, : len(scores)] = scores

    def _count(self, key: tuple[int, int], token: int, first_layer: int) -> tuple[int, int]:
        truth = self._truth[token, first_layer:]
        ran = np.flatnonzero(truth[:, 0] >= 0)
        layers = ran + first_layer
        if not len(layers):
            return 0, 0
        return self._tallies[key].add(layers, self._scores[key][layers], self._answered[key][layers], truth[ran])


def _why(error: Exception) -> str:
    """What went wrong, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def as_document(result: Result) -> list[dict[str, Any]]:
    """The rows of a result, each whole, for JSON."""
    shared = {
        "trace": result.trace,
        "trained_on": result.trained_on,
        "predictor": result.predictor,
        "train_tokens": result.train_tokens,
        "test_tokens": result.test_tokens,
        "asked_tokens": result.asked_tokens,
        "observe_us": result.observe_us,
    }
    rows = [{**shared, **row.as_dict()} for row in result.rows]
    for row in rows:
        if (row["ahead_layers"], row["ahead_tokens"]) == (1, 0):
            row["by_tokens"] = [
                {"first_token": first, "tokens": tokens, "recall": recall} for first, tokens, recall in result.by_tokens
            ]
    return rows


def horizon_name(layers: int, tokens: int) -> str:
    """`2 layers`, `1 token`; `block`: the layer whose block begins."""
    if tokens:
        return f"{tokens} token{'s' if tokens > 1 else ''}"
    return f"{layers} layer{'s' if layers > 1 else ''}" if layers else "block"
