"""How the replays are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as machine code, kept on disk, that lets other threads run.

    It must allocate nothing: numba then need not count references to arrays, which costs more than the replay itself
    (8.6 against 32 million accesses a second for LRU). Where numba does not know the option it counts them.
    """
    njit: Any = numba.njit
    try:
        return njit(nogil=True, cache=True, _nrt=False)(function)
    except (KeyError, TypeError):
        return njit(nogil=True, cache=True)(function)
