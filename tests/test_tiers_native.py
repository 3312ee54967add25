from __future__ import annotations

import ctypes
import mmap
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ticking import ticking

from moert import _C

MIB = 1 << 20


@pytest.fixture
def block() -> Iterator[tuple[mmap.mmap, int]]:
    with mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        yield mapping, ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names are those of /proc/cpuinfo on x86")
def test_features_agree_with_the_kernel() -> None:
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":")[1].split())
    features = _C.cpu_features()
    assert {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"} <= features.keys()
    assert {"amx_tile", "amx_bf16", "amx_int8", "neon"} <= features.keys()
    assert {name: usable for name, usable in features.items() if name != "neon"} == {
        name: name in flags for name in features if name != "neon"
    }
    assert features["neon"] is False


def test_fill_sets_its_range_and_no_byte_more(block: tuple[mmap.mmap, int]) -> None:
    mapping, address = block
    _C.fill(address + 5, 1000, 0xA5)
    assert mapping[:1010] == bytes(5) + b"\xa5" * 1000 + bytes(5)
    _C.fill(address, 0, 1)
    assert mapping[0] == 0


def test_prefault_makes_pages_resident_and_keeps_their_bytes() -> None:
    """Residency by mincore, which asks the kernel rather than the code under test."""
    libc = ctypes.CDLL(None, use_errno=True)
    nbytes = 8 * MIB
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        pages = nbytes // mmap.PAGESIZE
        resident = (ctypes.c_ubyte * pages)()

        def resident_pages() -> int:
            assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), resident) == 0
            return sum(page & 1 for page in resident)

        mapping[3 * MIB] = 42
        assert resident_pages() == 1
        inner = (address + MIB + 100, 4 * MIB)
        _C.prefault(*inner, 3)
        assert resident_pages() == 4 * MIB // mmap.PAGESIZE + 1
        assert mapping[3 * MIB] == 42
        assert mapping[2 * MIB : 2 * MIB + 4096] == bytes(4096)


def test_prefault_of_what_is_not_mapped_is_an_error() -> None:
    # Reserved without access, in a process of its own: a mistake here would be a crash.
    code = """
import ctypes, errno
from moert import _C
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
address = libc.mmap(None, 1 << 20, 0, 0x22, -1, 0)
try:
    _C.prefault(address, 1 << 20, 2)
except OSError as error:
    print(error.errno in (errno.EINVAL, errno.EFAULT, errno.ENOMEM))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout) == (0, "True\n"), child.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_stream_read_takes_longer_for_more_passes(block: tuple[mmap.mmap, int], threads: int) -> None:
    _, address = block
    _C.prefault(address, 8 * MIB, 1)
    _C.stream_read(address, 8 * MIB, threads, 1)
    few = min(_C.stream_read(address, 8 * MIB, threads, 4) for _ in range(5))
    many = _C.stream_read(address, 8 * MIB, threads, 400)
    assert few > 0
    # A hundred times the passes; far fewer would mean that the compiler folded them into one.
    assert many > 10 * few


def test_stream_read_lets_other_threads_run(block: tuple[mmap.mmap, int]) -> None:
    _, address = block
    with ticking() as ticks:
        seconds = _C.stream_read(address, 8 * MIB, 1, 4000)
    assert seconds > 0.02
    assert ticks.well_within >= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: _C.prefault(0, 4096, 1), "null.*4096"),
        (lambda a: _C.fill(0, 4096, 1), "null.*4096"),
        (lambda a: _C.stream_read(0, 4096, 1, 1), "null.*4096"),
        (lambda a: _C.fill((1 << 64) - 4096, 8192, 1), "18446744073709547520 .* 8192"),
        (lambda a: _C.fill(1 << 64, 1, 1), "18446744073709551616"),
        (lambda a: _C.fill(-1, 1, 1), "-1"),
        (lambda a: _C.fill(a, -1, 1), "nbytes is -1"),
        (lambda a: _C.fill(a, 1 << 63, 1), "nbytes is 9223372036854775808"),
        (lambda a: _C.fill(a, 1, 256), r"byte is 256, must be in 0\.\.255"),
        (lambda a: _C.prefault(a, 4096, 0), "threads is 0"),
        (lambda a: _C.prefault(a, 4096, 100000), "threads is 100000"),
        (lambda a: _C.stream_read(a, 4096, 1, 0), "repeats is 0"),
        (lambda a: _C.stream_read(a + 1, 4096, 1, 1), "multiple of 8"),
    ],
)
def test_arguments_that_cannot_be_are_value_errors(block: tuple[mmap.mmap, int], call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(block[1])


def test_arguments_of_a_wrong_type_are_type_errors(block: tuple[mmap.mmap, int]) -> None:
    with pytest.raises(TypeError, match=r"nbytes must be an int, not 1\.5"):
        _C.fill(block[1], 1.5, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _C.fill(block[1])  # type: ignore[call-arg]
