"""Which parts of an address range are in use: disjoint, sorted pieces."""

from __future__ import annotations

from collections.abc import Iterator


class Extents:
    """A set of bytes, kept as [begin, end) pieces that neither overlap nor touch."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._pieces)

    @property
    def nbytes(self) -> int:
        """How many bytes are in the set."""
        return sum(end - begin for begin, end in self._pieces)

    def add(self, begin: int, end: int) -> None:
        """Put [begin, end) in, whether some of it is in already or not."""
        if begin >= end:
            return
        touching = [piece for piece in self._pieces if piece[0] <= end and begin <= piece[1]]
        merged = (min([begin, *(piece[0] for piece in touching)]), max([end, *(piece[1] for piece in touching)]))
        self._pieces = sorted([*(piece for piece in self._pieces if piece not in touching), merged])

    def remove(self, begin: int, end: int) -> None:
        """Take [begin, end) out, whether all of it is in or not."""
        if begin >= end:
            return
        rest = [part for b, e in self._pieces for part in ((b, min(e, begin)), (max(b, end), e))]
        self._pieces = [(b, e) for b, e in rest if b < e]

    def within(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The pieces of [begin, end) that are in."""
        return [(max(b, begin), min(e, end)) for b, e in self._pieces if max(b, begin) < min(e, end)]

    def missing(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The pieces of [begin, end) that are not in."""
        gaps, at = [], begin
        for b, e in self.within(begin, end):
            if at < b:
                gaps.append((at, b))
            at = e
        return [*gaps, (at, end)] if at < end else gaps

    def covers(self, begin: int, end: int) -> bool:
        """Whether all of [begin, end) is in."""
        return not self.missing(begin, end)
