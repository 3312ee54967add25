"""Whether the extension or torch converts a record, and on which thread that is found out."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import moves_support
import pytest
import torch
from families import LAYOUT_FAMILIES, Zoo, save, transpose_fused_experts
from moves_support import PATIENCE_S, assert_same, read, record_of
from native_support import await_native, unreadable
from pack_support import make_pack

import moert
from moert import _C
from moert.errors import CorruptFileError
from moert.hf.model import runtime_of
from moert.runtime import moves, slot_layer
from moert.runtime.moves import moves_of
from moert.runtime.records import Convert, Record
from moert.runtime.slot_layer import SlotLayer
from moert.tiers.arena import SlotBank
from moert.tiers.disk import DiskReader, Moving, PlannedRead, Priority, Read, ReadHandle, ShardFile
from moert.tiers.native_reads import NativeHandle
from moert.tiers.thread_reads import ThreadHandle

slots, content, file = moves_support.slots, moves_support.content, moves_support.file


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
                patch.setattr(slot_layer, "moves_of", lambda record: None)
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

    monkeypatch.setattr(slot_layer, "moves_of", noting)
    with moert.load(tiny_olmoe, dtype=torch.bfloat16, host_memory="40%", preload=False) as model:
        runtime = runtime_of(model)
        for expert in (0, 1, 2, 3, 4, 5, 6, 7, 0, 1):
            runtime.weights(0, expert)
    assert len(asked) == 8
