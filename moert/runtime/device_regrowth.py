"""When experts get memory of a device back that they gave: there has been room for it, and for a while."""

from __future__ import annotations

SETTLED_PASSES = 64
"""Forward passes from giving back to the first look for room, and from one look to the next."""

MOST_PASSES = 4096
"""It becomes twice as many each time that what was had back was missing again, up to so many."""


class Regrowth:
    """Told of passes and of memory, says how much may be taken.

    Room is what a model has besides its weights and its experts: what is free, and what its cache holds. As much of it
    as there was when passes last went, having failed with less, has to be left; so experts grow where somebody else has
    gone, and not where the model itself needs more than was thought.
    """

    def __init__(self, reserve_bytes: int) -> None:
        """`reserve_bytes`: of room, to be left in any case."""
        self._reserve_bytes = self._needed_bytes = reserve_bytes
        self._passes, self._wait = 0, SETTLED_PASSES
        self._has_grown = False
        """Since memory was last given back."""

    def gave_back(self, room_bytes: int) -> None:
        """A pass ran out of memory; so much room is there now."""
        if self._has_grown:
            self._wait = min(2 * self._wait, MOST_PASSES)
        self._has_grown, self._passes = False, 0
        self._needed_bytes = max(self._reserve_bytes, room_bytes)

    def is_time(self) -> bool:
        """Whether to look for room now; asked before each pass."""
        self._passes += 1
        if self._passes <= self._wait:
            return False
        self._passes = 0
        return True

    def takes(self, missing_bytes: int, room_bytes: int, free_bytes: int) -> int:
        """How much to take of `missing_bytes`: all that may be, at least half of them, or nothing."""
        nbytes = min(missing_bytes, room_bytes - self._needed_bytes, free_bytes)
        return nbytes if 2 * nbytes >= missing_bytes else 0

    def grew(self) -> None:
        """It was had; now it shows whether passes still go."""
        self._has_grown, self._passes = True, 0
