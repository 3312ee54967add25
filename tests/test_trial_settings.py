"""Prefetches on trial where the guard is: on a device tier whose CPU, link or waits are not as believed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from test_guard import EXPERTS, LAYER_S, PICKS, SETTINGS, World, planned

from moert.schedule import Costs
from moert.trial import BLOCK, Trial
from moert.types import ExpertId

SETTLED = 13 * BLOCK
"""Of the longest first trial, with the block before it."""
TOKENS = 2700
MOST = 2
"""Experts that are brought ahead of an event."""


@dataclass
class Prefetching(World):
    """It brings experts that are predicted while a layer does its other work; what that is too short for delays the
    event, and what is brought takes somebody's place."""

    accuracy: float = 0.5
    prefetches: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._guess = random.Random(self.seed + 1)

    def _event(self, layer: int, way: str, costs: Costs) -> float:
        state = self._draw.getstate()
        kept = [e for e in self._last[layer] if self._draw.random() < 0.5]
        fresh = self._draw.sample([e for e in range(EXPERTS) if e not in kept], PICKS - len(kept))
        self._draw.setstate(state)
        # Drawn in any case, so that what is predicted does not hang on what was done before.
        named = [e if self._guess.random() < self.accuracy else self._guess.randrange(EXPERTS) for e in kept + fresh]
        delay_s = 0.0
        if self.prefetches:
            policy, residents = self._policies[layer], self._residents[layer]
            missing = [ExpertId(layer, e) for e in dict.fromkeys(named) if ExpertId(layer, e) not in residents][:MOST]
            for expert in missing:
                if len(residents) == policy.capacity:
                    victim = policy.victim(frozenset(missing))
                    policy.evict(victim)
                    residents.remove(victim)
                policy.admit(expert)
                residents.add(expert)
            delay_s = max(0.0, len(missing) * costs.move_s - LAYER_S)
        return delay_s + super()._event(layer, way, costs)


def taken(setting: str, accuracy: float, trial: Trial | None, is_on: bool = False) -> float:
    """Seconds from `SETTLED` on."""
    plain = SETTINGS[setting]()
    world = Prefetching(plain.true, plain.while_both_s, plain.sync_s, plain.seed, accuracy)
    total = 0.0
    for token in range(TOKENS):
        world.prefetches = is_on if trial is None else trial.is_on
        seconds = world.step("exact")
        if trial is not None:
            trial.note(seconds)
        total += seconds if token >= SETTLED else 0.0
    return total


@pytest.mark.parametrize("accuracy", [0.2, 0.9])
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_more_than_a_hundredth_is_lost_once_it_has_settled(setting: str, accuracy: float) -> None:
    with_it, without = (taken(setting, accuracy, None, is_on) for is_on in (True, False))
    found = taken(setting, accuracy, Trial(is_on=accuracy < 0.5))
    assert found <= 1.01 * min(with_it, without)


def test_in_these_settings_it_may_gain_much_and_lose_much() -> None:
    ratios = [
        taken(setting, accuracy, None, True) / taken(setting, accuracy, None)
        for setting in ("a CPU 8 times as slow", "a link 8 times as slow")
        for accuracy in (0.2, 0.9)
    ]
    assert min(ratios) < 0.9
    assert max(ratios) > 1.5
    assert planned("exact", 0).fetch, "something is fetched as believed"
