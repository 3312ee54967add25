"""What goes on of a read that is given up, and what that makes of reads ahead of time."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_disk import READ_BYTES, FakeDisk, FakeLayer
from test_look_ahead_live import Rig

from moert.hf.model import runtime_of
from moert.policies import make_policy
from moert.predictors.base import Prediction
from moert.residency import Residency
from moert.runtime.pipeline import Pipeline
from moert.runtime.step import run_step
from moert.tiers.disk import DiskReader
from moert.tiers.native_reads import PIECE_BYTES
from moert.types import ExpertId

BEGUN_BYTES = 4096
"""Of a read in pieces, in a test."""


def test_pieces_are_the_extensions() -> None:
    header = (Path(__file__).parents[1] / "csrc" / "record.h").read_text()
    found = re.search(r"kChunkBytes = size_t\{1\} << (\d+);", header)
    assert found and 1 << int(found[1]) == PIECE_BYTES


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_what_is_given_up_is_what_the_lanes_hold(depth: int) -> None:
    with DiskReader(depth) as reader:
        assert reader.begun_bytes == max(1, depth // 2) * PIECE_BYTES
    with DiskReader(depth, prefetch_depth=depth) as reader:
        assert reader.begun_bytes == depth * PIECE_BYTES


@pytest.mark.parametrize(
    ("dtype", "options", "in_pieces"),
    [
        (torch.float32, {}, True),
        (torch.bfloat16, {}, True),  # moved into place by the threads that read
        (torch.float32, {"direct_io": False}, False),
    ],
)
def test_records_read_as_a_whole_are_not_given_up_in_pieces(
    load: Callable[..., Any],
    tiny_olmoe: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    options: dict[str, Any],
    in_pieces: bool,
) -> None:
    monkeypatch.setattr(DiskReader, "begun_bytes", BEGUN_BYTES)
    layer = runtime_of(load(tiny_olmoe, dtype, **options)).layers[0]
    if not all(file.direct for file in layer._know(0).plan.files) and in_pieces:
        pytest.skip("this file system has no O_DIRECT")
    assert layer.read_bytes(0) > BEGUN_BYTES
    assert layer.begun_bytes(0) == (BEGUN_BYTES if in_pieces else layer.read_bytes(0))


@pytest.mark.parametrize(("begun_bytes", "n_read"), [(READ_BYTES, 0), (READ_BYTES // 4, 1)])
def test_half_a_read_is_worth_it_where_the_rest_can_be_left(
    begun_bytes: int, n_read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needed as likely as not; .4 of it can be read in idle time, and then .6 or .25 delay others."""
    monkeypatch.setattr(FakeLayer, "begun_bytes", lambda self, expert: begun_bytes)
    rig = Rig()
    rig.learn(0.4)
    rig.told.next = [Prediction(1, [4, 5], [0, 1])]
    rig.step(0, [0], idle_s=0.4)
    assert len(rig.reading(1)) == n_read


@pytest.mark.parametrize("seed", range(10))
def test_what_was_given_up_and_holds_its_slot_keeps_no_step_from_ending(seed: int) -> None:
    """Steps larger than the cache that need it after all: who passes through waits for no slot that nobody frees."""
    for number in range(60):
        draw = random.Random(60 * seed + number)
        disk, capacity = FakeDisk(), draw.randint(1, 4)
        layer = FakeLayer(0, 8, capacity, disk)
        layer.residency = Residency(capacity, make_policy(draw.choice(["ema", "lru", "lfu"]), capacity))
        pipeline = Pipeline([layer], 8)
        for _ in range(12):
            some = [ExpertId(0, expert) for expert in draw.sample(range(8), draw.randint(0, 3))]
            pipeline.prefetch(some)
            pipeline.pump()
            for read in disk.reads:
                read.started = read.started or draw.random() < 0.5
                read.all_begun = read.all_begun or draw.random() < 0.2
            pipeline.withdraw([expert for expert in some if draw.random() < 0.6])
            event = sorted(draw.sample(range(8), draw.randint(1, 7)))
            out = run_step(
                layer,
                lambda hidden, weights: hidden * weights["w"],
                torch.ones(1, 1),
                torch.tensor([event]),
                torch.ones(1, len(event)),
                pipeline=pipeline,
                check=True,
            )
            assert out.item() == sum(map(layer.factor, event))
