"""How a staged record's bytes become tensors, in terms that the extension's threads can follow.

What turns pieces into a tensor is a function of tensors, transformers' own as a rule. It is run once on tensors that
have no memory, with a look at which views it takes and what it puts side by side; the copies it makes on the way are
left out. What is more than that is left to the function itself.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moert import _C
from moert.formats import TensorSpec
from moert.runtime.records import Piece, Record, Source

_ITEMS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BYTE = 3

_MOST_MOVES = 64
"""Of one record: many small ones are better done by torch."""

T = TypeVar("T")

_Move = tuple[int, int, int, int, int, int, int, int, int]


class _Unknown(Exception):
    """Not only views and concatenations."""


class _Strip(NamedTuple):
    """Numbers of one piece on their way, in as few dimensions as possible; all counts in numbers."""

    piece: Piece
    source: int
    destination: int
    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    destination_strides: tuple[int, ...]


class _Watch(TorchDispatchMode):
    """Lets a conversion run on meta tensors, and notes what it concatenates."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        """Storage -> the tensor that was made there, and its parts: (tensor, its place)."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ops = torch.ops.aten
        if func is ops.clone.default:
            return args[0]
        if func is ops.stack.default and len(args[0]) == 1:
            return args[0][0].unsqueeze(_argument(args, kwargs))
        if func is ops.cat.default:
            return self._cat(args[0], _argument(args, kwargs))
        if func._schema.is_mutable:
            raise _Unknown(str(func))
        return func(*args, **kwargs)

    def _cat(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        if len(parts) == 1:
            return parts[0]
        whole = torch.cat(list(parts), dim)
        begin, places = 0, []
        for part in parts:
            places.append((part, whole.narrow(dim, begin, part.shape[dim])))
            begin += part.shape[dim]
        self.made[_storage(whole)] = (whole, places)
        return whole


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return int(args[1] if len(args) > 1 else kwargs.get("dim", 0))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def moves_of(record: Record) -> object | None:
    """What `record.fill` does, for the extension: bytes from the staging buffer into the slot.

    Returns:
        What `moert.tiers.read.Moving` takes; None where it is more than copies, casts of plain floating types and
        transpositions. `None` as well for a direct record, of which nothing is moved.
    """
    if record.sources is None:
        return None
    try:
        found = (
            move
            for spec, offset, source in zip(record.layout.specs, record.layout.offsets, record.sources, strict=True)
            for strip in _strips(spec, source)
            for move in _moves(record, spec, offset, strip)
        )
        moves = _apart(lambda: list(islice(found, _MOST_MOVES + 1)))
    # Whatever a conversion may raise for tensors that are not what it expects.
    except Exception:
        return None
    return _C.moves(moves) if len(moves) <= _MOST_MOVES else None


def _apart(work: Callable[[], T]) -> T:
    """What `work` returns or raises, on a thread of its own: an interrupt on the way out of one of torch's modes would
    leave it on, for everything that the caller's thread does from then on."""
    over = _thread.allocate_lock()
    over.acquire()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        over.release()

    # Not `threading.Thread`, whose start waits in a way that an interrupt can break.
    _thread.start_new_thread(run, ())
    with over:
        pass
    for error in errors:
        raise error
    return results[0]


def _strips(spec: TensorSpec, source: Source) -> list[_Strip]:
    pieces = {}
    tensors = []
    watch = _Watch()
    with torch.no_grad():
        for piece in source.pieces:
            tensor = torch.empty(piece.shape, dtype=piece.dtype, device="meta")
            pieces[_storage(tensor)] = piece
            tensors.append(tensor)
        with watch:
            made = source.tensor(tensors)
    if tuple(made.shape) != spec.shape:
        raise _Unknown(f"{made.shape}")
    places = [(made, torch.empty(spec.shape, device="meta"))]
    if _storage(made) in watch.made:
        whole, places = watch.made[_storage(made)]
        if not made.is_contiguous() or made.storage_offset() or made.numel() != whole.numel():
            raise _Unknown("a part of what was put together")
    strips = []
    for tensor, place in places:
        piece = pieces[_storage(tensor)]
        if tensor.dtype != piece.dtype:
            raise _Unknown(f"{piece.dtype} as {tensor.dtype}")
        dims = _collapse(tensor.shape, tensor.stride(), place.stride())
        strips.append(_Strip(piece, int(tensor.storage_offset()), int(place.storage_offset()), *dims))
    return strips


def _collapse(
    shape: Sequence[int], source: Sequence[int], destination: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    kept: list[tuple[int, int, int]] = []
    for size, a, b in zip(shape, source, destination, strict=True):
        if size == 1:
            continue
        if kept and kept[-1][1] == size * a and kept[-1][2] == size * b:
            kept[-1] = (kept[-1][0] * size, a, b)
        else:
            kept.append((size, a, b))
    columns = list(zip(*kept, strict=True)) or [(), (), ()]
    return columns[0], columns[1], columns[2]


def _moves(record: Record, spec: TensorSpec, offset: int, strip: _Strip) -> Iterator[_Move]:
    shape, sources, destinations = strip.shape, strip.source_strides, strip.destination_strides
    if 0 in shape:
        return
    if len(shape) > 2:
        for i in range(shape[0]):
            inner = _Strip(
                strip.piece,
                strip.source + i * sources[0],
                strip.destination + i * destinations[0],
                shape[1:],
                sources[1:],
                destinations[1:],
            )
            yield from _moves(record, spec, offset, inner)
        return
    if len(shape) == 1 and destinations[0] != 1:
        shape, sources, destinations = (*shape, 1), (*sources, 1), (*destinations, 1)
    rows, columns = (1, 1, *shape)[-2:]
    source_row, source_column = (0, 1, *sources)[-2:]
    destination_row, destination_column = (0, 1, *destinations)[-2:]
    if destination_column != 1:
        raise _Unknown("numbers that do not lie side by side")
    from_bytes, to_bytes = strip.piece.dtype.itemsize, spec.dtype.itemsize
    source = record.place(strip.piece.span) + strip.source * from_bytes
    destination = offset + strip.destination * to_bytes
    if strip.piece.dtype == spec.dtype and source_column == 1:
        rows_bytes = (source_row * from_bytes, 1, destination, destination_row * to_bytes)
        yield (_BYTE, _BYTE, rows, columns * to_bytes, source, *rows_bytes)
    elif strip.piece.dtype in _ITEMS and spec.dtype in _ITEMS:
        items = (_ITEMS[strip.piece.dtype], _ITEMS[spec.dtype])
        yield (*items, rows, columns, source, source_row, source_column, destination, destination_row)
    else:
        raise _Unknown(f"{strip.piece.dtype} to {spec.dtype}")
