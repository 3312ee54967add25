"""How fast replays are beside libCacheSim's: accesses a second on one core, in turns in one process.

    python bench/simulate_speed.py gpt-oss.npz:32 --json simulate-speed.json
    python bench/simulate_speed.py                       # a synthetic trace

Both replay the same accesses: libCacheSim one by one, from a file of its own format by its own C++ loop; moert both one
by one (`sequential`) and with a layer's experts as one event, as the engine has them (`event`; `whole` is the same
with all that a result reports). A round runs each once, in another order each time; speeds are of each one's best
round. Single accesses must miss as often in both, else no speed is given.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import libcachesim
import numpy as np
import numpy.typing as npt
import typer
from policies import Named, open_trace
from report import machine
from rich.console import Console
from rich.table import Table

from moert.simulate._rankings import NEVER
from moert.simulate.events import Events, Reading, first_ids, read_events
from moert.simulate.fast import FastReplay, read_policy
from moert.simulate.future import next_uses
from moert.simulate.run import EventSource, Setup, replay
from moert.trace import LayerInfo, Sequence, Trace, TraceHeader

PAIRS = {"lru": libcachesim.LRU, "belady": libcachesim.Belady}


def synthetic(tokens: int = 10_000, layers: int = 24, experts: int = 32, top_k: int = 4) -> Named:
    """Experts of Zipf popularity, another order in each layer; a token keeps half of what the last one chose."""
    rng = np.random.default_rng(0)
    popular = 1 / np.arange(1, experts + 1)
    chosen = np.empty((tokens, layers, top_k), np.int32)
    for layer in range(layers):
        order = rng.permutation(experts)
        noise = rng.gumbel(size=(tokens, experts)) + np.log(popular)
        for token in range(1, tokens):
            noise[token] = np.where(rng.random(experts) < 0.5, noise[token - 1], noise[token])
        chosen[:, layer] = order[np.argpartition(-noise, top_k, axis=1)[:, :top_k]]
    header = TraceHeader(tuple(LayerInfo(f"layers.{i}", experts, top_k) for i in range(layers)), model="synthetic")
    sequence = Sequence(chosen, np.arange(tokens), np.ones(tokens, np.uint8))
    return Named(Trace(header, [sequence]), "synthetic")


def merged(trace: Any, *, atomic: bool) -> Events:
    """All of a trace's events at once."""
    parts = list(read_events(trace, Reading("all", atomic=atomic)))
    shifts = np.cumsum([0, *(len(part.ids) for part in parts)])
    return Events(
        np.concatenate([part.layer for part in parts]),
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.counted for part in parts]),
        np.concatenate([part.sequence for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + shift for part, shift in zip(parts, shifts, strict=False))]),
        np.concatenate([part.ids for part in parts]),
        0,
        0,
    )


def write_oracle(path: Path, ids: npt.NDArray[Any]) -> None:
    """Accesses in libCacheSim's oracleGeneral format."""
    records = np.zeros(len(ids), dtype=[("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    records["time"], records["id"], records["size"] = np.arange(len(ids)), ids + 1, 1
    last = np.full(int(ids.max()) + 1, NEVER)
    following = next_uses(np.arange(len(ids) + 1), ids, np.zeros(0, np.bool_), 0, last)
    records["next"] = np.where(following == NEVER, -1, following)
    records.tofile(path)


def theirs(policy: str, path: Path, capacity: int, accesses: int) -> tuple[float, int]:
    """Seconds and misses of libCacheSim; the next uses that Belady needs are in the file already."""
    reader = libcachesim.TraceReader(
        trace=str(path),
        trace_type=libcachesim.TraceType.ORACLE_GENERAL_TRACE,
        reader_init_params=libcachesim.ReaderInitParam(ignore_obj_size=True),
    )
    cache = PAIRS[policy](capacity)
    begin = time.perf_counter()
    ratio, _ = cache.process_trace(reader)
    return time.perf_counter() - begin, round(ratio * accesses)


def ours(policy: str, events: Events, bases: npt.NDArray[np.int64], capacity: int) -> tuple[float, int]:
    """Seconds and misses of the compiled replay; Belady's next uses are found within the time."""
    replayer = FastReplay(*read_policy(policy), np.array([capacity]), bases, "global", bypass=False)
    begin = time.perf_counter()
    uses = None
    if replayer.needs_future:
        uses = next_uses(events.offsets, events.ids, np.zeros(0, np.bool_), 0, np.full(int(bases[-1]), NEVER))
    hits, _ = replayer.run(events, uses)
    seconds = time.perf_counter() - begin
    return seconds, len(events.ids) - int(hits.sum())


def whole(policy: str, source: EventSource, capacity: int) -> tuple[float, int]:
    """Seconds and misses of all of `moert.simulate.simulate` but reading the trace."""
    begin = time.perf_counter()
    result = replay(source, policy, capacity, Setup("global"))
    return time.perf_counter() - begin, result.misses


def main(
    trace: Annotated[str | None, typer.Argument(help="A trace file; PATH:EXPERTS where it does not say.")] = None,
    share: Annotated[float, typer.Option(help="Share of all experts in the cache.")] = 0.25,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything there.")] = None,
) -> None:
    """Replay one cache for all layers, and print the speeds."""
    named = synthetic() if trace is None else open_trace(trace)
    bases = first_ids(named.trace.header.layers)
    capacity = max(1, int(share * int(bases[-1])))
    single, together = (merged(named.trace, atomic=atomic) for atomic in (False, True))
    source = EventSource(named.trace, Reading("all"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.oracleGeneral.bin"
        write_oracle(path, single.ids)
        for policy in PAIRS:
            runs: dict[str, Callable[[], tuple[float, int]]] = {
                "libcachesim": lambda policy=policy: theirs(policy, path, capacity, len(single.ids)),  # type: ignore[misc]
                "sequential": lambda policy=policy: ours(policy, single, bases, capacity),  # type: ignore[misc]
                "event": lambda policy=policy: ours(policy, together, bases, capacity),  # type: ignore[misc]
                "whole": lambda policy=policy: whole(policy, source, capacity),  # type: ignore[misc]
            }
            accesses = dict.fromkeys(runs, len(together.ids)) | dict.fromkeys(
                ("libcachesim", "sequential"), len(single.ids)
            )
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            misses = {name: run()[1] for name, run in runs.items()}  # compiles, too
            for number in range(rounds):
                for name in random.Random(number).sample(list(runs), len(runs)):
                    seconds[name].append(runs[name]()[0])
            parity = misses["libcachesim"] == misses["sequential"]
            speed = {name: accesses[name] / min(taken) for name, taken in seconds.items()} if parity else {}
            ratio = {name: speed[name] / speed["libcachesim"] for name in runs} if parity else {}
            rows.append(
                {
                    "policy": policy,
                    "parity": "green" if parity else "red",
                    "accesses": accesses,
                    "misses": misses,
                    "accesses_per_s": speed,
                    "of_libcachesim": ratio,
                    "seconds": seconds,
                }
            )
    kinds = ("sequential", "event", "whole")
    table = Table("policy", "libcachesim M/s", *(f"{kind} M/s" for kind in kinds), *kinds, title=named.name)
    for row in rows:
        speed, ratio = row["accesses_per_s"], row["of_libcachesim"]
        if not speed:
            table.add_row(row["policy"], f"not the same misses: {row['misses']}")
            continue
        table.add_row(
            row["policy"],
            *(f"{speed[name] / 1e6:.1f}" for name in ("libcachesim", *kinds)),
            *(f"{ratio[name]:.2f}x" for name in kinds),
        )
    Console().print(table)
    if json_path is not None:
        document = {
            "command": shlex.join(["bench/simulate_speed.py", *(Path(part).name for part in sys.argv[1:])]),
            "machine": machine() | {package: metadata.version(package) for package in ("numba", "libcachesim")},
            "load": os.getloadavg()[0],
            "trace": named.name,
            "capacity_experts": capacity,
            "rounds": rounds,
            "rows": rows,
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    if any(row["parity"] == "red" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
