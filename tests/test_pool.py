"""The threads that compute: how many, who runs what, and what a fork or the end of the process does to them.

What needs C++ (phases are barriers, nested work, slow participants) is in tests/native/pool_check.cpp, which the last
tests compile and run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from quiet_child import run_python
from ticking import ticking

from moert import _C

ROOT = Path(__file__).resolve().parent.parent


def test_the_process_counts_its_own_cpus() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{cpu}]); from moert import _C; print(_C.pool_info())"
    info = eval(run_python(code))
    assert (info["threads"], info["allowed_cpus"], info["physical_cores"]) == (1, [cpu], 1)


def test_the_default_is_that_of_this_machine() -> None:
    limits = _C.cpu_limits("/", sorted(os.sched_getaffinity(0)))
    info = eval(run_python("from moert import _C; _C.threads(); print(_C.pool_info())"))
    assert info.pop("workers") == 0, "asking starts no threads"
    assert info == limits


def test_the_program_decides_before_the_environment() -> None:
    code = "from moert import _C; print(_C.threads(), _C.set_threads(4), _C.set_threads(None), _C.pool_info()['why'])"
    assert run_python(code, MOERT_THREADS="3") == "3 4 3 MOERT_THREADS is 3\n"
    default = _C.cpu_limits("/", sorted(os.sched_getaffinity(0)))
    assert run_python(code, MOERT_THREADS="") == f"{default['threads']} 4 {default['threads']} {default['why']}\n"


@pytest.mark.parametrize("text", ["0", "-2", "many", "3x", "1025", "99999999999999999999"])
def test_an_environment_that_cannot_be_is_told(text: str) -> None:
    code = (
        "from moert import _C\n"
        "for call in (_C.threads, _C.pool_info, lambda: _C.pool_probe(1, 2, 0), lambda: _C.set_threads(2)):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error)\n"
    )
    assert run_python(code, MOERT_THREADS=text) == f"MOERT_THREADS is '{text}', must be a number in 1..1024\n" * 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _C.set_threads(0), ValueError, r"threads is 0, must be in 1\.\.1024"),
        (lambda: _C.set_threads(-1), ValueError, r"threads is -1"),
        (lambda: _C.set_threads(1025), ValueError, r"threads is 1025"),
        (lambda: _C.set_threads(2.0), TypeError, r"threads must be an int, not 2\.0"),
        (lambda: _C.cpu_limits("/", [-1]), ValueError, r"cpu is -1"),
        (lambda: _C.cpu_limits("/", ["0"]), TypeError, r"cpu must be an int, not '0'"),
        (lambda: _C.cpu_limits("/", 3), TypeError, r"int"),
        (lambda: _C.pool_probe(0, 1, 0), ValueError, r"phases is 0"),
        (lambda: _C.pool_probe(1, 1 << 40, 0), ValueError, r"tasks is 1099511627776"),
        (lambda: _C.pool_probe_submit(1, 1, -5), ValueError, r"task_ns is -5"),
    ],
)
def test_arguments_that_cannot_be(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_task_runs_once_and_on_so_many_threads_at_most(threads: int) -> None:
    code = (
        "import threading; from moert import _C\n"
        "seconds, tasks = _C.pool_probe(7, 600, 20_000)\n"
        "print(seconds > 0, sum(tasks.values()), len(tasks), threading.get_native_id() in tasks)\n"
        "print(_C.pool_info()['workers'])\n"
    )
    first, second = run_python(code, MOERT_THREADS=str(threads)).splitlines()
    positive, total, participants, caller_took_part = first.split()
    assert (positive, total, caller_took_part) == ("True", "4200", "True")
    assert 1 <= int(participants) <= threads
    # Alone, the caller needs nobody.
    assert int(second) == threads - 1


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_submitted_work_is_done_without_anybody_waiting(threads: int) -> None:
    code = (
        "import time; from moert import _C\n"
        "jobs = [_C.pool_probe_submit(3, 10, 10_000) for _ in range(100)]\n"
        "while not all(_C.job_ready(job) for job in jobs): time.sleep(0.001)\n"
        "print(_C.pool_info()['workers'])\n"
        "job = _C.pool_probe_submit(1, 2, 300_000_000)\n"
        "print(_C.job_ready(job)); _C.job_wait(job); _C.job_wait(job); print(_C.job_ready(job))\n"
    )
    assert run_python(code, MOERT_THREADS=str(threads)) == f"{max(1, threads - 1)}\nFalse\nTrue\n"


def test_many_python_threads_use_the_pool_at_once() -> None:
    code = """
import random, threading
from moert import _C
done = []
def work(seed):
    chance = random.Random(seed)
    jobs = []
    for _ in range(150):
        shape = chance.randrange(1, 5), chance.randrange(1, 30), chance.choice([0, 0, 3000])
        if chance.random() < 0.4:
            assert sum(_C.pool_probe(*shape)[1].values()) == shape[0] * shape[1]
        else:
            jobs.append(_C.pool_probe_submit(*shape))
            if chance.random() < 0.3:
                jobs.pop(chance.randrange(len(jobs)))
    for job in jobs:
        _C.job_wait(job)
        assert _C.job_ready(job)
    done.append(seed)
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sorted(done))
"""
    assert run_python(code, MOERT_THREADS="3") == f"{list(range(8))}\n"


def test_other_python_threads_run_meanwhile() -> None:
    job = _C.pool_probe_submit(1, 20, 10_000_000)
    with ticking() as ticks:
        _C.pool_probe(1, 40, 10_000_000)
        _C.job_wait(job)
    assert ticks.seconds > 0.05
    assert ticks.well_within >= 2


def test_the_size_changes_between_jobs_only() -> None:
    code = """
from moert import _C
print(_C.set_threads(3), _C.threads(), _C.pool_info()["why"])
_C.pool_probe(1, 50, 1000)
print(_C.pool_info()["workers"])
job = _C.pool_probe_submit(1, 6, 100_000_000)
try:
    _C.set_threads(2)
except RuntimeError as error:
    print(error)
_C.job_wait(job)
print(_C.set_threads(2), _C.pool_info()["workers"])
for i in range(60):
    _C.set_threads(1 + i % 6)
    assert sum(_C.pool_probe(2, 40, 0)[1].values()) == 80
"""
    assert run_python(code).splitlines() == [
        "3 3 set_threads asked for 3",
        "2",
        "the number of threads cannot change while 1 jobs are running or queued; wait for them first",
        "2 0",
    ]


def test_idle_threads_use_no_cpu() -> None:
    """Of 5 threads that all have worked a moment ago, over half a second."""
    code = """
import time
from moert import _C
_C.pool_probe(20, 200, 5000)
_C.job_wait(_C.pool_probe_submit(2, 100, 5000))
time.sleep(0.01)
began = time.process_time()
time.sleep(0.5)
print(time.process_time() - began)
"""
    assert float(run_python(code, MOERT_THREADS="5")) < 0.02


def test_who_waits_for_a_long_task_sleeps_soon() -> None:
    """One task of half a second, four threads with nothing to do: about one CPU is busy, not four."""
    code = """
import time
from moert import _C
_C.pool_probe(1, 20, 5000)
began = time.process_time()
_C.pool_probe(4, 2, 0)
job = _C.pool_probe_submit(1, 1, 500_000_000)
_C.job_wait(job)
print(time.process_time() - began)
"""
    assert float(run_python(code, MOERT_THREADS="5")) < 0.6


FORK = """
import atexit, os, signal, sys, time
from moert import _C
atexit.register(_C.stop_threads)
{before}
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends a child that hangs
    {inside}
_, status = os.waitpid(child, 0)
print("child ended with", os.waitstatus_to_exitcode(status), flush=True)
print(sum(_C.pool_probe(2, 30, 1000)[1].values()))
"""
FORKED = "the compute threads belong to the process that started them and this is a fork of it"


def test_a_fork_is_told_and_ends_well() -> None:
    inside = """
    for call in (lambda: _C.pool_probe(1, 10, 0), lambda: _C.pool_probe(1, 1, 0), lambda: _C.set_threads(2),
                 lambda: _C.pool_probe_submit(1, 10, 0), lambda: _C.job_wait(running)):
        try: call(); print("no error")
        except RuntimeError as error: print(error)
    _C.job_wait(over)
    print(_C.job_ready(over), _C.job_ready(running), _C.threads(), flush=True)
    del over, running
    sys.exit(7)
"""
    before = (
        "over = _C.pool_probe_submit(1, 10, 0); _C.job_wait(over); running = _C.pool_probe_submit(1, 4, 300_000_000)"
    )
    output = run_python(FORK.format(before=before, inside=inside), MOERT_THREADS="3").splitlines()
    assert len(output) == 8
    for line in output[:5]:
        assert line.startswith(FORKED)
        assert "spawn" in line
    assert output[5:] == ["True False 3", "child ended with 7", "60"]


def test_a_fork_of_a_fork_is_told_too() -> None:
    inside = """
    if os.fork() == 0:
        try: _C.pool_probe(1, 10, 0)
        except RuntimeError as error: os._exit(5)
    else:
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    output = run_python(FORK.format(before="_C.pool_probe(1, 9, 0)", inside=inside), MOERT_THREADS="2")
    assert output == "child ended with 5\n60\n"


@pytest.mark.parametrize("before", ["", "_C.threads(); _C.pool_info(); _C.set_threads(3)"])
def test_a_fork_before_the_first_use_has_a_pool_of_its_own(before: str) -> None:
    inside = """
    assert sum(_C.pool_probe(2, 50, 1000)[1].values()) == 100
    _C.job_wait(_C.pool_probe_submit(2, 50, 1000))
    print(_C.pool_info()["workers"], flush=True)
    sys.exit(0)
"""
    output = run_python(FORK.format(before=before, inside=inside), MOERT_THREADS="3")
    assert output == "2\nchild ended with 0\n60\n"


def test_a_fork_without_workers_to_lose_computes() -> None:
    inside = "sys.exit(sum(_C.pool_probe(2, 30, 0)[1].values()))"
    output = run_python(FORK.format(before="_C.pool_probe(2, 30, 0)", inside=inside), MOERT_THREADS="1")
    assert output == "child ended with 60\n60\n"


def test_a_fork_while_another_thread_computes_alone_ends() -> None:
    """The other thread is not in the fork, which has no workers to refuse for either."""
    before = """
import threading
other = threading.Thread(target=lambda: [_C.pool_probe(1, 1, 20_000_000) for _ in range(20)])
other.start()
time.sleep(0.05)
"""
    code = FORK.format(before=before, inside="sys.exit(0)").replace("_, status", "other.join()\n_, status")
    output = run_python(code, MOERT_THREADS="1")
    assert output == "child ended with 0\n60\n"


def test_forks_while_threads_compute() -> None:
    """Whatever lock another thread held at the fork, the child gets its error, and ends."""
    code = """
import atexit, os, signal, sys, threading
from moert import _C
atexit.register(_C.stop_threads)
stop = False
def work():
    while not stop:
        _C.pool_probe(2, 4, 0)
        _C.job_wait(_C.pool_probe_submit(2, 4, 0))
_C.pool_probe(1, 4, 0)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
statuses = []
for _ in range(60):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try: _C.pool_probe(1, 4, 0)
        except RuntimeError: sys.exit(3)
        sys.exit(4)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop = True
for thread in threads: thread.join()
print(set(statuses))
"""
    assert run_python(code, MOERT_THREADS="3") == "{3}\n"


LEAVE = """
import atexit, threading, time
from moert import _C
def leave():
    began = time.monotonic()
    _C.stop_threads()
    print("stopped", time.monotonic() - began < 30)
    for call in (lambda: _C.pool_probe(1, 2, 0), lambda: _C.pool_probe_submit(1, 2, 0), lambda: _C.set_threads(2)):
        try: call(); print("no error")
        except RuntimeError as error: assert "exiting" in str(error), error
def in_background(call):
    def until_refused():
        try: call()
        except RuntimeError: pass
    threading.Thread(target=until_refused, daemon=True).start()
if {stop}: atexit.register(leave)
{body}
"""
# More than an hour of work.
PENDING = "jobs = [_C.pool_probe_submit(10, 1000, 10_000_000) for _ in range(40)]"
LEFT_BEHIND = {
    "nothing": "",
    "spinning": "_C.pool_probe(1, 10, 0)",
    "asleep": "_C.pool_probe(1, 10, 0); time.sleep(0.05)",
    "unawaited": "_C.pool_probe_submit(1, 10, 1000)",
    "pending": PENDING,
    "awaited": f"{PENDING}; in_background(lambda: _C.job_wait(jobs[1])); time.sleep(0.05)",
    "computing": "in_background(lambda: _C.pool_probe(10, 100_000, 10_000_000)); time.sleep(0.05)",
    "calling": """
def compute():
    while True:
        _C.pool_probe(2, 5, 1000)
        _C.job_wait(_C.pool_probe_submit(2, 5, 1000))
for _ in range(3): in_background(compute)
time.sleep(0.1)
""",
}


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("left", LEFT_BEHIND)
def test_the_process_ends_whatever_its_threads_do(threads: str, stop: bool, left: str) -> None:
    output = run_python(LEAVE.format(stop=stop, body=LEFT_BEHIND[left]), MOERT_THREADS=threads, timeout=60)
    assert output == ("stopped True\n" if stop else "")


def find_compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler


def check_native(folder: Path, *options: str, rounds: int) -> None:
    program = folder / "pool_check"
    sources = ["tests/native/pool_check.cpp", "csrc/pool.cpp", "csrc/job_queue.cpp", "csrc/affinity.cpp"]
    build = [find_compiler(), "-std=c++17", "-O1", "-g", "-pthread", "-Icsrc", *options, *sources, "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=250)
    # Older thread sanitizers cannot cope with the address spaces that newer kernels lay out at random.
    fixed = [setarch, "-R"] if "-fsanitize=thread" in options and (setarch := shutil.which("setarch")) else []
    child = subprocess.run([*fixed, program, str(rounds)], capture_output=True, text=True, timeout=250)
    assert (child.returncode, child.stdout) == (0, "all hold\n"), child.stderr


def test_native_checks(tmp_path: Path) -> None:
    check_native(tmp_path, "-Wall", "-Wextra", "-Werror", rounds=100)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_native_checks_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    options = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    probe = [find_compiler(), *options, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    check_native(tmp_path, *options, rounds=300)
