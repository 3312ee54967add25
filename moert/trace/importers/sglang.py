"""Dumps of SGLang's expert distribution recorder in mode `per_token`: a .pt file for each rank.

A record is a forward pass: `topk_ids_of_layer` [layers, tokens, 8], -1 where there is none, `input_ids`, `positions`,
`extend_seq_lens` (how many tokens of a prompt belong to each request) and `forward_mode`. The ids are of copies of
experts; `last_physical_to_logical_map` [layers, copies] says of which. The other modes count experts only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError
from moert.trace.importers._arrays import load_pt, pickled_words
from moert.trace.importers.base import Importer, ImportOptions, checked, malformed
from moert.trace.sequence import NO_EXPERT, LayerInfo, Phase, Sequence, TraceHeader

_EXTEND, _DECODE, _MIXED, _IDLE = 1, 2, 3, 4
"""SGLang's numbers of the forward modes that are read."""


class _Record(NamedTuple):
    where: str
    step: int
    mode: int
    experts: npt.NDArray[np.int32]
    """[T, L, K] ids of experts, of all layers of the file."""
    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    extended: list[int]
    """Tokens of each request whose prompt is being read; they come first."""


class Sglang(Importer):
    """Forward passes are steps. Which tokens are of one request is not in the file; it follows from their positions.

    A token continues the first request, in the batch's order, that has come to its position; else it begins a new one.
    Two requests that are equally long at once can so be taken for each other where the batch changed its order; the
    experts of a step are right in any case. Ranks of one tensor-parallel group see the same tokens: give one of their
    files. Layers without a router, -1 throughout the first record with tokens, are left out.
    """

    about = "SGLang expert-distribution dump, mode per_token (.pt)"

    def recognises(self, path: Path) -> bool:
        words = pickled_words(path)
        return b"topk_ids_of_layer" in words or b"last_physical_to_logical_map" in words or b"logical_count" in words

    def read(self, path: Path, options: ImportOptions) -> tuple[TraceHeader, Iterator[Sequence]]:
        records, to_logical = _open(path)
        experts = int(to_logical.max()) + 1 if to_logical is not None else options.need("experts", path)
        if options.experts is not None and options.experts != experts:
            raise ConfigError(f"{path} has {experts} experts a layer, --experts says {options.experts}")
        # An idle rank records passes without tokens.
        tried = (_record(path, index, fields, to_logical) for index, fields in enumerate(records))
        first = next((record for record in tried if len(record.positions)), None)
        if first is None:
            raise malformed(path, "file", "no record has a token")
        counts = (first.experts != NO_EXPERT).sum(axis=2).max(axis=0)
        routed = counts > 0
        if not routed.any():
            raise malformed(path, first.where, "no layer has any expert")
        top_k = int(counts.max()) if options.top_k is None else options.top_k
        layers = tuple(
            LayerInfo(f"layers.{index}", experts, top_k, options.native_top_k) for index in np.flatnonzero(routed)
        )
        header = TraceHeader(layers=layers, model=options.model, source="sglang")
        return header, _sequences(path, records, to_logical, routed, header, options)


class _Request:
    """A request as far as it is read."""

    def __init__(self) -> None:
        self.experts: list[npt.NDArray[np.int32]] = []
        self.token_ids: list[npt.NDArray[np.int64]] = []
        self.steps: list[npt.NDArray[np.int64]] = []
        self.phases: list[npt.NDArray[np.uint8]] = []
        self.next_position = 0

    def add(self, record: _Record, rows: slice, routed: npt.NDArray[np.bool_], top_k: int, phase: Phase) -> None:
        experts = record.experts[rows][:, routed]
        self.experts.append(experts[:, :, :top_k])
        self.token_ids.append(record.token_ids[rows])
        self.steps.append(np.full(len(experts), record.step, dtype=np.int64))
        self.phases.append(np.full(len(experts), phase, dtype=np.uint8))
        self.next_position = int(record.positions[rows][-1]) + 1

    def sequence(self, name: str) -> Sequence:
        return Sequence(
            experts=np.concatenate(self.experts),
            steps=np.concatenate(self.steps),
            phases=np.concatenate(self.phases),
            token_ids=np.concatenate(self.token_ids),
            name=name,
        )


def _sequences(
    path: Path,
    records: list[Any],
    to_logical: npt.NDArray[np.int64] | None,
    routed: npt.NDArray[np.bool_],
    header: TraceHeader,
    options: ImportOptions,
) -> Iterator[Sequence]:
    running: list[_Request] = []
    done, step = 0, -1
    for index, fields in enumerate(records):
        record = _record(path, index, fields, to_logical)
        options.report(index + 1, len(records))
        if record.step <= step:
            raise malformed(path, record.where, f"forward pass {record.step} after {step}")
        step = record.step
        beyond = record.experts[:, :, header.top_k :] != NO_EXPERT
        if beyond.any():
            raise malformed(path, record.where, f"a token has more than {header.top_k} experts (--top-k)")
        if (record.experts[:, ~routed] != NO_EXPERT).any():
            raise malformed(path, record.where, "a layer has experts that has none in the first record with tokens")
        seen, order = _assign(record, running, routed, header.top_k)
        # A pass over prompts alone says nothing about the requests that wait meanwhile.
        finished = [request for request in running if request not in seen] if record.mode == _DECODE else []
        running = [request for request in order if request not in finished]
        for request in finished:
            yield checked(request.sequence(f"{path.stem}/{done}"), header, path, f"up to {record.where}")
            done += 1
    for request in running:
        yield checked(request.sequence(f"{path.stem}/{done}"), header, path, "file")
        done += 1


def _assign(
    record: _Record, running: list[_Request], routed: npt.NDArray[np.bool_], top_k: int
) -> tuple[list[_Request], list[_Request]]:
    """Give a record's tokens to requests; those that got some, and all in the batch's order."""
    pieces, begin = [], 0
    for length in record.extended:
        pieces.append((slice(begin, begin + length), Phase.PREFILL))
        begin += length
    pieces += [(slice(row, row + 1), Phase.DECODE) for row in range(begin, len(record.positions))]
    seen: list[_Request] = []
    order = list(running)
    for rows, phase in pieces:
        if rows.start == rows.stop:
            continue
        position = int(record.positions[rows.start])
        fits = (
            request
            for request in running
            if request.next_position == position
            and request not in seen
            and (phase is Phase.DECODE or int(request.phases[-1][0]) == Phase.PREFILL)
        )
        request = next(fits, None) if position else None
        if request is None:
            request = _Request()
            order.append(request)
        request.add(record, rows, routed, top_k, phase)
        seen.append(request)
    return seen, order


def _open(path: Path) -> tuple[list[Any], npt.NDArray[np.int64] | None]:
    """The records, and the map from copies to experts if there is one."""
    document = load_pt(path)
    if not isinstance(document, dict):
        raise malformed(path, "file", f"holds a {type(document).__name__}, not the dict of a recorder's dump")
    if "logical_count" in document:
        raise ConfigError(
            f"{path} was recorded in mode stat: it counts how often each expert was chosen, not by which token; record "
            "with --expert-distribution-recorder-mode per_token"
        )
    records = document.get("records")
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise malformed(path, "file", 'there are no "records"')
    if "topk_ids_of_layer" not in records[0]:
        raise ConfigError(
            f"{path} was recorded in mode per_pass: it counts the experts of a whole forward pass, not of a token; "
            "record with --expert-distribution-recorder-mode per_token"
        )
    to_logical = document.get("last_physical_to_logical_map")
    if to_logical is None:
        return records, None
    where = '"last_physical_to_logical_map"'
    array = _numbers(path, where, to_logical)
    if array.ndim != 2 or array.size == 0 or array.min() < 0:
        raise malformed(path, where, f"{list(array.shape)} is not [layers, copies] of experts")
    return records, array


def _record(path: Path, index: int, fields: dict[str, Any], to_logical: npt.NDArray[np.int64] | None) -> _Record:
    where = f"record {index}"
    step, mode = fields.get("forward_pass_id"), fields.get("forward_mode")
    if type(step) is not int or step < 0 or type(mode) is not int:
        raise malformed(path, where, f"forward pass {step!r} of mode {mode!r}")
    if mode not in (_EXTEND, _DECODE, _MIXED, _IDLE):
        raise ConfigError(
            f"{path}: {where}: forward mode {mode} is none of extend, decode, mixed and idle; record without "
            "speculative decoding"
        )
    token_ids, positions = (_numbers(path, where, fields.get(name)) for name in ("input_ids", "positions"))
    stored = _numbers(path, where, fields.get("topk_ids_of_layer"))
    num_tokens = len(token_ids)
    if token_ids.shape != (num_tokens,) or positions.shape != (num_tokens,):
        raise malformed(path, where, f"{list(token_ids.shape)} token ids at {list(positions.shape)} positions")
    if stored.ndim != 3 or stored.shape[1] != num_tokens:
        raise malformed(path, where, f"ids {list(stored.shape)} of {num_tokens} tokens are not [layers, tokens, k]")
    extended = fields.get("extend_seq_lens") if mode in (_EXTEND, _MIXED) else []
    if not isinstance(extended, list) or not all(type(length) is int and length >= 0 for length in extended):
        raise malformed(path, where, f'"extend_seq_lens" is {extended!r}')
    if sum(extended) > num_tokens or (mode == _EXTEND and sum(extended) != num_tokens):
        raise malformed(path, where, f"{sum(extended)} tokens of prompts, of {num_tokens}")
    experts = _logical(path, where, stored, to_logical).transpose(1, 0, 2)
    return _Record(where, step, mode, experts.astype(np.int32), token_ids, positions, extended)


def _logical(
    path: Path, where: str, stored: npt.NDArray[np.int64], to_logical: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.int64]:
    if stored.size and not -1 <= int(stored.min()) <= int(stored.max()) < 2**31:
        raise malformed(path, where, f"ids from {stored.min()} to {stored.max()}")
    if to_logical is None:
        return stored
    if len(stored) != len(to_logical) or (stored >= to_logical.shape[1]).any():
        raise malformed(
            path,
            where,
            f"ids up to {stored.max(initial=-1)} in {len(stored)} layers, the map is {list(to_logical.shape)}",
        )
    found = np.take_along_axis(to_logical, np.maximum(stored, 0).reshape(len(stored), -1), axis=1)
    return np.where(stored == NO_EXPERT, NO_EXPERT, found.reshape(stored.shape))


def _numbers(path: Path, where: str, value: Any) -> npt.NDArray[np.int64]:
    """A tensor or list of whole numbers."""
    try:
        array = np.asarray(value)
    except (ValueError, RuntimeError, TypeError) as error:
        raise malformed(path, where, f"is no tensor of numbers ({error})") from error
    if array.dtype.kind not in "iu" and array.size:
        raise malformed(path, where, f"holds {array.dtype}, not whole numbers")
    return array.astype(np.int64)
