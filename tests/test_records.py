"""Records: where an expert's bytes land, and that they are the right ones, whatever the file looks like."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.formats import RecordLayout, TensorSpec, format_names, make_format
from moert.runtime.records import MERGE_GAP_BYTES, Piece, Record, Source, Span, make_record, merge_spans
from moert.tiers.disk import ShardFile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def read(record: Record, files: list[ShardFile]) -> dict[str, torch.Tensor]:
    """Read a record as the runtime does and return its tensors."""
    buffer = memoryview(mmap.mmap(-1, record.buffer_bytes))
    for span, position in zip(record.reads, record.positions, strict=True):
        files[span.file].read(span.offset, span.nbytes, buffer[position : position + span.window_bytes])
    raw = torch.frombuffer(buffer, dtype=torch.uint8)
    if record.is_direct:
        return record.layout.views(raw)
    slot = torch.full((record.slot_bytes,), 0xFF, dtype=torch.uint8)
    record.fill(raw, slot)
    return record.layout.views(slot)


spans = st.lists(
    st.builds(Span, st.integers(0, 2), st.integers(0, 400_000), st.integers(1, 50_000)), min_size=1, max_size=8
)


@given(spans=spans)
def test_merged_reads_cover_every_span_once(spans: list[Span]) -> None:
    reads = merge_spans(spans)
    for span in spans:
        assert sum(r.file == span.file and r.offset <= span.offset and span.end <= r.end for r in reads) == 1
    for a in reads:
        for b in reads:
            assert a is b or a.file != b.file or abs(a.offset - b.end) > MERGE_GAP_BYTES or a.offset < b.end
    assert sum(r.nbytes for r in reads) <= sum(s.nbytes for s in spans) + MERGE_GAP_BYTES * (len(spans) - len(reads))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_record_gives_the_tensors_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Two tensors of one to three pieces each, anywhere in two files, in any order, in any dtype."""
    folder = tmp_path_factory.mktemp("record")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    contents = [bytearray(data.draw(st.integers(0, 9000), "header bytes")) for _ in range(2)]
    specs, sources, expected = [], [], {}
    for name in ("up", "down"):
        columns = data.draw(st.integers(1, 40), "columns")
        dtype = data.draw(st.sampled_from(DTYPES), "model dtype")
        pieces, parts = [], []
        for number in range(data.draw(st.integers(1, 3), "pieces")):
            file = data.draw(st.integers(0, 1), "file")
            stored = data.draw(st.sampled_from([dtype, *DTYPES]), "stored dtype")
            rows = data.draw(st.integers(1, 60), "rows")
            part = torch.randn(rows, columns, generator=generator).to(stored)
            contents[file] += bytes(data.draw(st.sampled_from([0, 0, 0, 2, 7, 5000, 70_000]), "gap"))
            raw = part.contiguous().view(torch.uint8).numpy().tobytes()
            pieces.append(Piece(Span(file, len(contents[file]), len(raw)), (rows, columns), stored, f"{name}{number}"))
            contents[file] += raw
            parts.append(part.to(dtype))
        expected[name] = torch.cat(parts)
        transpose = data.draw(st.booleans(), "transpose")
        if transpose:
            expected[name] = expected[name].T.contiguous()
        convert = (lambda tensors: torch.cat([t.to(torch.float32) for t in tensors]).T) if transpose else None
        specs.append(TensorSpec(name, tuple(expected[name].shape), dtype))
        sources.append(Source(tuple(pieces), convert))
    files = []
    for number, content in enumerate(contents):
        path = folder / f"{number}.bin"
        path.write_bytes(content + b"end")
        files.append(ShardFile(path))
    record = make_record(specs, sources)
    assert record.slot_bytes % 4096 == 0
    assert record.read_bytes == record.buffer_bytes
    got = read(record, files)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].dtype == tensor.dtype
    for file in files:
        file.close()


def test_neighbours_are_read_at_once_and_used_where_they_land(tmp_path: Path) -> None:
    """The order of a hub file: down, gate, up side by side; gate and up are one tensor of the model."""
    down, gate, up = torch.randn(16, 8), torch.randn(8, 16), torch.randn(8, 16)
    path = tmp_path / "shard"
    path.write_bytes(bytes(1000) + b"".join(t.numpy().tobytes() for t in (down, gate, up)) + bytes(9))
    size = down.nbytes
    pieces = {
        name: Piece(Span(0, 1000 + i * size, size), shape, torch.float32, name)
        for i, (name, shape) in enumerate({"down": (16, 8), "gate": (8, 16), "up": (8, 16)}.items())
    }
    specs = [TensorSpec("gate_up", (16, 16), torch.float32), TensorSpec("down", (16, 8), torch.float32)]
    record = make_record(specs, [Source((pieces["gate"], pieces["up"]), None), Source((pieces["down"],), None)])
    assert record.is_direct
    assert record.reads == (Span(0, 1000, 3 * size),)
    with ShardFile(path) as file:
        got = read(record, [file])
    assert torch.equal(got["gate_up"], torch.cat([gate, up]))
    assert torch.equal(got["down"], down)
    swapped = make_record(specs, [Source((pieces["up"], pieces["gate"]), None), Source((pieces["down"],), None)])
    assert not swapped.is_direct


@pytest.mark.parametrize("name", format_names())
def test_format_keeps_its_word(name: str) -> None:
    """What `stored` announces is what `encode` makes, and `decode` gives the tensors back; mxfp4 at a quarter."""
    form = make_format(name)
    tensors = {"gate_up_proj": torch.randn(32, 64, dtype=torch.bfloat16), "down_proj": torch.randn(64, 32)}
    specs = [TensorSpec(key, tuple(value.shape), value.dtype) for key, value in tensors.items()]
    encoded = form.encode(tensors)
    assert {spec.name: (spec.shape, spec.dtype) for spec in form.stored(specs)} == {
        key: (tuple(value.shape), value.dtype) for key, value in encoded.items()
    }
    for key, value in form.decode(encoded).items():
        assert value.shape == tensors[key].shape
        assert torch.allclose(value.float(), tensors[key].float(), atol=0.26 * tensors[key].float().abs().max())


def test_packed_layout_is_aligned_and_disjoint() -> None:
    specs = [
        TensorSpec("a", (3,), torch.float32),
        TensorSpec("b", (5, 7), torch.bfloat16),
        TensorSpec("c", (0,), torch.float32),
    ]
    layout = RecordLayout.packed(specs)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for value, view in enumerate(layout.views(buffer).values(), start=1):
        view.fill_(value)
    for value, (spec, view) in enumerate(zip(specs, layout.views(buffer).values(), strict=True), start=1):
        assert view.shape == spec.shape
        assert (view == value).all()
    assert all(offset % 64 == 0 for offset in layout.offsets)
