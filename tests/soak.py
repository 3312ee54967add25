"""One long run of everything at once; `test_soak.py` starts it as a process of its own and judges what it prints.

Of each checkpoint, a model with every expert resident computes what is right; beside it, models with random budgets, on
a disk that fails now and then, generate, prefetch, change size and are interrupted, and each result is compared bit by
bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import gc
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from faulty_disk import Fault, FaultyDisk

import moert
from moert.errors import MoertError, TransferError
from moert.hf.model import runtime_of
from moert.tiers.disk import Priority
from moert.tiers.memory import rss_bytes
from moert.tiers.shard_file import ShardFile
from moert.types import ExpertId

ROUND_S = 6.0
STUCK_TICKS = 90
"""An action that takes longer, in seconds, hangs: all threads' stacks are printed and the process ends."""
BACKSTOP_S = 1500.0
"""The same for what does not let any other thread run."""
TOKENS = (3, 90)
"""None of those that stand for something else in any of the models."""


class Watchdog:
    """Counts seconds in which this process ran: one that was stopped, to leave the machine to another, has not hung."""

    def __init__(self) -> None:
        self._ticks = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def stroke(self) -> None:
        """Something has been done."""
        self._ticks = 0
        faulthandler.dump_traceback_later(BACKSTOP_S, exit=True)

    def _watch(self) -> None:
        while self._ticks < STUCK_TICKS:
            time.sleep(1)
            self._ticks += 1
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)


class Interrupts:
    """KeyboardInterrupt at a random moment of the body."""

    def __init__(self) -> None:
        self._is_armed = False
        signal.signal(signal.SIGALRM, self._on_alarm)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._is_armed:
            self._is_armed = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        try:
            self._is_armed = True
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            self._is_armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)


class Round:
    """One model from loading to closing."""

    def __init__(
        self,
        folder: str,
        right: Any,
        dtype: torch.dtype,
        choose: random.Random,
        counts: Counter[str],
        alarm: Interrupts,
        watchdog: Watchdog,
    ) -> None:
        self._choose = choose
        self._right = right
        self._counts = counts
        self._alarm = alarm
        self._watchdog = watchdog
        self._is_failing = False
        # Without calls of its own a file is read by whatever way is fastest; that way is to be seen here as well.
        self._disk = FaultyDisk(choose.randrange(1 << 30)) if choose.random() < 0.7 else None
        options: dict[str, Any] = {
            "host_memory": f"{choose.randint(26, 100)}%",
            "io_depth": choose.randint(1, 6),
            "direct_io": choose.random() < 0.7,
            "preload": choose.choice([None, True, False]),
            "debug": choose.random() < 0.3,
            "shrink_on_pressure": False,
        }
        with contextlib.ExitStack() as stack:
            if self._disk is not None:
                self._disk.before_call = self._pause
                defaults = {**(ShardFile.__init__.__kwdefaults__ or {}), "calls": self._disk.calls}
                stack.enter_context(mock.patch.object(ShardFile.__init__, "__kwdefaults__", defaults))
            self.model = moert.load(folder, dtype=dtype, **options)
        self._runtime = runtime_of(self.model)

    def _pause(self) -> None:
        if self._is_slow:
            time.sleep(random.random() * 0.002)

    _is_slow = False

    def run(self, until: float) -> None:
        actions: list[tuple[Callable[[], None], int]] = [
            (self._forward, 6),
            (self._generate, 3),
            (self._weights, 2),
            (self._prefetch, 4),
            (self._resize, 1),
            (self._break, 2),
        ]
        while time.monotonic() < until:
            self._watchdog.stroke()
            (action,) = self._choose.choices([one for one, _ in actions], [weight for _, weight in actions])
            self._do(action)
            if self._choose.random() < 0.05:
                self._check()

    def _do(self, action: Callable[[], None]) -> None:
        name = action.__name__.strip("_")
        self._counts[name] += 1
        interrupt = self._choose.random() < 0.3 and action != self._break
        try:
            if interrupt:
                with self._alarm.within(
                    self._choose.choice([0.0003, 0.001, 0.003, 0.01]) * (0.05 + self._choose.random())
                ):
                    action()
            else:
                action()
        except KeyboardInterrupt:
            self._counts[f"{name} interrupted"] += 1
        except TransferError as error:
            if not (self._is_failing and error.errno == errno.EIO and str(error.filename).endswith(".safetensors")):
                raise
            self._counts[f"{name} failed"] += 1
            self._mend()

    def _check(self) -> None:
        """After an interrupt the books are put in order by whatever is done next, here nothing."""
        with contextlib.suppress(TransferError):
            self._runtime.prefetch([])
        self._runtime.pipeline.check_integrity()
        for layer in self._runtime.layers:
            layer.residency.check_integrity()

    def _prompt(self, rows: int, most: int) -> torch.Tensor:
        seed = torch.Generator().manual_seed(self._choose.randrange(1 << 30))
        return torch.randint(*TOKENS, (rows, self._choose.randint(1, most)), generator=seed)

    def _forward(self) -> None:
        ids = self._prompt(self._choose.randint(1, 3), 24)
        with torch.no_grad():
            found = self.model(ids).logits
            self._disarm()
            assert torch.equal(found, self._right(ids).logits), "other logits"

    def _generate(self) -> None:
        ids = self._prompt(1, 12)
        how: dict[str, Any] = {
            "max_new_tokens": self._choose.randint(1, 8),
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        found = self.model.generate(ids, **how)
        self._disarm()
        right = self._right.generate(ids, **how)
        assert torch.equal(found.sequences, right.sequences), "other tokens"
        assert all(torch.equal(a, b) for a, b in zip(found.logits, right.logits, strict=True)), "other logits"

    def _disarm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _experts(self, most: int) -> list[ExpertId]:
        layers = self._runtime.layers
        return [
            ExpertId(layer, self._choose.randrange(layers[layer].spec.num_experts))
            for layer in (self._choose.randrange(len(layers)) for _ in range(self._choose.randint(1, most)))
        ]

    def _weights(self) -> None:
        (expert,) = self._experts(1)
        found = self._runtime.weights(*expert)
        self._disarm()
        right = runtime_of(self._right).weights(*expert)
        assert found.keys() == right.keys()
        assert all(torch.equal(found[name], right[name]) for name in right), expert

    def _prefetch(self) -> None:
        experts = self._experts(10)
        self._runtime.prefetch(experts, self._choose.choice([Priority.PROMOTION, Priority.PREFETCH]))
        if self._choose.random() < 0.5:
            self._runtime.withdraw(self._choose.sample(experts, len(experts) // 2))

    def _resize(self) -> None:
        moert.resize(self.model, f"{self._choose.randint(26, 100)}%")

    def _break(self) -> None:
        if self._disk is None:
            return
        kind = self._choose.choice(["once", "once", "short", "again", "slow", "fast", "for good"])
        self._counts[kind] += 1
        if kind == "once":
            if not self._is_failing:
                self._drain()  # else it may hit a read that is just about to be tried again
            self._disk.add(Fault(errno.EIO, times=1))
        elif kind == "short":
            self._disk.add(Fault(keep_bytes=4096 * self._choose.randint(1, 3), times=3))
        elif kind == "again":
            self._disk.add(Fault(errno.EINTR, times=5))
        elif kind == "for good":
            self._is_failing = True
            self._disk.add(Fault(errno.EIO))
        else:
            self._is_slow = kind == "slow"
        # Two errors in a row are as good as one that stays.
        self._is_failing |= sum(fault.code == errno.EIO for fault in self._disk.faults) > 1

    def _mend(self) -> None:
        assert self._disk is not None
        self._disk.mend()
        self._drain()
        self._is_failing = False

    def _drain(self) -> None:
        """What failed before the disk was mended has been told when this returns."""
        with contextlib.suppress(TransferError):
            self._runtime.prefetch([])
        with self._runtime._lock:
            self._runtime.pipeline.drain()

    def close(self) -> None:
        if self._disk is not None:
            self._disk.mend()
            # The model's finaliser holds its runtime, that its files, and those the disk: a ring with a root.
            self._disk.before_call = None
        try:
            with self._alarm.within(self._choose.random() * 0.001):
                moert.close(self.model)
        except KeyboardInterrupt:
            self._counts["close interrupted"] += 1
        moert.close(self.model)
        try:
            self._runtime.weights(0, 0)
        except MoertError:
            return
        raise AssertionError("a closed runtime answers")


def footprint() -> dict[str, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not what the program holds
    return {
        "rss_bytes": rss_bytes(),
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def main(root: str, seconds: float, seed: int) -> None:
    faulthandler.enable()
    choose, counts, alarm, watchdog = random.Random(seed), Counter[str](), Interrupts(), Watchdog()
    torch.manual_seed(seed)
    folders = sorted(path for path in Path(root).iterdir() if path.is_dir())
    rights = {
        (folder, dtype): moert.load(folder, dtype=dtype, host_memory="100%", shrink_on_pressure=False)
        for folder in folders
        for dtype in (torch.float32, torch.bfloat16)
    }
    # In turn, so that what is made once for each of them is made soon.
    turns = itertools.cycle(rights.items())
    samples = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        (folder, dtype), right = next(turns)
        counts[f"rounds of {folder.name}"] += 1
        one = Round(str(folder), right, dtype, choose, counts, alarm, watchdog)
        try:
            one.run(min(end, time.monotonic() + min(ROUND_S, seconds / (2 * len(rights)))))
        finally:
            watchdog.stroke()
            one.close()
            del one
        samples.append(footprint())
        print(json.dumps(samples[-1]), flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"counts": dict(sorted(counts.items())), "rounds": len(samples), "samples": samples}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
