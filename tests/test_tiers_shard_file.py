from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import disk_support
import pytest
from disk_support import PATIENCE_S, SIZE, SLOT_BYTES, Disk, Gate, os_error, submit_block

from moert.errors import CorruptFileError, MoertError, TransferError
from moert.tiers import shard_file
from moert.tiers.arena import SlotBank
from moert.tiers.disk import BLOCK_BYTES, DiskReader, FileCalls, ShardFile, window_bytes

arena, slots, gate = disk_support.arena, disk_support.slots, disk_support.gate
content, path = disk_support.content, disk_support.path
nothing_is_left_behind = disk_support.nothing_is_left_behind


@pytest.fixture(autouse=True)
def every_fall_back_warns_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "_warned_devices", set())


def refusing_open(code: int) -> Callable[[str, int], int]:
    def open_(path: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code), path)
        return os.open(path, flags)

    return open_


class TestShardFile:
    @pytest.mark.parametrize("mode", ["direct", "buffered", "refused at open", "refused at first read"])
    def test_any_range_reads_the_files_own_bytes(
        self, path: Path, content: bytes, slots: SlotBank, mode: str, recwarn: pytest.WarningsRecorder
    ) -> None:
        calls = {
            "refused at open": FileCalls(open=refusing_open(errno.EINVAL)),
            "refused at first read": FileCalls(preadv=Disk(os_error(errno.EINVAL)).preadv),
        }.get(mode, FileCalls())
        rng = random.Random(3)
        ranges = [
            (0, 1),
            (0, BLOCK_BYTES),
            (BLOCK_BYTES - 1, 2),
            (SIZE - 1, 1),
            (SIZE - 1234, 1234),
            (SIZE - 5000, 5000),
        ]
        ranges += [(BLOCK_BYTES, SLOT_BYTES), (SIZE - 100_000, 100_000)]
        for _ in range(150):
            nbytes = rng.choice([1, 100, 5000, 70_000, 900_000])
            ranges.append((rng.randrange(SIZE - nbytes + 1), nbytes))
        slot = slots.slot(0)
        with ShardFile(path, direct=mode != "buffered", calls=calls) as file:
            for offset, nbytes in ranges:
                slots.poison(0)
                start = file.read(offset, nbytes, slot)
                assert start == offset % BLOCK_BYTES
                assert slot[start : start + nbytes] == content[offset : offset + nbytes]
            assert file.direct == (mode == "direct")
            assert file.size == SIZE
        assert len(recwarn) == (1 if "refused" in mode else 0)

    def test_the_window_is_the_least_that_is_enough(self, path: Path, slots: SlotBank) -> None:
        assert window_bytes(0, 1) == BLOCK_BYTES
        assert window_bytes(4095, 2) == 2 * BLOCK_BYTES
        assert window_bytes(4096, 4096) == BLOCK_BYTES
        with ShardFile(path) as file:
            assert file.window_bytes(4095, 4098) == 3 * BLOCK_BYTES
            file.read(4095, 4098, slots.slot(0)[: 3 * BLOCK_BYTES])
            with pytest.raises(ValueError, match="12288 bytes, not 12287"):
                file.read(4095, 4098, slots.slot(0)[: 3 * BLOCK_BYTES - 1])

    def test_a_file_without_o_direct_support_warns_once_per_file_system(self, path: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.write_bytes(b"x")
        calls = FileCalls(open=refusing_open(errno.ENOTSUP))
        with pytest.warns(RuntimeWarning, match="O_DIRECT.*CPU"):
            ShardFile(path, calls=calls).close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ShardFile(path, calls=calls).close()
            ShardFile(other, calls=calls).close()

    def test_asking_for_buffered_reads_is_no_fall_back(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ShardFile(path, direct=False).close()

    @pytest.mark.parametrize("mode", ["direct", "buffered", "refused at first read"])
    @pytest.mark.filterwarnings("ignore:.*O_DIRECT:RuntimeWarning")
    def test_reads_leave_no_page_cache(self, path: Path, slots: SlotBank, mode: str) -> None:
        """By mincore, which asks the kernel for the pages it holds and brings none in."""
        libc = ctypes.CDLL(None, use_errno=True)

        def cached_pages(fd: int) -> int:
            resident = (ctypes.c_ubyte * (-(-SIZE // mmap.PAGESIZE)))()
            with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
                address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
                assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), resident) == 0
            return sum(page & 1 for page in resident)

        calls = FileCalls(preadv=Disk(os_error(errno.EINVAL)).preadv) if mode.startswith("refused") else FileCalls()
        with open(path, "rb") as plain, ShardFile(path, direct=mode != "buffered", calls=calls) as file:
            fd = plain.fileno()
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if cached_pages(fd) > 0:
                pytest.skip("this file system does not drop its cache")
            for offset in range(100, SIZE - 300_000, 300_000):
                file.read(offset, 100_000, slots.slot(0))
            # Of 769 pages; the last page of each window stays, because the kernel drops only whole pages.
            assert cached_pages(fd) <= 10

    @pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs")
    def test_tmpfs(self, content: bytes, slots: SlotBank) -> None:
        path = Path(f"/dev/shm/moert-test-{os.getpid()}")
        try:
            path.write_bytes(content)
            with warnings.catch_warnings():
                # Newer kernels take O_DIRECT on tmpfs, older ones do not: both are right.
                warnings.simplefilter("ignore", RuntimeWarning)
                with ShardFile(path) as file:
                    start = file.read(SIZE - 5001, 5001, slots.slot(0))
                    assert slots.slot(0)[start : start + 5001] == content[-5001:]
        finally:
            path.unlink(missing_ok=True)

    def test_a_record_beyond_the_end_names_the_numbers(self, path: Path, slots: SlotBank) -> None:
        with ShardFile(path) as file, pytest.raises(CorruptFileError, match=f"ends at {SIZE + 1}.* {SIZE} bytes"):
            file.read(SIZE - 9, 10, slots.slot(0))

    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 5), (0, 0), (0, -1)])
    def test_a_range_that_cannot_be(self, path: Path, slots: SlotBank, offset: int, nbytes: int) -> None:
        with ShardFile(path) as file, pytest.raises(ValueError, match="no record"):
            file.read(offset, nbytes, slots.slot(0))

    @pytest.mark.parametrize("direct", [True, False])
    def test_truncated_while_open(self, path: Path, slots: SlotBank, direct: bool) -> None:
        with ShardFile(path, direct=direct) as file:
            file.read(SIZE - 5000, 5000, slots.slot(0))
            os.truncate(path, 2_000_005)
            for offset in (SIZE - 5000, 2_000_000 - 50_000, 0):
                with pytest.raises(CorruptFileError, match=rf"shard\.safetensors.*size {SIZE} -> 2000005"):
                    file.read(offset, 5000, slots.slot(0))

    def test_overwritten_in_place(self, path: Path, slots: SlotBank) -> None:
        os.utime(path, ns=(10**18, 10**18))
        with ShardFile(path) as file:
            file.read(0, 5000, slots.slot(0))
            with open(path, "r+b") as writer:
                writer.write(b"new")
            with pytest.raises(CorruptFileError, match=r"changed.*modified 2001-09-09 .* -> 20"):
                file.read(100_000, 5000, slots.slot(0))

    def test_replaced_by_rename_reads_as_before(
        self, path: Path, content: bytes, slots: SlotBank, tmp_path: Path
    ) -> None:
        with ShardFile(path) as file:
            new = tmp_path / "new"
            new.write_bytes(b"z" * SIZE)
            new.rename(path)
            start = file.read(77, 5000, slots.slot(0))
            assert slots.slot(0)[start : start + 5000] == content[77:5077]

    def test_unlinked_reads_as_before(self, path: Path, content: bytes, slots: SlotBank) -> None:
        with ShardFile(path) as file:
            path.unlink()
            start = file.read(77, 5000, slots.slot(0))
            assert slots.slot(0)[start : start + 5000] == content[77:5077]

    def test_one_io_error_is_tried_again(self, path: Path, content: bytes, slots: SlotBank) -> None:
        disk = Disk(os_error(errno.EIO))
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file:
            start = file.read(10, 5000, slots.slot(0))
        assert slots.slot(0)[start : start + 5000] == content[10:5010]
        assert disk.requests == [(0, 8192), (0, 8192)]

    def test_a_second_io_error_is_reported_with_its_place(self, path: Path, slots: SlotBank) -> None:
        disk = Disk(os_error(errno.EIO), os_error(errno.EIO))
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file:
            with pytest.raises(TransferError, match="8192 bytes at 4096") as caught:
                file.read(5000, 5000, slots.slot(0))
            assert caught.value.errno == errno.EIO
            assert caught.value.filename == str(path)
            assert isinstance(caught.value, OSError)
            assert file.direct
            file.read(5000, 5000, slots.slot(0))

    def test_another_error_is_not_tried_again(self, path: Path, slots: SlotBank) -> None:
        disk = Disk(os_error(errno.ENXIO))
        with (
            ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file,
            pytest.raises(TransferError, match="No such device"),
        ):
            file.read(0, 10, slots.slot(0))
        assert len(disk.requests) == 1

    def test_an_interrupted_call_is_made_again(self, path: Path, content: bytes, slots: SlotBank) -> None:
        disk = Disk(InterruptedError(errno.EINTR, "interrupted"), InterruptedError(errno.EINTR, "interrupted"))
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file:
            file.read(0, 4096, slots.slot(0))
        assert slots.slot(0)[:4096] == content[:4096]

    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("step", [4096, 5000, 12288, 19_999])
    def test_reads_that_stop_short_are_resumed(
        self, path: Path, content: bytes, slots: SlotBank, direct: bool, step: int
    ) -> None:
        disk = Disk(*[step] * 40)
        with ShardFile(path, direct=direct, calls=FileCalls(preadv=disk.preadv)) as file:
            start = file.read(1000, 60_000, slots.slot(0))
        assert slots.slot(0)[start : start + 60_000] == content[1000:61_000]
        if direct:
            assert all(offset % BLOCK_BYTES == 0 for offset, _ in disk.requests), "O_DIRECT cannot resume there"

    @pytest.mark.parametrize(("direct", "step"), [(True, 0), (True, 100), (False, 0)])
    def test_a_read_that_gets_nowhere_is_an_error_and_no_endless_loop(
        self, path: Path, slots: SlotBank, direct: bool, step: int
    ) -> None:
        disk = Disk(8192, *[step] * 1000)
        message = rf"short read: {8192 + step} of 16384 bytes at 4096.* {SIZE} bytes"
        with (
            ShardFile(path, direct=direct, calls=FileCalls(preadv=disk.preadv)) as file,
            pytest.raises(TransferError, match=message),
        ):
            file.read(4096, 16384, slots.slot(0))
        assert len(disk.requests) <= 3

    def test_a_misaligned_buffer_is_the_callers_mistake_not_the_file_systems(self, path: Path, slots: SlotBank) -> None:
        disk = Disk(os_error(errno.EINVAL))
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file:
            with pytest.raises(ValueError, match="not a multiple of 4096"):
                file.read(0, 10, slots.slot(0)[1:])
            assert file.direct

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(TransferError, match="cannot open") as caught:
            ShardFile(tmp_path / "absent")
        assert caught.value.errno == errno.ENOENT
        assert caught.value.filename == str(tmp_path / "absent")

    def test_closed(self, path: Path, slots: SlotBank) -> None:
        file = ShardFile(path)
        file.close()
        file.close()
        assert file.closed
        with pytest.raises(MoertError, match="closed"):
            file.read(0, 10, slots.slot(0))

    def test_closing_waits_for_the_reads_on_it(self, path: Path, content: bytes, slots: SlotBank, gate: Gate) -> None:
        """A descriptor closed under a read could name another file by the time the kernel looks it up."""
        file = ShardFile(path, calls=FileCalls(preadv=gate.preadv))
        with DiskReader(1) as reader:
            handle = submit_block(reader, file, 3, slots)
            gate.wait_begun(1)
            file.close()
            # Would take the number of a descriptor closed too early.
            with open(os.devnull, "rb"):
                gate.open()
                handle.wait(PATIENCE_S)
        assert slots.slot(3)[:BLOCK_BYTES] == content[3 * BLOCK_BYTES : 4 * BLOCK_BYTES]
