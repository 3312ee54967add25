"""A trace as a list of events with the tokens of each expert, for replays that need to know how much there is to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from moert.errors import ConfigError
from moert.simulate.events import Reading, TraceLike, first_ids, read_events
from moert.trace.sequence import Phase, Sequence
from moert.types import ExpertId


class Event(NamedTuple):
    """What one layer's step needs."""

    layer: int
    experts: tuple[ExpertId, ...]
    """Ascending."""
    tokens: tuple[int, ...]
    """How many chose each."""
    is_counted: bool
    scores: list[float] | None


def read_steps(trace: TraceLike, reading: Reading) -> Iterator[Event]:
    """The events of `trace` as `moert.simulate.events.read_events` has them, one by one."""
    bases = first_ids(trace.header.layers)
    of_all = [ExpertId(i, e) for i in range(len(bases) - 1) for e in range(int(bases[i + 1] - bases[i]))]
    picks = read_events(trace, replace(reading, atomic=False, scores=False))
    for events, single in zip(read_events(trace, reading), picks, strict=True):
        place = np.stack([single.sequence, single.step, single.layer])
        event = np.cumsum(np.any(np.diff(place, axis=1, prepend=place[:, :1]), axis=0))
        # The same order as that of the ids of `events`: by event, ascending within it.
        _, tokens = np.unique(event * int(bases[-1]) + single.ids, return_counts=True)
        assert len(tokens) == len(events.ids)
        for number in range(len(events)):
            at = slice(int(events.offsets[number]), int(events.offsets[number + 1]))
            yield Event(
                int(events.layer[number]),
                tuple(of_all[i] for i in events.ids[at].tolist()),
                tuple(tokens[at].tolist()),
                bool(events.counted[number]),
                None if events.scores is None else events.scores[number].tolist(),
            )


def first_tokens(trace: TraceLike, most: int) -> list[Sequence]:
    """The sequences from the beginning of a trace that hold `most` tokens of the kind that are decoded, the last cut.

    Raises:
        ConfigError: `most` is below 1.
    """
    if most < 1:
        raise ConfigError(f"{most} tokens cannot be timed; give at least 1")
    found: list[Sequence] = []
    left = most
    for sequence in trace:
        decoded = np.flatnonzero(sequence.phases == Phase.DECODE)
        if len(decoded) <= left:
            found.append(sequence)
            left -= len(decoded)
            if not left:
                break
            continue
        end = int(decoded[left])
        found.append(
            replace(
                sequence,
                experts=sequence.experts[:end],
                steps=sequence.steps[:end],
                phases=sequence.phases[:end],
                weights=None if sequence.weights is None else sequence.weights[:end],
                scores=None if sequence.scores is None else sequence.scores[:end],
                token_ids=None if sequence.token_ids is None else sequence.token_ids[:end],
            )
        )
        break
    return found
