"""Steps on the CPU: memory that no kernel may read, layers queued beside Python, handles that outlive the threads."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from quiet_child import run_python
from ticking import ticking

from moert import _C
from moert.kernels import cpu
from moert.kernels.cpu_ffn import Expert, ExpertFfn, add_rows
from moert.kernels.gate import Gate


def off_by_one(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Zeros at an odd address."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = torch.frombuffer(bytearray(nbytes + 2), dtype=torch.uint8)
    begin = 1 - memory.data_ptr() % 2
    return torch.asarray(memory.untyped_storage()[begin : begin + nbytes], dtype=torch.uint8).view(dtype).view(shape)


MISPLACED: dict[str, Callable[[ExpertFfn, cpu.Matrix, cpu.Matrix], object]] = {
    "data": lambda ffn, up, down: cpu.Matrix("plain", off_by_one(8, 8)),
    "scales": lambda ffn, up, down: cpu.Matrix(
        "int8", torch.zeros(4, 32, dtype=torch.int8), off_by_one(4, 1, dtype=torch.float16)
    ),
    "up bias": lambda ffn, up, down: ffn.expert(up, down, off_by_one(8)),
    "down bias": lambda ffn, up, down: ffn.expert(up, down, None, off_by_one(8)),
    "x": lambda ffn, up, down: ffn.run(off_by_one(2, 8), [ffn.expert(up, down)], [None], [None], torch.zeros(2, 8)),
    "out": lambda ffn, up, down: ffn.run(
        torch.zeros(2, 8).bfloat16(), [ffn.expert(up, down)], [None], [None], off_by_one(2, 8, dtype=torch.float32)
    ),
    "weights": lambda ffn, up, down: ffn.run(
        torch.zeros(2, 8).bfloat16(),
        [ffn.expert(up, down)],
        [None],
        [off_by_one(2, dtype=torch.float32)],
        torch.zeros(2, 8),
    ),
    "rows": lambda ffn, up, down: ffn.run(
        torch.zeros(2, 8).bfloat16(),
        [ffn.expert(up, down)],
        [off_by_one(2, dtype=torch.int64)],
        [None],
        torch.zeros(2, 8),
    ),
    "bias": lambda ffn, up, down: cpu.linear(torch.zeros(2, 8).bfloat16(), up, off_by_one(8)),
    "weight": lambda ffn, up, down: cpu.linear(torch.zeros(2, 8).bfloat16(), off_by_one(8, 8)),
    "held": lambda ffn, up, down: add_rows(
        off_by_one(2, 8, dtype=torch.float32), None, torch.ones(2), torch.zeros(2, 8)
    ),
}


@pytest.mark.parametrize("what", list(MISPLACED))
def test_numbers_at_an_odd_address_are_refused(what: str) -> None:
    ffn = ExpertFfn(Gate(), 8, 4, torch.bfloat16)
    up, down = (cpu.Matrix("plain", torch.zeros(shape).bfloat16()) for shape in ((8, 8), (8, 4)))
    with pytest.raises(ValueError, match=rf"^{what} is at address \d+, must be a multiple of [248] and not null"):
        MISPLACED[what](ffn, up, down)


def test_layers_of_other_sizes_and_types_queue_behind_one_another() -> None:
    generator = torch.Generator().manual_seed(1)
    jobs = []
    for index, dtype in enumerate([torch.bfloat16, torch.float32, torch.float16] * 5):
        hidden, width = 64 + 32 * (index % 4), 300 - 16 * index
        ffn = ExpertFfn(Gate(), hidden, width, dtype)
        up = torch.randn(2 * width, hidden, generator=generator).to(dtype)
        down = torch.randn(hidden, width, generator=generator).to(dtype)
        expert = ffn.expert(cpu.Matrix("plain", up), cpu.Matrix("plain", down))
        x = torch.randn(1 + 3 * index, hidden, generator=generator).to(dtype)
        jobs.append((ffn, expert, x, torch.zeros(x.shape), torch.zeros(x.shape)))
    handles = [ffn.submit(x, [expert], [None], [None], out) for ffn, expert, x, out, _ in jobs]
    for handle in handles[::2]:
        handle.wait()
    for handle, (ffn, expert, x, out, want) in zip(handles, jobs, strict=True):
        handle.wait()
        ffn.run(x, [expert], [None], [None], want)
        assert torch.equal(out, want)


@pytest.mark.parametrize("what", ["run", "run_token", "wait", "linear"])
def test_other_python_threads_run_meanwhile(what: str) -> None:
    ffn = ExpertFfn(Gate(gated=False), 2048, 2048, torch.float32)
    weight = cpu.Matrix("plain", torch.ones(2048, 2048))
    expert = ffn.expert(weight, weight)
    x, out = torch.ones(256, 2048), torch.zeros(256, 2048)

    def some(times: int) -> tuple[list[Expert], list[None], list[None], torch.Tensor]:
        return [expert] * 4 * times, [None] * 4 * times, [None] * 4 * times, out

    calls: dict[str, Callable[[int], object]] = {
        "run": lambda times: ffn.run(x, *some(times)),
        "run_token": lambda times: ffn.run_token(x[:1], [expert] * 50 * times, [0] * 50 * times, torch.ones(1)),
        "wait": lambda times: ffn.submit(x, *some(times)).wait(),
        "linear": lambda times: cpu.linear(x.repeat(4 * times, 1), weight),
    }
    for times in (1, 2, 4, 8, 16, 32):
        with ticking() as ticks:
            calls[what](times)
        if ticks.seconds > 0.05:
            break
    assert ticks.seconds > 0.05
    assert ticks.well_within >= 2


def test_addresses_and_counts_that_cannot_be_are_refused() -> None:
    """Those that the Python face never gives."""
    memory = torch.zeros(64)
    good = memory.data_ptr()
    with pytest.raises(ValueError, match=r"data is at address \d+, must be a multiple of 4"):
        _C.matrix("fp32", False, 0, 4, 4, good + 2, None, None)
    with pytest.raises(ValueError, match=r"scales is at address \d+, must be a multiple of 4"):
        _C.matrix("fp8", False, 128, 4, 4, good, good + 2, None)
    with pytest.raises(ValueError, match=r"scales must be an int, not None|scales is at address"):
        _C.matrix("int8", False, 32, 1, 32, good, 0, None)
    ffn = ExpertFfn(Gate(), 4, 4, torch.float32)
    expert = ffn.expert(cpu.Matrix("plain", torch.zeros(8, 4)), cpu.Matrix("plain", torch.zeros(4, 4)))
    for groups, message in (
        ([(expert.capsule, 4, None, None, None)], "a group of 4 tokens of 3"),
        ([(expert.capsule, -1, None, None, None)], "tokens is -1"),
        ([(expert.capsule, 2, None, None, 2)], r"rows of out are 2\.\.4 of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.ffn_run(ffn.arguments, "fp32", 4, 4, good, 3, good, 3, groups)
    assert not memory.any()


PENDING = """
import os, sys, torch
from moert import _C
from moert.kernels import cpu
from moert.kernels.cpu_ffn import ExpertFfn
from moert.kernels.gate import Gate
cpu.set_threads(3)
ffn = ExpertFfn(Gate(gated=False), 1024, 1024, torch.float32)
weight = cpu.Matrix("plain", torch.ones(1024, 1024))
expert = ffn.expert(weight, weight)
x = torch.ones(64, 1024)
handles = [ffn.submit(x, [expert] * 16, [None] * 16, [None] * 16, torch.zeros(64, 1024)) for _ in range({jobs})]
"""


def test_the_interpreter_exits_quietly_over_pending_steps() -> None:
    assert run_python(PENDING.format(jobs=50) + "print('over')") == "over\n"


def test_a_fork_drops_pending_steps_quietly_and_its_parent_finishes_them() -> None:
    code = """
child = os.fork()
if child == 0:
    try: handles[-1].wait()
    except RuntimeError as error: print("fork" in str(error), flush=True)
    del handles
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
for handle in handles: handle.wait()
print(all(handle.ready() for handle in handles))
"""
    assert run_python(PENDING.format(jobs=4) + code) == "True\n3\nTrue\n"


def test_the_threads_stop_before_the_interpreter_frees_what_they_use() -> None:
    code = """
import atexit
from moert import _C
def later():
    try: _C.pool_probe(1, 2, 0)
    except RuntimeError as error: print("exiting" in str(error))
atexit.register(later)  # so it runs after what is registered from here on
import moert.kernels.cpu
"""
    assert run_python(code) == "True\n"
