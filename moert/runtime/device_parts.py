"""How many tokens of a step a device computes at a time: all of them, or as many as it had memory for."""

from __future__ import annotations

SETTLED_STEPS = 128
"""Steps that were cut, and went, until larger parts are tried."""

MOST_STEPS = 8192
"""It becomes twice as many each time that they did not go, up to so many."""


class Parts:
    """Halves what a step is cut into when a device runs out of memory, and doubles it again later."""

    def __init__(self) -> None:
        self.most_tokens: int | None = None
        """Of one part; None: steps are not cut."""
        self._whole_tokens = 0
        """Of the step that did not go first."""
        self._steps, self._wait = 0, SETTLED_STEPS
        self._has_grown = False
        """Since it was last halved."""

    def halve(self, tokens: int) -> int:
        """There was no memory for so many, more than one; returns how many it is to be from here on."""
        if self.most_tokens is None:
            self._whole_tokens = max(self._whole_tokens, tokens)
        if self._has_grown:
            self._wait = min(2 * self._wait, MOST_STEPS)
        self._steps, self._has_grown = 0, False
        self.most_tokens = tokens // 2
        return self.most_tokens

    def went(self, tokens: int) -> None:
        """A step of so many tokens is over."""
        if self.most_tokens is None or tokens <= self.most_tokens:
            return
        self._steps += 1
        if self._steps >= self._wait:
            self._steps, self._has_grown = 0, True
            more = 2 * self.most_tokens
            self.most_tokens = None if more >= self._whole_tokens else more
