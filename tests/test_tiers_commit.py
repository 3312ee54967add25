"""Memory that an arena takes and gives back while it lives, page by page as the kernel counts them."""

from __future__ import annotations

import ctypes
import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pages import gets_huge_pages, present_bytes, present_pages, resident_bytes

from moert import _C
from moert.errors import CapacityError, MoertError
from moert.tiers import arena as arena_module
from moert.tiers.arena import PAGE_BYTES, HostArena, SlotBank
from moert.tiers.memory import MemoryLimit, MemoryReport

MIB = 1 << 20
PAGES = 1300
"""Of an arena of two huge pages and the half of a third."""

page_ranges = st.tuples(
    st.one_of(st.integers(0, PAGES - 1), st.sampled_from([0, 511, 512, 513, 1023, 1024, 1025])),
    st.one_of(st.integers(1, PAGES), st.sampled_from([1, 2, 511, 512, 513, PAGES])),
).map(lambda pair: (pair[0], min(PAGES, pair[0] + pair[1])))


def run_python(code: str, *arguments: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=60
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


@settings(max_examples=40)
@example(changes=[(True, (0, PAGES)), (False, (512, 1024)), (True, (512, 600))])
@given(changes=st.lists(st.tuples(st.booleans(), page_ranges), min_size=1, max_size=10))
def test_exactly_what_is_committed_has_memory_and_keeps_its_contents(
    changes: list[tuple[bool, tuple[int, int]]],
) -> None:
    arena = HostArena(PAGES * PAGE_BYTES, reserve=True)
    contents: dict[int, int] = {}
    try:
        for turn, (added, (begin, end)) in enumerate(changes, start=1):
            place = begin * PAGE_BYTES, (end - begin) * PAGE_BYTES
            if added:
                arena.commit([place])
                for page in range(begin, end):
                    contents.setdefault(page, 0)
            else:
                arena.decommit(*place)
                for page in range(begin, end):
                    contents.pop(page, None)
            assert present_pages(arena.address, arena.nbytes) == contents.keys()
            assert arena.committed_bytes == len(contents) * PAGE_BYTES
            view = arena.view(0, arena.nbytes)
            for page, value in contents.items():
                assert view[page * PAGE_BYTES] == view[(page + 1) * PAGE_BYTES - 1] == value
            for page in contents:
                if begin <= page < end:
                    view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes([turn]) * PAGE_BYTES
                    contents[page] = turn
            del view
    finally:
        arena.close()


def test_address_space_takes_no_memory_and_any_amount_can_be_had() -> None:
    before = resident_bytes()
    arena = HostArena(1 << 40, reserve=True)
    assert arena.committed_bytes == 0
    arena.commit([(0, 3 * MIB), (1 << 39, 2 * MIB)])
    assert arena.committed_bytes == 5 * MIB
    assert 4 * MIB < resident_bytes() - before < 12 * MIB
    arena.close()
    assert resident_bytes() - before < 4 * MIB


def test_whole_huge_pages_are_huge_and_bring_in_no_more_than_asked() -> None:
    stdout = run_python("""
        import json, re
        from moert.tiers.arena import HostArena
        MIB = 1 << 20
        arena = HostArena(64 * MIB, reserve=True)
        def resident():
            rss = huge = 0
            for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read())[1:]:
                begin, end = (int(x, 16) for x in block.split(" ", 1)[0].split("-"))
                if arena.address <= begin < arena.address + arena.nbytes:
                    fields = dict(re.findall(r"(?m)^(\\w+):\\s+(\\d+) kB$", block))
                    rss += int(fields["Rss"]) << 10
                    huge += int(fields["AnonHugePages"]) << 10
            return rss / MIB, huge / MIB
        seen = []
        arena.commit([(0, 9 * MIB)]); seen.append(resident())
        arena.decommit(5 * MIB, 4 * MIB); seen.append(resident())
        arena.commit([(0, 64 * MIB)]); seen.append(resident())
        print(json.dumps(seen))
    """)
    seen = json.loads(stdout)
    assert [rss for rss, _ in seen] == [9, 5, 64]
    if gets_huge_pages(64 * MIB):
        assert seen[0][1] == 8
        assert seen[1][1] == 4
        assert seen[2][1] >= 60, "grown memory is in huge pages too, save where small ones were"


IN_A_GROUP = """
    import sys
    from moert.tiers.arena import HostArena
    from moert.tiers.memory import memory_report
    MIB = 1 << 20
    arena = HostArena(64 * MIB, reserve=True)
    used = lambda: memory_report().limits[1].used_bytes
    empty = used()
    arena.commit([(0, 64 * MIB)])
    full = used()
    for block in range(32):
        arena.decommit(block * 2 * MIB + 4096, 2 * MIB - 4096)
    print(full - empty, used() - empty)
"""


def test_a_huge_page_of_which_little_is_left_is_really_given_back(bench_on_path: None) -> None:
    """RSS would not tell: the kernel keeps all of a huge page as long as a part of it is mapped."""
    import cgroup

    try:
        with cgroup.memory_group(256 * MIB) as group:
            command = group.command([sys.executable, "-c", textwrap.dedent(IN_A_GROUP)])
            child = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except CapacityError as error:
        pytest.skip(str(error))
    assert child.returncode == 0, child.stderr
    full, left = map(int, child.stdout.split())
    # The kernel charges a group for some pages ahead, on each CPU.
    assert full > 60 * MIB
    assert left < 4 * MIB, "32 pages of 4 KiB are in use"


def test_more_than_there_is_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = HostArena(64 * MIB, reserve=True)
    arena.commit([(0, MIB)])
    scarce = MemoryReport((MemoryLimit("a test's limit", 8 * MIB, 0, 0),))
    monkeypatch.setattr(arena_module, "memory_report", lambda: scarce)
    arena.commit([(0, 8 * MIB)])  # 1 of these 8 MiB is there already
    with pytest.raises(CapacityError, match=r"9\.0 MiB of host memory .* a test's limit .*lower host_memory"):
        arena.commit([(0, 9 * MIB), (32 * MIB, 8 * MIB)])
    assert arena.committed_bytes == 8 * MIB
    assert present_bytes(arena.address, arena.nbytes) == 8 * MIB
    arena.close()


def test_a_kernel_that_refuses_some_pages_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = HostArena(64 * MIB, reserve=True)
    arena.commit([(0, 3 * MIB)])
    arena.poison(0, 3 * MIB)

    def refuse(address: int, nbytes: int, threads: int) -> bool:
        _C.prefault(address, nbytes, threads)
        if address >= arena.address + 32 * MIB:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return True

    class Native:
        prefault = staticmethod(refuse)

    monkeypatch.setattr(arena_module, "_C", Native)
    with pytest.raises(CapacityError, match=r"refused 10\.0 MiB .*ENOMEM"):
        arena.commit([(0, 5 * MIB), (32 * MIB, 8 * MIB)])
    assert arena.committed_bytes == 3 * MIB
    assert present_bytes(arena.address, arena.nbytes) == 3 * MIB
    assert set(arena.view(0, 3 * MIB)) == {0xFF}
    arena.close()


def test_locked_memory_is_given_back_too() -> None:
    arena = HostArena(4 * MIB)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(arena.address), ctypes.c_size_t(arena.nbytes)):
        pytest.skip(f"this process may not lock memory: {errno.errorcode[ctypes.get_errno()]}")
    release = tuple(int(part) for part in Path("/proc/sys/kernel/osrelease").read_text().split(".")[:2])
    if release < (5, 18):
        pytest.skip("this kernel gives no locked memory back")
    arena.decommit(0, 4 * MIB)
    assert present_bytes(arena.address, arena.nbytes) == 0
    arena.close()


def test_a_forked_child_and_a_closed_arena_commit_nothing() -> None:
    stdout = run_python("""
        import os
        from moert.errors import MoertError
        from moert.tiers.arena import HostArena
        arena = HostArena(4 << 20, reserve=True)
        arena.commit([(0, 1 << 20)])
        arena.poison(0, 1 << 20)
        view = arena.view(0, 1 << 20)
        if os.fork() == 0:
            try:
                arena.commit([(0, 2 << 20)])
            except MoertError as error:
                print("closed" in str(error), view[0], flush=True)
            os._exit(0)
        os.wait()
        print(view[0])
    """)
    assert stdout.split() == ["True", "0", "255"]
    arena = HostArena(MIB, reserve=True)
    arena.close()
    with pytest.raises(MoertError, match="closed"):
        arena.commit([(0, 4096)])
    with pytest.raises(MoertError, match="closed"):
        arena.decommit(0, 4096)


def test_ranges_outside_are_errors() -> None:
    arena = HostArena(8192, reserve=True)
    with pytest.raises(ValueError, match="8192 bytes"):
        arena.commit([(0, 4096), (4096, 8192)])
    with pytest.raises(ValueError, match="8192 bytes"):
        arena.decommit(0, 8193)
    assert arena.committed_bytes == 0
    arena.close()


def test_a_bank_has_room_up_to_its_most_slots() -> None:
    arena = HostArena(10 * PAGE_BYTES, reserve=True)
    bank = SlotBank(arena, PAGE_BYTES, 3 * PAGE_BYTES, 1, 3)
    assert bank.range(3) == (PAGE_BYTES, 9 * PAGE_BYTES)
    with pytest.raises(CapacityError, match="raise host_memory"):
        SlotBank(arena, PAGE_BYTES, 3 * PAGE_BYTES, 1, 4)
    with pytest.raises(ValueError, match="2 slots in a bank with room for 1"):
        SlotBank(arena, 0, PAGE_BYTES, 2, 1)
    arena.close()
