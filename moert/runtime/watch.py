"""A look at the memory between steps, now and then."""

from __future__ import annotations

from time import monotonic

from moert.pressure import PressureGovernor, Relief
from moert.tiers.memory import memory_report

READ_EVERY_S = 0.5
"""The kernel's files are read this often at most: a reading takes some 0.3 ms."""


class MemoryWatch:
    """Asks the governor whenever a reading is due; between readings a look costs the reading of a clock."""

    def __init__(self) -> None:
        self._governor = PressureGovernor()
        self._due_s = 0.0

    def look(self, slot_bytes: int, least_bytes: int) -> Relief | None:
        """What the memory calls for now; see `PressureGovernor.decide`. None between readings."""
        now = monotonic()
        if now < self._due_s:
            return None
        relief = self._governor.decide(memory_report(), slot_bytes, least_bytes, now)
        self._due_s = now + READ_EVERY_S
        return relief
