from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from pages import gets_huge_pages, resident_bytes

from moert import _C
from moert.errors import CapacityError, MoertError
from moert.tiers import arena as arena_module
from moert.tiers.arena import HUGE_PAGE_BYTES, PAGE_BYTES, HostArena, SlotBank
from moert.tiers.memory import MemoryLimit, MemoryReport

MIB = 1 << 20


def run_python(code: str) -> str:
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.mark.parametrize("nbytes", [1, PAGE_BYTES, HUGE_PAGE_BYTES, 5 * MIB + 12288])
def test_aligned_zeroed_and_writable_to_the_last_byte(nbytes: int) -> None:
    arena = HostArena(nbytes)
    assert arena.address % HUGE_PAGE_BYTES == 0
    view = arena.view(0, nbytes)
    assert len(view) == nbytes
    assert view.tobytes() == bytes(nbytes)
    view[nbytes - 1] = 7
    assert arena.view(nbytes - 1, 1)[0] == 7
    del view
    arena.close()


def test_the_kernel_sees_one_private_huge_page_mapping_that_is_all_there() -> None:
    """By /proc/self/smaps, in a process of its own so that no neighbouring mapping is merged into the arena's."""
    nbytes = 9 * MIB
    stdout = run_python(f"""
        import json, re
        from moert.tiers.arena import HostArena
        arena = HostArena({nbytes})
        blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read())
        for block in blocks[1:]:
            begin, end = (int(x, 16) for x in block.split(" ", 1)[0].split("-"))
            if begin <= arena.address < end:
                fields = dict(re.findall(r"(?m)^(\\w+):\\s+(.*?)(?: kB)?$", block))
                print(json.dumps({{"begin": begin, "end": end, "address": arena.address, "head": block.split()[1],
                                  **{{k: fields[k] for k in ("Rss", "AnonHugePages", "VmFlags")}}}}))
    """)
    mapping = json.loads(stdout)
    assert mapping["head"] == "rw-p"
    assert mapping["end"] - mapping["begin"] - nbytes < HUGE_PAGE_BYTES
    assert mapping["end"] >= mapping["address"] + nbytes
    assert int(mapping["Rss"]) << 10 >= nbytes, "not all of the arena was faulted in"
    flags = mapping["VmFlags"].split()
    assert "hg" in flags
    assert "wf" in flags
    assert "dd" in flags
    if gets_huge_pages(nbytes):
        assert int(mapping["AnonHugePages"]) << 10 >= 4 * HUGE_PAGE_BYTES


def test_more_than_the_machine_has_is_refused_with_numbers() -> None:
    with pytest.raises(CapacityError, match=r"1024\.0 TiB .*lower host_memory"):
        HostArena(1 << 50)


def test_a_kernel_that_refuses_the_mapping_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    boundless = MemoryReport((MemoryLimit("nothing", 1 << 62, 0, 0),))
    monkeypatch.setattr(arena_module, "memory_report", lambda: boundless)
    with pytest.raises(CapacityError, match=r"refused 16384\.0 TiB .*ENOMEM"):
        HostArena(1 << 54)


def test_a_kernel_that_refuses_the_pages_is_reported_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, nbytes: int, threads: int) -> bool:
        _C.prefault(address, nbytes // 2, threads)
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    class Native:
        prefault = staticmethod(refuse)

    monkeypatch.setattr(arena_module, "_C", Native)
    before = resident_bytes()
    with pytest.raises(CapacityError, match=r"refused 64\.0 MiB .*ENOMEM") as caught:
        HostArena(64 * MIB)
    # The error is still alive here, and with it the frame of the constructor.
    assert caught.tb is not None
    assert resident_bytes() - before < 16 * MIB


def test_an_empty_arena_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        HostArena(0)


def test_close_gives_memory_back_and_is_idempotent() -> None:
    before = resident_bytes()
    arena = HostArena(64 * MIB)
    assert resident_bytes() - before > 60 * MIB
    assert not arena.closed
    arena.close()
    arena.close()
    assert arena.closed
    assert resident_bytes() - before < 16 * MIB
    with pytest.raises(MoertError, match="closed"):
        arena.view(0, 1)
    with pytest.raises(MoertError, match="closed"):
        arena.poison(0, 1)


def test_tensors_that_outlive_the_arena_are_safe_and_hold_no_memory() -> None:
    before = resident_bytes()
    arena = HostArena(64 * MIB)
    arena.poison(0, arena.nbytes)
    tensor = torch.frombuffer(arena.view(0, arena.nbytes), dtype=torch.uint8)
    assert int(tensor[-1]) == 0xFF
    arena.close()
    assert resident_bytes() - before < 16 * MIB
    other = HostArena(64 * MIB)
    other.poison(0, other.nbytes)
    # Were its addresses free, the second arena would have been placed there and be seen through the old tensor.
    assert int(tensor[0]) == 0
    assert int(tensor[-1]) == 0
    del tensor
    other.close()


def test_a_forked_child_sees_a_closed_arena_and_takes_no_memory() -> None:
    stdout = run_python("""
        import os
        from moert.tiers.arena import HostArena
        arena = HostArena(4 << 20)
        arena.poison(0, arena.nbytes)
        view = arena.view(0, arena.nbytes)
        child = os.fork()
        if child == 0:
            print("child", arena.closed, view[0], flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print("parent", arena.closed, view[0])
    """)
    assert stdout.splitlines() == ["child True 0", "parent False 255"]


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, 8193), (8192, 1), (4096, 4097)])
def test_ranges_outside_are_errors(offset: int, nbytes: int) -> None:
    arena = HostArena(8192)
    with pytest.raises(ValueError, match="8192 bytes"):
        arena.view(offset, nbytes)
    with pytest.raises(ValueError, match="8192 bytes"):
        arena.poison(offset, nbytes)
    arena.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_poison_is_nan_in_every_format_and_stays_in_its_range(dtype: torch.dtype) -> None:
    arena = HostArena(3 * PAGE_BYTES)
    arena.poison(PAGE_BYTES, PAGE_BYTES)
    values = torch.frombuffer(arena.view(0, arena.nbytes), dtype=dtype).reshape(3, -1)
    assert torch.isnan(values[1]).all()
    assert not torch.isnan(values[0]).any()
    assert not torch.isnan(values[2]).any()
    assert math.isnan(float(values[1, 0]))
    del values
    arena.close()


def test_slots_are_disjoint_and_fill_their_place() -> None:
    arena = HostArena(10 * PAGE_BYTES)
    bank = SlotBank(arena, PAGE_BYTES, 3 * PAGE_BYTES, 3)
    assert len(bank) == 3
    for index in range(3):
        bank.slot(index)[:] = bytes([index + 1]) * bank.slot_bytes
        assert bank.address(index) == arena.address + PAGE_BYTES + index * 3 * PAGE_BYTES
    expected = bytes(PAGE_BYTES) + b"".join(bytes([index + 1]) * 3 * PAGE_BYTES for index in range(3))
    assert arena.view(0, arena.nbytes).tobytes() == expected
    bank.poison(1)
    assert set(bank.slot(1)) == {0xFF}
    assert set(bank.slot(0)) == {1}
    assert set(bank.slot(2)) == {3}
    arena.close()


def test_slots_that_do_not_fit_are_a_capacity_error() -> None:
    arena = HostArena(4 * PAGE_BYTES)
    with pytest.raises(CapacityError, match="raise host_memory"):
        SlotBank(arena, PAGE_BYTES, PAGE_BYTES, 4)
    with pytest.raises(ValueError, match="4096"):
        SlotBank(arena, 100, PAGE_BYTES, 1)
    with pytest.raises(ValueError, match="4096"):
        SlotBank(arena, 0, 5000, 1)
    arena.close()
