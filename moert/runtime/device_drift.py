"""How long the CPU takes for its share of steps, by now: what was measured once drifts with clocks and neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moert.schedule import Costs, Curve, Residual

NOTICED = 0.02
"""By so much must the correction have changed to count: schedulers remember what they have made of the same costs."""


class CpuDrift:
    """Corrects the CPU's part of costs by what it took lately. The link's part is left to the `Guard`: nobody waits for
    single copies, so nobody sees how long they take."""

    def __init__(self) -> None:
        self._residual = Residual()
        self._factor = 1.0
        self._corrected: tuple[Costs, Costs] | None = None
        """Costs as they were measured, and as they are now."""

    @property
    def factor(self) -> float:
        """How many times as long as measured the CPU takes, as `of` counts it."""
        return self._factor

    def note(self, costs: Costs, tokens: Sequence[int], seconds: float) -> None:
        """The CPU has computed experts for so many tokens each, in one call; `costs` are those without correction."""
        self._residual.note(sum(map(costs.cpu_s, tokens)), seconds)
        factor = self._residual.factor
        if abs(factor / self._factor - 1) > NOTICED:
            self._factor, self._corrected = factor, None

    def of(self, costs: Costs) -> Costs:
        """`costs` with the CPU's times corrected."""
        if self._corrected is None or self._corrected[0] is not costs:
            curve = Curve(costs.cpu.tokens, tuple(seconds * self._factor for seconds in costs.cpu.seconds))
            self._corrected = costs, replace(costs, cpu=curve)
        return self._corrected[1]
