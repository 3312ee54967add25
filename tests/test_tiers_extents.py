"""A set of bytes kept as pieces, against a set of bytes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from moert.tiers.extents import Extents

ranges = st.tuples(st.integers(0, 20), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(changes=st.lists(st.tuples(st.booleans(), ranges), max_size=12), asked=ranges)
def test_extents_are_a_set(changes: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]) -> None:
    extents, expected = Extents(), set[int]()
    for added, (begin, end) in changes:
        if added:
            extents.add(begin, end)
            expected |= set(range(begin, end))
        else:
            extents.remove(begin, end)
            expected -= set(range(begin, end))
    pieces = list(extents)
    assert all(begin < end for begin, end in pieces)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(pieces)), "pieces are sorted and do not touch"
    assert {byte for piece in pieces for byte in range(*piece)} == expected
    assert extents.nbytes == len(expected)
    inside = set(range(*asked))
    assert {byte for piece in extents.within(*asked) for byte in range(*piece)} == expected & inside
    assert {byte for piece in extents.missing(*asked) for byte in range(*piece)} == inside - expected
    assert extents.covers(*asked) == (inside <= expected)
