"""CSV route traces of BigMoeOnEdge (`# route_trace v1`): a row for each pick, with its weight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moert.trace.importers.base import (
    Importer,
    ImportOptions,
    beginning,
    checked,
    malformed,
    prompt_and_decode,
    read_lines,
    refuse_text_after,
)
from moert.trace.sequence import NO_EXPERT, LayerInfo, Sequence, TraceHeader

_MAGIC = "# route_trace v1"
_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
_MODEL = re.compile(
    r"# model=(?P<model>.*?) arch=\S* n_layer=(?P<layers>\d{1,6}) n_expert=(?P<experts>\d{1,6}) "
    r"n_expert_used=(?P<top_k>\d{1,6})(?: .*)?"
)
_LAYER = re.compile(r"# layer=(?P<layer>\d{1,6}) expert_bytes=(?P<nbytes>\d{1,15})(?: .*)?")
_PREFILL = 0
_DECODE = 1


class Bigmoe(Importer):
    """Each turn is a sequence: its prompt, one step for all of it, and the tokens decoded after it.

    The last layer ran for the last token of a prompt only, so a prompt's tokens may lack layers; decoded ones may not.
    """

    about = "CSV of BigMoeOnEdge, '# route_trace v1'"

    def recognises(self, path: Path) -> bool:
        return beginning(path, len(_MAGIC)) == _MAGIC.encode()

    def read(self, path: Path, options: ImportOptions) -> tuple[TraceHeader, Iterator[Sequence]]:
        lines = read_lines(path, options)
        header = _header(path, lines, options)
        return header, _sequences(path, lines, header)


def _header(path: Path, lines: Iterator[tuple[int, str]], options: ImportOptions) -> TraceHeader:
    number, text = next(lines, (1, ""))
    if text != _MAGIC:
        raise malformed(path, "line 1", f"is not {_MAGIC!r}")
    number, text = next(lines, (2, ""))
    model = _MODEL.fullmatch(text)
    if model is None:
        raise malformed(path, "line 2", "is not '# model=... arch=... n_layer=N n_expert=N n_expert_used=N'")
    num_layers, experts, top_k = int(model["layers"]), int(model["experts"]), int(model["top_k"])
    if num_layers < 1 or not 1 <= top_k <= experts:
        raise malformed(path, "line 2", f"{num_layers} layers and {top_k} of {experts} experts a token")
    expert_bytes: dict[int, int] = {}
    for number, text in lines:
        if text == _COLUMNS:
            break
        layer = _LAYER.fullmatch(text)
        if layer is None or int(layer["layer"]) != len(expert_bytes):
            raise malformed(path, f"line {number}", f"is not '# layer={len(expert_bytes)} expert_bytes=N ...'")
        expert_bytes[int(layer["layer"])] = int(layer["nbytes"])
    if len(expert_bytes) != num_layers:
        raise malformed(path, f"line {number}", f"the bytes of {len(expert_bytes)} layers, line 2 says {num_layers}")
    return TraceHeader(
        layers=tuple(
            LayerInfo(f"layers.{index}", experts, top_k, options.native_top_k, expert_bytes[index])
            for index in range(num_layers)
        ),
        model=options.model or re.split(r"[/\\]", model["model"])[-1],
        source="bigmoe",
    )


@dataclass
class _Turn:
    """One turn as far as it is read: places of picks, and the lines they stand on."""

    number: int
    picks: dict[tuple[int, int], list[tuple[int, int, float]]] = field(default_factory=dict)
    """By (step, layer): line, expert, weight, in the order of their slots."""
    phases: dict[int, int] = field(default_factory=dict)
    """By step."""


def _sequences(path: Path, lines: Iterator[tuple[int, str]], header: TraceHeader) -> Iterator[Sequence]:
    turn: _Turn | None = None
    first_step, number = 0, 0
    for number, text in lines:
        if not text.strip():
            refuse_text_after(path, lines, number)
            break
        row = _row(path, number, text, header)
        if turn is None or row[0] != turn.number:
            if turn is not None:
                if row[0] < turn.number:
                    raise malformed(path, f"line {number}", f"turn {row[0]} after turn {turn.number}")
                sequence = _sequence(path, number - 1, turn, header, first_step)
                first_step = int(sequence.steps[-1]) + 1
                yield sequence
            turn = _Turn(row[0])
        _add(path, number, turn, row, header)
    if turn is None:
        raise malformed(path, f"line {number}", "there are no rows")
    yield _sequence(path, number, turn, header, first_step)


def _row(path: Path, number: int, text: str, header: TraceHeader) -> tuple[int, int, int, int, int, int, float]:
    where = f"line {number}"
    fields = text.split(",")
    if len(fields) != 9:
        raise malformed(path, where, f"{len(fields)} fields, there must be 9 ({_COLUMNS})")
    try:
        turn, phase, step, layer, slot, expert = (int(word) for word in fields[:6])
        weight = float(fields[6])
    except ValueError as error:
        raise malformed(path, where, str(error)) from None
    if phase not in (_PREFILL, _DECODE):
        raise malformed(path, where, f"phase {phase} is neither {_PREFILL} (prefill) nor {_DECODE} (decode)")
    if turn < 0 or not 0 <= step < 2**31:
        raise malformed(path, where, f"turn {turn}, step {step}")
    if not 0 <= layer < len(header.layers):
        raise malformed(path, where, f"layer {layer}, there are {len(header.layers)}")
    if not 0 <= slot < header.top_k:
        raise malformed(path, where, f"slot {slot}, there are {header.top_k}")
    if not 0 <= expert < header.layers[layer].num_experts:
        raise malformed(path, where, f"expert {expert}, there are {header.layers[layer].num_experts}")
    if not np.isfinite(weight):
        raise malformed(path, where, f"weight {weight}")
    return turn, phase, step, layer, slot, expert, weight


def _add(
    path: Path, number: int, turn: _Turn, row: tuple[int, int, int, int, int, int, float], header: TraceHeader
) -> None:
    _, phase, step, layer, slot, expert, weight = row
    where = f"line {number}"
    if turn.phases.setdefault(step, phase) != phase:
        raise malformed(path, where, f"step {step} is of the prompt and decoded")
    picks = turn.picks.setdefault((step, layer), [])
    if slot != len(picks):
        raise malformed(path, where, f"slot {slot} of step {step}, layer {layer} where slot {len(picks)} must follow")
    for line, other, _ in picks:
        if other == expert:
            raise malformed(path, where, f"expert {expert} twice in step {step}, layer {layer}; also on line {line}")
    picks.append((number, expert, weight))


def _sequence(path: Path, number: int, turn: _Turn, header: TraceHeader, first_step: int) -> Sequence:
    where = f"turn {turn.number}, which ends on line {number}"
    steps = sorted(turn.phases)
    order = [turn.phases[step] for step in steps]
    if order != sorted(order):
        raise malformed(path, where, "tokens of the prompt after decoded ones")
    shape = (len(steps), len(header.layers), header.top_k)
    experts = np.full(shape, NO_EXPERT, dtype=np.int32)
    weights = np.zeros(shape, dtype=np.float32)
    for token, step in enumerate(steps):
        for layer in range(shape[1]):
            picks = turn.picks.get((step, layer))
            if picks is None and order[token] == _PREFILL:
                continue
            if picks is None or len(picks) != header.top_k:
                last = f", the last on line {picks[-1][0]}" if picks else ""
                raise malformed(
                    path,
                    where,
                    f"step {step}, layer {layer} has {len(picks or ())} picks{last}; it must have {header.top_k}",
                )
            experts[token, layer] = [expert for _, expert, _ in picks]
            weights[token, layer] = [weight for _, _, weight in picks]
    phases, step_numbers = prompt_and_decode(order.count(_PREFILL), len(steps), first_step)
    name = f"{path.name.partition('.')[0]}/{turn.number}"
    return checked(Sequence(experts, step_numbers, phases, weights, name=name), header, path, where)
