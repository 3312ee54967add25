"""Rows copied from pinned host memory, or within a device, by a kernel that reads on the device which ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moert.kernels._launch import CompileSpec, Launch
from moert.kernels.dispatch import check_tensor

PROGRAMS = 8
"""For each pair of tensors. A few are enough to have as many bytes on their way as the link takes."""

_BLOCK_BYTES = 16384
_ALIGNMENT = 16
SCATTERED_ALIGNMENT = 8
"""In bytes, of rows that lie anywhere: what safetensors gives tensors that are read as they lie in their file."""


@dataclass(frozen=True, eq=False)
class RowTable:
    """Where rows are and go, on the device; made by `row_table` or `scattered_table`.

    Keeps the tensors alive, but for rows that lie anywhere: those are whoever's that has them.
    """

    numbers: torch.Tensor
    """int64 [P, 7]: source and destination address, bytes from one row to the next in either, bytes of a row, rows in
    either."""
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    addresses: torch.Tensor | None = None
    """int64 [P, rows]: where each row of a source is, 0 if it is nowhere; None: as `numbers` says."""
    alignment: int = 16
    """Of sources, in bytes."""


@triton.jit
def _kernel(
    numbers_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    destinations_ptr: tl.tensor,
    count_ptr: tl.tensor,
    addresses_ptr: tl.tensor,
    ALIGNMENT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(0)
    # An address from a table says nothing of its alignment; unless told, loads are of 4 bytes.
    source = tl.multiple_of(tl.load(numbers_ptr + pair * 7).to(tl.pointer_type(tl.int32)), 16)
    destination = tl.multiple_of(tl.load(numbers_ptr + pair * 7 + 1).to(tl.pointer_type(tl.int32)), 16)
    source_step = tl.multiple_of(tl.load(numbers_ptr + pair * 7 + 2) // 4, 4)
    destination_step = tl.multiple_of(tl.load(numbers_ptr + pair * 7 + 3) // 4, 4)
    words = tl.multiple_of(tl.load(numbers_ptr + pair * 7 + 4) // 4, 4)
    source_rows = tl.load(numbers_ptr + pair * 7 + 5)
    destination_rows = tl.load(numbers_ptr + pair * 7 + 6)
    pieces = (words + BLOCK - 1) // BLOCK
    total = tl.load(count_ptr) * pieces
    for piece in range(tl.program_id(1), total, PROGRAMS):
        row = piece // pieces
        place = (piece - row * pieces) * BLOCK + tl.arange(0, BLOCK)
        source_row = tl.load(sources_ptr + row).to(tl.int64)
        destination_row = tl.load(destinations_ptr + row).to(tl.int64)
        known = (source_row >= 0) & (source_row < source_rows)
        known = known & (destination_row >= 0) & (destination_row < destination_rows)
        if addresses_ptr is None:
            begin = source + source_row * source_step
        else:
            address = tl.load(addresses_ptr + pair * source_rows + source_row, mask=known, other=0)
            known = known & (address != 0)
            begin = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), ALIGNMENT)
        mask = (place < words) & known
        values = tl.load(begin + place, mask=mask, eviction_policy="evict_first")
        tl.store(destination + destination_row * destination_step + place, values, mask=mask)


def row_table(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device | str) -> RowTable:
    """Source and destination of every tensor of a record, for `copy_rows` on a device. Waits for the device.

    Args:
        pairs: tensors [rows, ...] of one dtype and row shape each; rows contiguous, any distance apart. Sources in
            pinned memory or on the device, destinations on the device. Addresses, distances and rows are multiples of
            16 bytes.

    Raises:
        ValueError: shapes, dtypes, layouts or alignments that do not fit, or memory that the device cannot reach.
    """
    device = torch.device(device)
    if not pairs:
        raise ValueError("there are no tensors to copy rows of")
    numbers = []
    for place, (source, destination) in enumerate(pairs):
        if source.dtype != destination.dtype or source.shape[1:] != destination.shape[1:]:
            raise ValueError(
                f"pair {place}: rows of {source.dtype} {list(source.shape[1:])} do not fit into "
                f"{destination.dtype} {list(destination.shape[1:])}"
            )
        if destination.device != device or not (source.device == device or source.is_pinned()):
            raise ValueError(
                f"pair {place}: from {source.device}{', not pinned,' if source.device.type == 'cpu' else ''} to "
                f"{destination.device}; kernels on {device} reach its memory and pinned memory"
            )
        row_bytes = 0
        for name, tensor in (("source", source), ("destination", destination)):
            if tensor.dim() < 2 or not tensor.numel() or not tensor[0].is_contiguous():
                raise ValueError(
                    f"pair {place}: the {name} {list(tensor.shape)} of strides {tensor.stride()} must be contiguous "
                    f"rows with numbers in them"
                )
            row_bytes = tensor[0].numel() * tensor.element_size()
            step_bytes = tensor.stride(0) * tensor.element_size() if tensor.shape[0] > 1 else row_bytes
            if step_bytes < row_bytes:
                raise ValueError(
                    f"pair {place}: the rows of the {name} overlap, {step_bytes} of {row_bytes} bytes apart"
                )
            for what, number in (
                ("address", tensor.data_ptr() if device.type != "meta" else 0),
                ("distance of rows", step_bytes),
                ("size of rows", row_bytes),
            ):
                if number % _ALIGNMENT:
                    raise ValueError(f"pair {place}: {name}, {what} {number} is no multiple of {_ALIGNMENT} bytes")
        numbers.append(
            [
                source.data_ptr() if device.type != "meta" else 0,
                destination.data_ptr() if device.type != "meta" else 0,
                source.stride(0) * source.element_size(),
                destination.stride(0) * destination.element_size(),
                row_bytes,
                source.shape[0],
                destination.shape[0],
            ]
        )
    return RowTable(torch.tensor(numbers, dtype=torch.int64).to(device), tuple(pairs))


def scattered_table(
    sources: Sequence[Sequence[torch.Tensor | None]],
    destinations: Sequence[torch.Tensor],
    device: torch.device | str,
) -> RowTable:
    """As `row_table`, where each row of a source is a tensor of its own, or is not there. Waits for the device.

    Args:
        sources: the rows for each of `destinations`, contiguous, in memory that kernels on the device can read, which
            is not checked. Their addresses are multiples of 8 bytes, their sizes of 16.
        destinations: as for `row_table`.

    Raises:
        ValueError: shapes, dtypes, layouts or alignments that do not fit.
    """
    device = torch.device(device)
    addresses, pairs = [], []
    for place, (rows, destination) in enumerate(zip(sources, destinations, strict=True)):
        there = [row for row in rows if row is not None]
        if not there or len(rows) != len(sources[0]):
            raise ValueError(
                f"pair {place}: {len(there)} of {len(rows)} rows are there, of {len(sources[0])} at least one"
            )
        for row in there:
            if row.dtype != destination.dtype or row.numel() * destination.shape[0] != destination.numel():
                raise ValueError(
                    f"pair {place}: a row of {row.dtype} {list(row.shape)} does not fit into {destination.dtype} "
                    f"{list(destination.shape[1:])}"
                )
            if not row.is_contiguous() or (device.type != "meta" and row.data_ptr() % SCATTERED_ALIGNMENT):
                raise ValueError(
                    f"pair {place}: a row at address {row.data_ptr()} of strides {row.stride()} must be contiguous and "
                    f"at a multiple of {SCATTERED_ALIGNMENT}"
                )
        is_real = device.type != "meta"
        addresses.append([row.data_ptr() if row is not None and is_real else 0 for row in rows])
        # Its numbers are those of a source that is as the destination, whose address nobody reads.
        pairs.append((destination, destination))
    table = row_table(pairs, device)
    numbers = table.numbers.cpu() if device.type != "meta" else table.numbers
    numbers[:, 5] = len(sources[0])
    known = torch.tensor(addresses, dtype=torch.int64).to(device)
    return RowTable(numbers.to(device), table.pairs, known, SCATTERED_ALIGNMENT)


def copy_rows(
    table: RowTable,
    sources: torch.Tensor,
    destinations: torch.Tensor,
    count: torch.Tensor,
    *,
    programs: int = PROGRAMS,
) -> None:
    """Copy row `sources[i]` of every source to row `destinations[i]` of its destination, for each i below `count`.

    Reads the host's memory over the link itself (unified addresses, Linux), so that a CUDA graph which decides on the
    device what to fetch can fetch it: see `Plan`. Pairs of rows with a number outside the tensors are passed over.
    `destinations` must not repeat. Does not wait for the device; sources must stay as they are until it has run.

    The kernel that copies inside the graph is FreeToken's idea (2026).

    Args:
        table: of the tensors.
        sources, destinations: int32 [M] on the device.
        count: int32 [1] on the device, at most M.
        programs: how many share each tensor's rows.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    _launch(table, sources, destinations, count, programs).run(table.numbers.device)


def _launch(
    table: RowTable,
    sources: torch.Tensor,
    destinations: torch.Tensor,
    count: torch.Tensor,
    programs: int,
) -> Launch:
    device = table.numbers.device
    for name, tensor in (("sources", sources), ("destinations", destinations), ("count", count)):
        check_tensor(name, tensor, 1, (torch.int32,), device)
    if sources.shape != destinations.shape or count.numel() != 1:
        raise ValueError(
            f"{sources.numel()} sources, {destinations.numel()} destinations and {count.numel()} counts: the first two "
            f"belong together, and there is one count"
        )
    if programs < 1:
        raise ValueError(f"programs={programs} must be at least 1")
    arguments = {
        "numbers_ptr": table.numbers,
        "sources_ptr": sources,
        "destinations_ptr": destinations,
        "count_ptr": count,
        "addresses_ptr": table.addresses,
        "ALIGNMENT": table.alignment,
        "PROGRAMS": programs,
        "BLOCK": _BLOCK_BYTES // 4,
    }
    return Launch(_kernel, (len(table.pairs), programs), arguments, {"num_warps": 16})


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    rows = torch.empty(4, 64, dtype=torch.int32, device="meta")
    lists = torch.empty(8, dtype=torch.int32, device="meta")
    count = torch.empty(1, dtype=torch.int32, device="meta")
    tables = {
        "copy_rows": row_table([(rows, rows)], "meta"),
        "copy_rows[scattered]": scattered_table([[rows[:1]] * 4], [rows], "meta"),
    }
    return [
        CompileSpec(name, _launch(table, lists, lists, count, PROGRAMS), needs=(f"load{8 * table.alignment}",))
        for name, table in tables.items()
    ]
