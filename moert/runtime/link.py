"""How fast experts come up while somebody waits for them, and how long nobody does."""

from __future__ import annotations

SHARE = 1 / 16
"""Of the latest measurement in what is known."""

LONGEST = 4
"""Times as long as what is known is the most that a measurement counts."""


class Link:
    """What the pipeline's reads have taken lately. Told of times; has no clock."""

    def __init__(self) -> None:
        self.drained = 0.0
        """When the last read that somebody waited for had arrived."""
        self._begun: float | None = None
        """When the first of those that are waited for now was asked for."""
        self._bytes = 0
        """That have arrived since then."""
        self._sum_bytes = self._sum_s = 0.0

    def demand(self, now: float) -> None:
        """Somebody waits for a read from now on."""
        if self._begun is None:
            self._begun, self._bytes = now, 0

    def arrive(self, nbytes: int, is_last: bool, now: float) -> None:
        """So many bytes have arrived; `is_last`: nobody waits for others."""
        if self._begun is None:
            return
        self._bytes += nbytes
        if is_last:
            self._sum_bytes += SHARE * (self._bytes - self._sum_bytes)
            self._sum_s += SHARE * (now - self._begun - self._sum_s)
            self.drained, self._begun = now, None

    def forget(self) -> None:
        """Nobody waits any more, and nothing has been measured."""
        self._begun = None

    def read_s(self, nbytes: int) -> float | None:
        """What a read of `nbytes` takes while the link is busy; None: nothing has been read yet."""
        return nbytes * self._sum_s / self._sum_bytes if self._sum_bytes and self._sum_s else None


class IdleTimes:
    """How long nobody waits for the link between the layers of a model."""

    def __init__(self, num_layers: int) -> None:
        self._tails: list[dict[bool, float]] = [{} for _ in range(num_layers)]
        """Of each layer, after an event that waited for reads and after one that did not: seconds until the next."""
        self._entered: list[float | None] = [None] * num_layers
        """Seconds from the beginning of its block to that of its event."""
        self._now: tuple[int, float] | None = None
        """The layer of the latest event, and when it began."""
        self._entry: tuple[int, float] | None = None

    def begin(self, layer: int, now: float, drained: float) -> None:
        """An event of `layer` begins; the last read that the one before waited for had arrived at `drained`."""
        if self._now is not None and (self._now[0] + 1) % len(self._tails) == layer:
            before, begun = self._now
            waited = drained > begun
            passed = now - (drained if waited else begun)
            tails = self._tails[before]
            known = tails.get(waited, passed)
            # Between two passes there may be a user's pause.
            tails[waited] = known + SHARE * (min(passed, LONGEST * known) - known)
        if self._entry is not None and self._entry[0] == layer:
            passed, before_s = now - self._entry[1], self._entered[layer]
            self._entered[layer] = passed if before_s is None else before_s + SHARE * (passed - before_s)
        self._now, self._entry = (layer, now), None

    def pause(self) -> None:
        """The next event does not follow the latest."""
        self._now = self._entry = None

    def enter(self, layer: int, now: float) -> None:
        """The block that holds `layer` begins."""
        self._entry = (layer, now)

    def after(self, layer: int, waits: bool) -> float | None:
        """From the last read that the event of `layer` waits for, or its beginning, to the next layer's event."""
        return self._tails[layer].get(waits)

    def until(self, layer: int) -> float | None:
        """From the beginning of the block of `layer` to its event."""
        return self._entered[layer]
