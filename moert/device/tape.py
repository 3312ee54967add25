"""What a CUDA graph does, done with torch's operations in host memory: notes them once, and does them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moert.device.base import CaptureError
from moert.kernels import launching

_READS_VALUES = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::unique_consecutive",
    "aten::_unique2",
}
"""What has to wait for the device, to have numbers on the host or to know how large its result is."""


_NOTHING = 0xFF
"""What is in memory that no replay has written to yet."""


class Tape(TorchDispatchMode):
    """Notes every operation of torch and every launch of a Triton kernel under the interpreter, in their order.

    A graph runs nothing while it is captured. Operations here have to, to give tensors; whatever they overwrite that
    was there before is put back when the tape is closed. As with a graph, replays use the very same memory, and no
    Python code runs: what that decided stays decided.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[Callable[[], None]] = []
        self._made: dict[int, torch.UntypedStorage] = {}
        """Storages that the work has made, kept for the tape's life."""
        self._before: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
        """Storages of others, and what was in them."""

    def record(self, work: Callable[[], object]) -> None:
        """Note what `work` does.

        Raises:
            CaptureError: it asks for numbers.
        """
        with launching.told_of_launches(self._launch):
            try:
                with self:
                    work()
            finally:
                for storage, contents in self._before.values():
                    _bytes_of(storage).copy_(contents)
                self._before.clear()
        for storage in self._made.values():
            _bytes_of(storage).fill_(_NOTHING)

    def replay(self) -> None:
        """Do it all again."""
        with torch.no_grad():
            for entry in self._entries:
                entry()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _READS_VALUES:
            raise CaptureError(f"{name} waits for the device, which a graph cannot do")
        given = _tensors((args, kwargs))
        if name.startswith("aten::index") and any(tensor.dtype is torch.bool for tensor in given[1:]):
            raise CaptureError(f"{name} by a mask waits for the device, which a graph cannot do")
        self._keep(given)
        result = func(*args, **kwargs)
        results = _tensors(result)
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        fresh = [tensor for tensor in results if tensor.untyped_storage().data_ptr() not in known]
        for tensor in fresh:
            self._made[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        writes = func._schema.is_mutable
        if fresh or writes:
            self._entries.append(lambda: _again(func, args, kwargs, fresh, results))
        return result

    def _launch(self, tensors: Iterable[torch.Tensor], run: Callable[[], None]) -> None:
        self._keep(tensors)
        run()
        self._entries.append(run)

    def _keep(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address and address not in self._made and address not in self._before:
                self._before[address] = storage, _bytes_of(storage).clone()


def _again(func: Any, args: Any, kwargs: Any, fresh: list[torch.Tensor], results: list[torch.Tensor]) -> None:
    again = _tensors(func(*args, **kwargs))
    for before, now in zip(results, again, strict=True):
        # What an operation made to be resized by a later one has the later one's contents.
        if any(before is tensor for tensor in fresh) and before.shape == now.shape:
            before.copy_(now)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    with torch._C._DisableTorchDispatch():
        return torch.empty(0, dtype=torch.uint8).set_(storage)
