"""Launches under Triton's interpreter, which torch knows nothing of, told to whoever notes what a device does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

import torch

Told = Callable[[Iterable[torch.Tensor], Callable[[], None]], None]
"""Called with the tensors that a launch may read and write, and with what runs it, which it calls itself."""

_here = threading.local()


def launch(tensors: Iterable[torch.Tensor], run: Callable[[], None]) -> None:
    """Run it, or have it run by whoever wants to be told."""
    told: Told | None = getattr(_here, "told", None)
    if told is None:
        run()
    else:
        told(tensors, run)


@contextlib.contextmanager
def told_of_launches(told: Told) -> Iterator[None]:
    """Tell `told` of each launch of this thread."""
    before = getattr(_here, "told", None)
    _here.told = told
    try:
        yield
    finally:
        _here.told = before
