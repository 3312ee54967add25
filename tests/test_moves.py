"""Records that the extension converts: the bytes of torch's own conversion, or else torch's conversion."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from families import LAYOUT_FAMILIES, Zoo, save, transpose_fused_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from native_support import await_native, unreadable
from pack_support import make_pack

import moert
from moert import _C
from moert.errors import CorruptFileError
from moert.formats import TensorSpec
from moert.hf.model import runtime_of
from moert.runtime import layer as layers
from moert.runtime import moves
from moert.runtime.layer import SlotLayer
from moert.runtime.moves import moves_of
from moert.runtime.records import Convert, Piece, Record, Source, Span, make_record
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import DiskReader, Moving, PlannedRead, Priority, Read, ReadHandle, ShardFile
from moert.tiers.native_reads import NativeHandle
from moert.tiers.thread_reads import ThreadHandle

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SLOT_BYTES = 1 << 20
PATIENCE_S = 20.0
Tensors = Sequence[torch.Tensor]


@pytest.fixture(scope="module")
def slots() -> Iterator[SlotBank]:
    """A buffer, a slot, and another slot."""
    arena = HostArena(3 * SLOT_BYTES)
    yield SlotBank(arena, 0, SLOT_BYTES, 3)
    arena.close()


@pytest.fixture(scope="module")
def content() -> bytes:
    """Every 16-bit number there is, twice, so that half the 32-bit ones begin or end with it; and anything else."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    wide = torch.cat([every << 16, every, (every << 16) + 0x8000, (every << 16) + 0x7FFF])
    head = every.to(torch.uint16).view(torch.uint8).numpy().tobytes() + wide.view(torch.uint8).numpy().tobytes()
    return head + random.Random(3).randbytes(1000)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Iterator[ShardFile]:
    path = tmp_path_factory.mktemp("moves") / "shard.safetensors"
    path.write_bytes(content)
    with ShardFile(path) as file:
        if not file.direct:
            pytest.skip("this file system has no O_DIRECT")
        yield file


def record_of(
    shape: Sequence[int],
    pieces: Sequence[Sequence[int]],
    offsets: Sequence[int],
    dtypes: Sequence[torch.dtype],
    convert: Convert | None,
) -> Record:
    """A record of one tensor in dtypes[0], from pieces in dtypes[1]."""
    to, of = dtypes
    made = []
    for piece, offset in zip(pieces, offsets, strict=True):
        nbytes = torch.Size(piece).numel() * of.itemsize
        made.append(Piece(Span(0, offset, nbytes), tuple(piece), of, "piece"))
    return make_record([TensorSpec("tensor", tuple(shape), to)], [Source(tuple(made), convert)])


def read(record: Record, file: ShardFile, slots: SlotBank) -> tuple[torch.Tensor, torch.Tensor]:
    """What the extension makes of a record, and what torch makes of it."""
    moves = moves_of(record)
    assert moves is not None
    buffer, slot, other = (torch.frombuffer(slots.slot(i), dtype=torch.uint8) for i in range(3))
    for memory in (buffer, slot, other):
        memory.fill_(0xA5)
    reads = [
        Read(file, span.offset, span.nbytes, slots.slot(0)[position : position + span.window_bytes])
        for span, position in zip(record.reads, record.positions, strict=True)
    ]
    with DiskReader(2) as reader:
        handle = reader.submit_read(reads, finish=lambda _: None, moving=Moving(moves, slots.slot(0), slots.slot(1)))
        assert isinstance(handle, NativeHandle)
        handle.wait(PATIENCE_S)
    record.fill(buffer, other)
    end = record.layout.nbytes
    assert (slot[end:] == 0xA5).all()
    return slot[:end], other[:end]


def assert_same(found: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    """The same bits, but for which NaN it is: torch has several for one number, by where it stands."""
    a, b = found.view(dtype), right.view(dtype)
    nan = b.isnan()
    assert torch.equal(a.isnan(), nan)
    whole = torch.int32 if dtype.itemsize == 4 else torch.int16
    assert torch.equal(a.view(whole)[~nan], b.view(whole)[~nan])


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("of", FLOATS)
def test_every_number_becomes_what_torch_makes_of_it(
    of: torch.dtype, to: torch.dtype, file: ShardFile, slots: SlotBank
) -> None:
    """All 16-bit numbers; of 32-bit ones those next to a 16-bit one, half-way between two, and just below that."""
    begin = 131072 if of is torch.float32 else 0
    count = (3 if to is torch.float32 else 4) << 16 if of is torch.float32 else 1 << 16
    if to is torch.float32:
        count = min(count, SLOT_BYTES // 4 - 1024)
    record = record_of((count // 256, 256), [(256, count // 256)], [begin], (to, of), lambda t: t[0].T.contiguous())
    found, right = read(record, file, slots)
    assert_same(found, right, to)
    assert right.view(to).isnan().any()
    assert right.view(to).isinf().any()
    flat = record_of((count,), [(count,)], [begin], (to, of), lambda t: t[0].reshape(-1))
    found, right = read(flat, file, slots)
    assert_same(found, right, to)


def test_on_every_instruction_set(isa: str, file: ShardFile, slots: SlotBank) -> None:
    for of in FLOATS:
        for to in FLOATS:
            record = record_of((70, 33), [(33, 70)], [1001], (to, of), lambda t: t[0].T.contiguous())
            assert_same(*read(record, file, slots), to)


@given(data=st.data())
@settings(max_examples=60)
def test_any_piece_in_any_place(data: st.DataObject, file: ShardFile, slots: SlotBank) -> None:
    """Turned, cut, put together along either dimension, from wherever the pieces are, odd addresses among them."""
    to, of = (data.draw(st.sampled_from(FLOATS)) for _ in range(2))
    rows, columns = (data.draw(st.integers(1, 100)) for _ in range(2))
    count = data.draw(st.integers(1, 3))
    offsets = data.draw(st.lists(st.integers(0, 400_000), min_size=count, max_size=count))
    dim = data.draw(st.integers(0, 1))
    how = data.draw(st.sampled_from(["cat", "turn and cat", "half and cat", "stacked"]))

    def convert(tensors: Tensors) -> torch.Tensor:
        if how == "turn and cat":
            tensors = [tensor.T.contiguous() for tensor in tensors]
        elif how == "half and cat":
            tensors = [torch.chunk(tensor, 2, dim=1 - dim)[0].contiguous() for tensor in tensors]
        elif how == "stacked":
            tensors = [torch.stack([tensor], dim=0)[0] for tensor in tensors]
        return torch.cat(list(tensors), dim=dim)

    shape = tuple(convert([torch.empty(rows, columns) for _ in offsets]).shape)
    record = record_of(shape, [(rows, columns)] * count, offsets, (to, of), convert)
    if not record.is_direct:
        assert_same(*read(record, file, slots), to)


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t[0] * 2,
        lambda t: t[0].add_(1),
        lambda t: t[0].flip(0),
        lambda t: t[0].double(),
        lambda t: t[0].view(torch.int16),
        lambda t: t[0][[1, 0]],
        lambda t: torch.zeros(2, 64),
        lambda t: torch.stack([t[0], t[0]])[0],
        lambda t: torch.cat([t[0], t[0]])[1:3],
        lambda t: t[0][:1],
        lambda t: t[0].clone() if t[0].sum() > 0 else t[0],
    ],
)
def test_what_is_more_than_moving_is_left_to_torch(convert: Convert) -> None:
    assert moves_of(record_of((2, 64), [(2, 64)], [0], (torch.bfloat16, torch.bfloat16), convert)) is None


def test_other_numbers_are_left_to_torch() -> None:
    for of in (torch.float64, torch.float8_e4m3fn):
        assert moves_of(record_of((2, 64), [(2, 64)], [0], (torch.bfloat16, of), None)) is None


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t[0].transpose(0, 1).contiguous(),
        lambda t: torch.concat([part.T for part in t[0].chunk(2)], 1),
        lambda t: t[0].T.reshape(64, 2),
    ],
)
def test_inference_mode_makes_no_difference(convert: Convert, file: ShardFile, slots: SlotBank) -> None:
    record = record_of((64, 2), [(2, 64)], [9], (torch.bfloat16, torch.bfloat16), convert)
    with torch.inference_mode():
        assert moves_of(record) is not None
        assert_same(*read(record, file, slots), torch.bfloat16)


def test_an_interrupt_while_a_conversion_is_watched_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of((64, 2), [(2, 64)], [9], (torch.bfloat16, torch.bfloat16), lambda t: t[0].T)

    def interrupted(watch: moves._Watch, *args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moves._Watch, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            moves_of(record)
    assert not torch._C._len_torch_dispatch_stack()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.cat([torch.zeros(1), torch.ones(1)]), torch.tensor([0.0, 1.0]))
    assert moves_of(record) is not None


def test_a_tensor_of_no_numbers_takes_no_moves() -> None:
    record = record_of((4, 0), [(0, 4)], [9], (torch.bfloat16, torch.bfloat16), lambda t: t[0].T)
    assert moves_of(record) is not None


def test_whatever_lies_side_by_side_moves_as_bytes(file: ShardFile, slots: SlotBank) -> None:
    record = record_of((4, 64), [(2, 64), (2, 64)], [9, 5000], (torch.uint8, torch.uint8), None)
    found, right = read(record, file, slots)
    assert torch.equal(found, right)


class TestWhoConverts:
    def reads(self, file: ShardFile, slots: SlotBank) -> tuple[list[Read], Moving]:
        moves = _C.moves([(3, 3, 1, 1000, 77, 0, 1, 64, 0)])
        return [Read(file, 77, 1000, slots.slot(0))], Moving(moves, slots.slot(0), slots.slot(1))

    def test_the_extension(self, file: ShardFile, slots: SlotBank, content: bytes) -> None:
        reads, moving = self.reads(file, slots)
        called: list[object] = []
        with DiskReader(2) as reader:
            assert reader.submit_read(reads, finish=called.append, moving=moving).wait(PATIENCE_S) == (77,)
        assert slots.slot(1)[64:1064] == content[77:1077]
        assert called == []

    def test_python_where_it_had_to_read(self, file: ShardFile, slots: SlotBank) -> None:
        reads, moving = self.reads(file, slots)
        called: list[object] = []
        slots.slot(1)[64:1064] = bytes(1000)
        with DiskReader(2) as reader:
            with unreadable(file):
                handle = reader.submit_read(reads, finish=called.append, moving=moving)
                await_native(handle)
            assert handle.wait(PATIENCE_S) == (77,)
            assert called == [(77,)]
        assert slots.slot(1)[64:1064] == bytes(1000)

    def test_an_error_there_is_the_records(self, file: ShardFile, slots: SlotBank) -> None:
        reads, moving = self.reads(file, slots)

        def fail(_: object) -> None:
            raise CorruptFileError("no good")

        reader = DiskReader(2)
        with unreadable(file):
            handle = reader.submit_read(reads, finish=fail, moving=moving)
            await_native(handle)
        reader.close()
        with pytest.raises(CorruptFileError, match="no good"):
            handle.wait(PATIENCE_S)

    def test_memory_is_held_until_then(self, file: ShardFile) -> None:
        source, destination = mmap.mmap(-1, 8192), mmap.mmap(-1, 4096)
        moves = _C.moves([(3, 3, 1, 1000, 77, 0, 1, 64, 0)])
        reader = DiskReader(2)
        _C.reader_set_lanes(reader._reads.native._reader, file.identity.device, 0, 0)
        moving = Moving(moves, memoryview(source), memoryview(destination))
        handle = reader.submit_read([Read(file, 77, 1000, memoryview(source))], moving=moving)
        del moving
        with pytest.raises(BufferError):
            destination.close()
        assert handle.cancel()
        destination.close()
        reader.close()


@pytest.mark.parametrize(
    "move",
    [
        (4, 4, 1, 1, 0, 0, 1, 0, 0),
        (-1, 0, 1, 1, 0, 0, 1, 0, 0),
        (3, 0, 1, 1, 0, 0, 1, 0, 0),
        (0, 1, 0, 1, 0, 0, 1, 0, 0),
        (0, 1, 1, 1, 0, 0, 1, 1, 0),
        (0, 1, 1 << 40, 1, 0, 1 << 40, 1, 0, 0),
        (0, 1, 1 << 60, 1, 0, 0, 1, 0, 0),
    ],
)
def test_moves_that_cannot_be(move: tuple[int, int, int, int, int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be moved"):
        _C.moves([move])


@pytest.mark.parametrize(
    ("source_bytes", "destination", "destination_bytes"), [(1076, 8192, 4096), (1077, 8192, 1063), (1077, 8256, 4096)]
)
def test_moves_need_their_memory(source_bytes: int, destination: int, destination_bytes: int) -> None:
    moves = _C.moves([(3, 3, 1, 1000, 77, 0, 1, 64, 0)])
    reader = _C.reader_open(2, 1, _C.busy_clock())
    with pytest.raises(ValueError, match="moves of 1077 bytes into 1064"):
        _C.reader_submit(reader, 0, 1, [], (moves, 4096, source_bytes, destination, destination_bytes))


class TestModels:
    """Real families' conversions: what `moves_of` says of them, and the same bits with and without it."""

    def experts(self, folder: Path, dtype: torch.dtype) -> tuple[list[dict[str, torch.Tensor]], set[bool]]:
        with moert.load(folder, dtype=dtype, host_memory="40%", preload=False) as model:
            runtime = runtime_of(model)
            found = [
                runtime.weights(layer, expert)
                for layer, cache in enumerate(runtime.layers)
                for expert in range(cache.spec.num_experts)
            ]
            moved = {
                known.plan.moves is not None
                for cache in runtime.layers
                if isinstance(cache, SlotLayer)
                for known in cache._known
                if known is not None and not known.record.is_direct
            }
        return found, moved

    @pytest.mark.parametrize(
        ("family", "is_turned"),
        [
            *((family, False) for family in LAYOUT_FAMILIES if family in ("mixtral", "ernie4_5_vl_moe", "dbrx")),
            ("qwen3_vl_moe", True),
        ],
    )
    def test_the_same_bits(
        self, family: str, is_turned: bool, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(zoo.specimen(family).model, tmp_path)
        if is_turned:
            transpose_fused_experts(tmp_path)
        for dtype in (torch.float32, torch.bfloat16):
            with monkeypatch.context() as patch:
                patch.setattr(layers, "moves_of", lambda record: None)
                right, by_torch = self.experts(tmp_path, dtype)
            found, moved = self.experts(tmp_path, dtype)
            assert by_torch in ({False}, set())
            assert moved in ({True}, set())
            assert moved == {True} or dtype is torch.float32
            for a, b in zip(found, right, strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[name], b[name]) for name in a)

    def test_a_pack_is_read_without_python_once_it_is_checked(self, tiny_olmoe: Path, tmp_path: Path) -> None:
        make_pack(tiny_olmoe, tmp_path / "pack")
        kinds: list[type] = []
        submit = DiskReader.submit_planned

        def noting(self: DiskReader, wanted: Sequence[PlannedRead], priority: Priority) -> Sequence[ReadHandle]:
            handles = submit(self, wanted, priority)
            kinds.extend(map(type, handles))
            return handles

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiskReader, "submit_planned", noting)
            with moert.load(tmp_path / "pack", host_memory="40%", preload=False) as model:
                runtime = runtime_of(model)
                for _ in range(2):
                    for expert in range(runtime.layers[0].spec.num_experts):
                        runtime.weights(0, expert)
                    kinds.append(int)
        first, second = kinds[: kinds.index(int)], kinds[kinds.index(int) + 1 : -1]
        assert set(first) == {ThreadHandle}
        assert second
        assert set(second) == {NativeHandle}


def test_a_conversion_is_looked_at_once(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Record] = []

    def noting(record: Record) -> object | None:
        asked.append(record)
        return moves_of(record)

    monkeypatch.setattr(layers, "moves_of", noting)
    with moert.load(tiny_olmoe, dtype=torch.bfloat16, host_memory="40%", preload=False) as model:
        runtime = runtime_of(model)
        for expert in (0, 1, 2, 3, 4, 5, 6, 7, 0, 1):
            runtime.weights(0, expert)
    assert len(asked) == 8
