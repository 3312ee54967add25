"""Functions that numba compiles, kept on disk where there is a place for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numba


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` as machine code that lets other threads run; `options` are numba's.

    It is kept where NUMBA_CACHE_DIR says, beside the source, or in the user's cache folder. Where nothing can be
    written, as in a container that is read-only, every process compiles it again, with one RuntimeWarning.
    """
    njit: Any = numba.njit
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        _warn_once()
        return njit(nogil=True, **options)(function)


@cache
def _warn_once() -> None:
    warnings.warn(
        "compiled code cannot be kept, neither in the folder of moert nor in the user's cache folder: each process "
        "compiles it again, which takes seconds; set NUMBA_CACHE_DIR to a folder that can be written to",
        RuntimeWarning,
        stacklevel=3,
    )
