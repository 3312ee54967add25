"""Predictors from anywhere: one that fails, answers nonsense or takes too long is done without, and tokens go on."""

from __future__ import annotations

import math
import os
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch

from moert.errors import MoertError
from moert.predictors._ahead import Chances, chances_ahead
from moert.predictors.base import Floats, Ints, Prediction, Predictor

R = TypeVar("R")

HANG_S = 1.0
"""A call that takes longer than this,"""
HANG_TIMES = 10
"""and so many times as long as the layer itself, hangs."""
FORGIVEN = 1
"""Calls that hang and are not minded: something may be compiled or read."""

PASSES = 32
"""So many passes in which it was asked are judged together, by their medians: a pause does not count."""
SLOW_S = 1e-3
"""What takes less than this a layer is not slow, however fast the layers of a small model are."""

ROUNDING = 1e-3
"""By so much a probability may be out of range."""


class _Fault(Exception):
    """An answer that is none."""


class PredictorGuard:
    """Calls a predictor, until it shows that it is better not called.

    It is switched off for good, with one `RuntimeWarning` that says why, when a call raises, when an answer is not what
    `Predictor` promises (ids or layers that there are not, an expert twice, ranks that do not match, scores that are
    not finite), when calls hang, or when its calls take longer than the layers themselves. A `MoertError` and what is
    no `Exception` pass. Whether a predictor that is fast enough gains anything is for `moert.trial` to find out.

    A call is not interrupted: one that never returns blocks.
    """

    def __init__(self, predictor: Predictor, sizes: Sequence[int], clock: Callable[[], float] = perf_counter) -> None:
        """Watches `predictor`, whose layers have `sizes` experts. Its `scores` are looked at whoever asks for them."""
        self.is_on = True
        """Whether the predictor is still called."""
        self._predictor = predictor
        self._sizes = sizes
        self._clock = clock
        self._last: float | None = None
        """When the latest layer began."""
        self._called_s = 0.0
        """In calls since then."""
        self._longest = (0.0, "")
        """Of those calls: seconds, and which it was."""
        self._hangs = 0
        self._pass = _Pass()
        self._passes: list[_Pass] = []
        scores = predictor.scores

        def checked_scores(layer: int, tokens: int = 0) -> Floats | None:
            return self._watched(f"scores of layer {layer}", lambda: self._check_scores(layer, scores(layer, tokens)))

        predictor.scores = checked_scores  # type: ignore[method-assign]

    def begin_layer(self, layer: int) -> None:
        """The experts of `layer` are needed now, which ends what belongs to the layer before. Of every layer's step."""
        if not self.is_on:
            return
        now = self._clock()
        if self._last is not None:
            own_s = max(0.0, now - self._last - self._called_s)
            self._pass.add(self._called_s, own_s, self._longest)
            self._note_hang(own_s)
        if layer == 0:
            self._end_pass()
        self._last, self._called_s, self._longest = now, 0.0, (0.0, "")

    def pause(self) -> None:
        """The next layer does not follow the latest."""
        self._last = None

    def begin_sequence(self) -> None:
        """See `Predictor.begin_sequence`."""
        self._call("begin_sequence", self._predictor.begin_sequence)

    def begin_pass(self, n_tokens: int, token_ids: Ints | None, rows: int) -> None:
        """See `Predictor.begin_pass`."""
        self._call("begin_pass", lambda: self._predictor.begin_pass(n_tokens, token_ids, rows))

    def hint(self, token_ids: Ints) -> None:
        """See `Predictor.hint`."""
        self._call("hint", lambda: self._predictor.hint(token_ids))

    def observe(self, layer: int, experts: Ints, weights: Floats | None) -> None:
        """See `Predictor.observe`. The arrays must not be writable where the model goes on with them."""
        self._call(f"observe of layer {layer}", lambda: self._predictor.observe(layer, experts, weights))

    def step(self, layer: int, hidden: torch.Tensor) -> list[Prediction]:
        """See `Predictor.step`; empty if it is switched off by this."""

        def ask() -> list[Prediction]:
            answer = self._predictor.step(layer, hidden)
            if not isinstance(answer, Iterable):
                raise _Fault(f"returned {_short(answer)}, which is no sequence of predictions")
            return [self._checked(prediction) for prediction in answer]

        return self._call(f"step of layer {layer}", ask) or []

    def enter(self, layer: int, residual: torch.Tensor) -> Prediction | None:
        """See `Predictor.enter`; None if it is switched off by this."""

        def ask() -> Prediction | None:
            answer = self._predictor.enter(layer, residual)
            return None if answer is None else self._checked(answer)

        return self._call(f"enter of layer {layer}", ask)

    def ahead(self, layer: int, tokens: int) -> Chances:
        """See `chances_ahead`; empty if it is switched off by this."""
        return self._call(f"scores of layer {layer}", lambda: chances_ahead(self._predictor, layer, tokens)) or []

    def next_pass(self, layer: int) -> Prediction | None:
        """What `layer` will need in the pass after this one; None: the predictor cannot say."""

        def ask() -> Prediction | None:
            scores = self._predictor.scores(layer, 1)
            return None if scores is None else self._checked(self._predictor.best(layer, scores))

        return self._call(f"scores of layer {layer}", ask)

    def _call(self, name: str, call: Callable[[], R]) -> R | None:
        begin = self._clock()
        answer = self._watched(name, call)
        took_s = self._clock() - begin
        self._called_s += took_s
        self._longest = max(self._longest, (took_s, name))
        return answer if self.is_on else None

    def _watched(self, name: str, call: Callable[[], R]) -> R | None:
        if not self.is_on:
            return None
        try:
            return call()
        except MoertError:
            raise
        except _Fault as fault:
            self._switch_off(f"{name} {fault}")
        except Exception as error:
            self._switch_off(f"{name} raised {_told(error)}{self._place(error)}")
        return None

    def _checked(self, prediction: Prediction) -> Prediction:
        if not isinstance(prediction, Prediction):
            raise _Fault(f"returned {_short(prediction)}, which is no prediction")
        layer, experts, ranks, probabilities, chances = prediction
        if not _is_id(layer, len(self._sizes)):
            raise _Fault(f"predicts layer {_short(layer)}, of {len(self._sizes)} layers")
        size = self._sizes[layer]
        for what, values in (("expert", experts), ("rank", ranks)):
            # Almost always so, and sooner seen than one by one.
            if set(map(type, values)) <= {int} and (not values or (min(values) >= 0 and max(values) < size)):
                continue
            for value in values:
                if not _is_id(value, size):
                    raise _Fault(f"names {what} {_short(value)} in layer {layer}, of {size} experts")
        if len(set(experts)) != len(experts):
            raise _Fault(f"names an expert of layer {layer} twice: {_short(experts)}")
        if len(ranks) != len(experts) or (probabilities is not None and len(probabilities) != len(experts)):
            n_known = "no" if probabilities is None else len(probabilities)
            raise _Fault(
                f"names {len(experts)} experts of layer {layer} with {len(ranks)} ranks and {n_known} probabilities"
            )
        for chance in probabilities or ():
            if not _is_probability(chance):
                raise _Fault(f"names a probability of {_short(chance)} in layer {layer}")
        if chances is not None:
            if len(chances) != size:
                raise _Fault(f"names {len(chances)} chances of layer {layer}, of {size} experts")
            # A NaN makes the sum one.
            if not all(map(_is_probability, (min(chances), max(chances), sum(chances) / size))):
                raise _Fault(f"names chances of layer {layer} from {min(chances):.4g} to {max(chances):.4g}, or NaN")
        return prediction

    def _check_scores(self, layer: int, scores: Floats | None) -> Floats | None:
        if scores is None:
            return None
        size = self._sizes[layer]
        if not isinstance(scores, np.ndarray) or scores.shape != (size,) or scores.dtype.kind != "f":
            named = f"{scores.dtype} {scores.shape}" if isinstance(scores, np.ndarray) else _short(scores)
            raise _Fault(f"are {named}, not {size} floats")
        # Mostly the sum tells: it is finite only if all of them are.
        if not math.isfinite(scores.sum()) and not np.isfinite(scores).all():
            raise _Fault(f"are NaN or infinite for {int((~np.isfinite(scores)).sum())} of {size} experts")
        if self._predictor.gives_probabilities and size:
            least, most = float(scores.min()), float(scores.max())
            if least < -ROUNDING or most > 1 + ROUNDING:
                raise _Fault(f"are meant as probabilities and go from {least:.4g} to {most:.4g}")
        return scores

    def _note_hang(self, own_s: float) -> None:
        took_s, name = self._longest
        if took_s <= HANG_S or took_s <= HANG_TIMES * own_s:
            return
        self._hangs += 1
        if self._hangs > FORGIVEN:
            self._switch_off(
                f"{name} took {took_s:.2f} s, where the layer itself took {own_s:.2g} s; "
                f"{self._hangs} calls were that long"
            )

    def _end_pass(self) -> None:
        if self._pass.called_s > 0:
            self._passes.append(self._pass)
        self._pass = _Pass()
        if len(self._passes) < PASSES:
            return
        called_s = statistics.median(one.called_s / one.n_layers for one in self._passes)
        own_s = statistics.median(one.own_s / one.n_layers for one in self._passes)
        n_slow = sum(one.called_s > one.own_s for one in self._passes)
        worst = max(one.longest for one in self._passes)[1]
        self._passes = []
        if called_s > SLOW_S and n_slow > PASSES / 2:
            self._switch_off(
                f"its calls took {1e3 * called_s:.3g} ms a layer and the layers themselves {1e3 * own_s:.3g} ms, "
                f"medians of {PASSES} passes; the longest was {worst}"
            )

    def _switch_off(self, why: str) -> None:
        if not self.is_on:
            return
        self.is_on = False
        warnings.warn(
            f"predictor {_name(self._predictor)} is switched off until the model is loaded again: {why}. "
            "Tokens are not affected",
            RuntimeWarning,
            stacklevel=2,
        )

    def _place(self, error: Exception) -> str:
        """The last line of the predictor's own file that was on the way to the error, or else of any."""
        frames = traceback.extract_tb(error.__traceback__)
        own = getattr(sys.modules.get(type(self._predictor).__module__), "__file__", None)
        frame = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        return f" ({os.path.basename(frame.filename)}, line {frame.lineno})"


class _Pass:
    """What one pass has taken so far."""

    def __init__(self) -> None:
        self.called_s = 0.0
        self.own_s = 0.0
        self.n_layers = 0
        self.longest = (0.0, "")

    def add(self, called_s: float, own_s: float, longest: tuple[float, str]) -> None:
        self.called_s += called_s
        self.own_s += own_s
        self.n_layers += 1
        self.longest = max(self.longest, longest)


def _is_id(value: object, end: int) -> bool:
    return isinstance(value, Integral) and 0 <= value < end  # type: ignore[operator]


def _is_probability(value: object) -> bool:
    return isinstance(value, Real) and -ROUNDING <= float(value) <= 1 + ROUNDING


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _told(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _name(predictor: Predictor) -> str:
    kind = type(predictor)
    package, _, name = kind.__module__.rpartition(".")
    return name if package == "moert.predictors" else f"{kind.__module__}:{kind.__qualname__}"
