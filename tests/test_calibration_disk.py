"""The disk as it is calibrated: whatever records the layers have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fault_support import FileSource

from moert.calibration._disk import Disk
from moert.calibration.subject import Subject
from moert.formats import TensorSpec
from moert.policies import make_policy
from moert.residency import Residency
from moert.runtime.layer import LayerSpec, ParameterLayer
from moert.runtime.records import Piece, Record, Source, Span, make_record
from moert.tiers.disk import BLOCK_BYTES, ShardFile

EXPERTS = 2


def refused(*_: Any) -> Any:
    raise AssertionError("only the disk is timed")


def test_a_layer_whose_records_begin_within_a_block(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(bytes(32 * BLOCK_BYTES))
    spec = TensorSpec("w", (2 * BLOCK_BYTES,), torch.uint8)

    def record(offset: int) -> Record:
        piece = Piece(Span(0, offset, spec.nbytes), spec.shape, spec.dtype, "w")
        return make_record([spec], [Source((piece,), None)])

    places = [[0, 2 * BLOCK_BYTES], [4 * BLOCK_BYTES + 8, 6 * BLOCK_BYTES + 8]]
    with ShardFile(path) as file:
        source = FileSource([file], [[record(offset) for offset in layer] for layer in places])
        layers = [
            ParameterLayer(
                LayerSpec(index, f"layers.{index}", EXPERTS, (spec,)),
                Residency(EXPERTS, make_policy("lru", EXPERTS)),
                [],
            )
            for index in range(len(places))
        ]
        subject = Subject(layers, source, io_depth=2, run=refused, generate=refused, disk_s=refused, forward_tokens=[])
        with Disk(subject) as disk:
            assert disk.alone().seconds > 0
