"""A small model of experts in real files, records of every kind, and a runtime over a disk that fails when told to."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from faulty_disk import FaultyDisk

from moert.config import OffloadConfig
from moert.formats import RecordLayout, TensorSpec
from moert.runtime.building import runtime_in_parameters, runtime_in_slots
from moert.runtime.layer import LayerSpec
from moert.runtime.pack_file import PackedLayer, checksum, read_pack_file
from moert.runtime.records import Piece, Record, Source, Span, make_record
from moert.runtime.runtime import OffloadRuntime
from moert.tiers.disk import ShardFile

D, F, E, TOP_K = 32, 128, 6, 2
DIRECT, CHECKED, STAGED, STAGED_CHECKED = LAYERS = range(4)
"""The layers: read into place; the same with a checksum; converted from two files; converted, with a checksum."""
HAS_CHECKSUM = (CHECKED, STAGED_CHECKED)
SHAPES = {"up": (F, D), "down": (D, F)}
RECORD_BYTES = 2 * F * D * 4

Tensors = Mapping[str, torch.Tensor]


def compute(hidden: torch.Tensor, weights: Tensors) -> torch.Tensor:
    return torch.tanh(hidden @ weights["up"].T) @ weights["down"].T


@dataclass(frozen=True)
class FileSource:
    """The records, with the files open."""

    files: Sequence[ShardFile]
    records: Sequence[Sequence[Record]]

    def record(self, layer: int, expert: int) -> Record:
        return self.records[layer][expert]

    def close(self) -> None:
        for file in self.files:
            file.close()


class Experts:
    """The experts' numbers, and the files they are in. A runtime over them is `runtime(...)`, as often as wanted."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(1)
        self.weights: list[list[Tensors]] = [
            [
                {name: torch.randn(shape, generator=generator).bfloat16().float() for name, shape in SHAPES.items()}
                for _ in range(E)
            ]
            for _ in LAYERS
        ]
        wide = tuple(TensorSpec(name, shape, torch.float32) for name, shape in SHAPES.items())
        self.specs = [LayerSpec(layer, f"layers.{layer}", E, wide, TOP_K) for layer in LAYERS]
        names = ("direct", "checked", "up", "down", "staged_checked")
        self.paths = [str(folder / f"{name}.safetensors") for name in names]
        # Behind an odd header: a record begins and ends within a block that belongs to its neighbours as well.
        images = [
            bytes(400) + b"".join(_bytes(expert, torch.float32) for expert in self.weights[DIRECT]),
            self._pack(CHECKED, torch.float32),
            bytes(402) + b"".join(_bytes({"up": e["up"]}, torch.bfloat16) for e in self.weights[STAGED]),
            bytes(80) + b"".join(_bytes({"down": e["down"]}, torch.bfloat16) for e in self.weights[STAGED]),
            self._pack(STAGED_CHECKED, torch.bfloat16),
        ]
        for path, image in zip(self.paths, images, strict=True):
            Path(path).write_bytes(image)
        self._states = [(image, os.stat(path)) for path, image in zip(self.paths, images, strict=True)]

    def _pack(self, layer: int, dtype: torch.dtype) -> bytes:
        layout = RecordLayout.packed([TensorSpec(name, shape, dtype) for name, shape in SHAPES.items()])
        about = PackedLayer(layer, f"layers.{layer}", E, "plain", layout, "a checkpoint", "0")
        records = []
        for expert in self.weights[layer]:
            image = torch.zeros(about.record_bytes, dtype=torch.uint8)
            for name, view in layout.views(image).items():
                view.copy_(expert[name])
            records.append(bytes(image.tolist()))
        checksums = [checksum(memoryview(record)[: layout.nbytes]) for record in records]
        return about.header(checksums) + b"".join(records)

    def restore(self, file: int) -> None:
        """Make a file what it was at the beginning, time stamp included."""
        image, status = self._states[file]
        with open(self.paths[file], "r+b") as writer:
            writer.write(image)
            writer.truncate()
        os.utime(self.paths[file], ns=(status.st_atime_ns, status.st_mtime_ns))

    def source(self, disk: FaultyDisk | None = None, *, direct: bool = True) -> FileSource:
        """The records; with `disk`, every call goes through it."""
        options = {} if disk is None else {"calls": disk.calls}
        files = [ShardFile(path, direct=direct, **options) for path in self.paths]
        packs = {CHECKED: read_pack_file(self.paths[1]), STAGED_CHECKED: read_pack_file(self.paths[4])}
        records = []
        for layer in LAYERS:
            wanted = self.specs[layer].tensors
            if layer in packs:
                pack, file = packs[layer], 1 if layer == CHECKED else 4
                records.append([pack.record(file, expert, wanted) for expert in range(E)])
                continue
            of_layer = []
            for expert in range(E):
                if layer == DIRECT:
                    spans = [Span(0, 400 + expert * RECORD_BYTES + i * F * D * 4, F * D * 4) for i in range(2)]
                else:
                    spans = [Span(2 + i, begin + expert * F * D * 2, F * D * 2) for i, begin in enumerate((402, 80))]
                dtype = torch.float32 if layer == DIRECT else torch.bfloat16
                of_layer.append(
                    make_record(
                        wanted,
                        [
                            Source((Piece(span, spec.shape, dtype, spec.name),), None)
                            for span, spec in zip(spans, wanted, strict=True)
                        ],
                    )
                )
            records.append(of_layer)
        for layer in LAYERS:
            assert records[layer][0].is_direct == (layer in (DIRECT, CHECKED))
        return FileSource(files, records)

    def runtime(self, disk: FaultyDisk | None = None, *, direct: bool = True, **options: object) -> OffloadRuntime:
        """A runtime over `source`, everything checked after every step."""
        settings: dict[str, object] = {
            "preload": False,
            "debug": True,
            "shrink_on_pressure": False,
            "io_depth": 4,
            **options,
        }
        config = OffloadConfig(**settings)  # type: ignore[arg-type]  # what the tests pass is right
        return runtime_in_slots(self.specs, self.source(disk, direct=direct), config)

    def undisturbed(self) -> OffloadRuntime:
        """A runtime without a disk."""
        return runtime_in_parameters(self.specs, self.weights, OffloadConfig())


def _bytes(tensors: Tensors, dtype: torch.dtype) -> bytes:
    return b"".join(bytes(tensors[name].to(dtype).view(torch.uint8).flatten().tolist()) for name in tensors)


Routing = Sequence[Sequence[int]]


def step(runtime: OffloadRuntime, layer: int, routing: Routing) -> torch.Tensor:
    """One step; each token goes to the experts that `routing` says. The same tokens and weights each time."""
    generator = torch.Generator().manual_seed(len(routing))
    hidden = torch.randn(len(routing), D, generator=generator)
    weights = torch.rand(len(routing), len(routing[0]), generator=generator) + 0.1
    return runtime.run(layer, compute, hidden, torch.tensor(routing), weights)


ROUTING = [[0, 1], [3, 1], [3, 4]]
NEEDED = (0, 1, 3, 4)


def right(experts: Experts, layer: int, routing: Routing = ROUTING) -> torch.Tensor:
    """What `step` computes, by a runtime without a disk."""
    with experts.undisturbed() as reference:
        return step(reference, layer, routing)


def formula(experts: Experts, layer: int, routing: Routing) -> torch.Tensor:
    """What `step` computes, pick by pick in double precision."""
    generator = torch.Generator().manual_seed(len(routing))
    hidden = torch.randn(len(routing), D, generator=generator).double()
    weights = torch.rand(len(routing), len(routing[0]), generator=generator) + 0.1
    out = torch.zeros_like(hidden)
    for token, picks in enumerate(routing):
        for k, expert in enumerate(picks):
            wide = {name: tensor.double() for name, tensor in experts.weights[layer][expert].items()}
            out[token] += weights[token, k].double() * compute(hidden[token], wide)
    return out


def read_threads() -> list[str]:
    """The reader's threads there are now."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moert")]


def is_arena(address: int) -> bool:
    """Whether an arena is at an address: memory that a fork does not get, which nobody else asks for."""
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for mapping in mappings[1:]:
        begin, end = (int(part, 16) for part in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return " wf" in mapping[mapping.index("VmFlags:") :]
    return False


def check_books(runtime: OffloadRuntime, experts: Experts) -> None:
    """Nothing is lost, nothing is held twice, and every resident has the right bits."""
    runtime.pipeline.check_integrity()
    for layer in runtime.layers:
        layer.residency.check_integrity()
        for expert in layer.residency.residents:
            for name, tensor in layer.weights(expert.expert).items():
                assert torch.equal(tensor, experts.weights[expert.layer][expert.expert][name]), (expert, name)
        assert layer.stats.resident_bytes == len(layer.residency) * layer.spec.expert_bytes
    staging, depth = runtime._staging, runtime.config.io_depth
    assert staging is not None
    assert depth is not None
    lent = [transfer.fetch.staging.index for transfer in runtime.pipeline._in_flight.values() if transfer.fetch.staging]
    assert sorted(lent + staging._free) == list(range(2 * depth))
