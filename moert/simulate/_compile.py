"""How the replays are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moert.machine_code import compiled as compiled_and_kept


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as machine code; see `moert.machine_code.compiled`.

    It must allocate nothing: numba then need not count references to arrays, which costs more than the replay itself
    (8.6 against 32 million accesses a second for LRU). Where numba does not know the option it counts them.
    """
    try:
        return compiled_and_kept(function, _nrt=False)
    except (KeyError, TypeError):
        return compiled_and_kept(function)
