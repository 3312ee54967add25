"""Reading all of a pack's files again, to see whether they are as they were written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import xxhash

from moert.errors import CorruptFileError, TransferError
from moert.runtime.dense_shard import CHUNK_BYTES
from moert.runtime.pack_file import CHECKSUM, PackFile, checksum, read_sealed
from moert.runtime.read_ahead import read_ahead
from moert.runtime.records import Span
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import BLOCK_BYTES, DiskReader, ShardFile

READS_AT_ONCE = 4

Report = Callable[[int], None]
"""Called with the bytes of each piece that has been read."""


def bad_records(file: PackFile, report: Report) -> list[str]:
    """What is wrong with the records of a layer's file. Reads them all; blocks."""
    where = f"{file.path}: expert"
    layer, nbytes = file.layer, file.layer.layout.nbytes
    spans = [(expert, replace(file.span(0, expert), nbytes=layer.record_bytes)) for expert in range(layer.num_experts)]
    problems = []

    def look(expert: int, data: memoryview) -> None:
        report(len(data))
        found = checksum(data[:nbytes])
        if found != file.checksums[expert]:
            problems.append(f"{where} {expert} has the checksum {found}, not {file.checksums[expert]}")
        if any(data[nbytes:]):
            problems.append(f"{where} {expert} is followed by other bytes than zeros")

    _read_all(file.path, spans, look, problems)
    return problems


def bad_data(path: str, source: str, report: Report) -> list[str]:
    """What is wrong with a file of weights that are no experts, of the pack made from `source`. Reads it; blocks.

    Raises:
        CorruptFileError, TransferError: its header cannot be read.
    """
    entries, metadata = read_sealed(path)
    if metadata.get("source") != source:
        return [f"{path} is of another pack"]
    begin = min((entry.offset for entry in entries.values()), default=0)
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=0)
    pieces = [(offset, Span(0, offset, min(CHUNK_BYTES, end - offset))) for offset in range(begin, end, CHUNK_BYTES)]
    state = xxhash.xxh3_128()
    problems: list[str] = []

    def look(_: int, data: memoryview) -> None:
        report(len(data))
        state.update(data)

    _read_all(path, pieces, look, problems)
    if not problems and state.hexdigest() != metadata.get(CHECKSUM):
        problems.append(f"{path} has the checksum {state.hexdigest()}, not {metadata.get(CHECKSUM)}")
    return problems


def _read_all(
    path: str, spans: Sequence[tuple[int, Span]], look: Callable[[int, memoryview], None], problems: list[str]
) -> None:
    """Call `look` with each span's bytes; where they cannot be read, add that to `problems` and stop."""
    if not spans:
        return
    window = max(span.window_bytes for _, span in spans)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(ShardFile(path))]
        arena = stack.enter_context(contextlib.closing(HostArena(window * READS_AT_ONCE)))
        reader = stack.enter_context(DiskReader(READS_AT_ONCE))
        bank = SlotBank(arena, 0, window, READS_AT_ONCE)
        wanted = (((what, span), (span,), (0,)) for what, span in spans)
        try:
            for (what, span), _, buffer in read_ahead(reader, files, bank, wanted):
                begin = span.offset % BLOCK_BYTES
                look(what, buffer[begin : begin + span.nbytes])
        except (CorruptFileError, TransferError) as error:
            problems.append(str(error))
