"""How much longer an event takes by published schedules than by the exact one: `python bench/schedule_ratios.py`.

Events are drawn: each token picks experts of which some are liked more than others, and the most liked quarter is on
the device. Costs are those of `schedules.py`, of models and machines with assumed rates, where an expert takes the CPU
as long for each of its tokens, and the constants in HybriMoE's own code. A ratio is of an event's makespan to that of
the exact schedule, which no other passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.console import Console
from schedules import COLUMNS, GPT_OSS

from moert.schedule import Costs, Curve, Item, Place, make_scheduler, makespan
from moert.types import ExpertId

SCHEDULERS = ("hybrimoe", "dali", "fiddler", "static_split", "fetch_all")
BATCHES = (1, 4, 16, 64)
SKEW = 1.0
"""Of the logarithms of how much experts are liked."""


class Case(NamedTuple):
    """A model on a machine."""

    name: str
    experts: int
    top_k: int
    costs: Costs


CASES = (
    *(
        Case(
            column.name,
            column.experts,
            4 if column.file == GPT_OSS else 6,
            Costs(
                Curve.proportional(column.expert_bytes / column.cpu_bytes_per_s),
                Curve.constant(column.expert_bytes / 8e11),
                move_s=column.expert_bytes / column.link_bytes_per_s,
            ),
        )
        for column in COLUMNS
    ),
    Case(
        "DeepSeek-V2-Lite, HybriMoE's constants", 64, 6,
        Costs(Curve.proportional(1.0), Curve.constant(0.5), move_s=0.41791, cpu_start_s=0.79),
    ),
)  # fmt: skip
"""With 800 GB/s of the device's memory in the columns of `schedules.py`."""


class Ratios(NamedTuple):
    """Of one scheduler's makespans to the exact ones, over many events."""

    mean: float
    worst: float


def events(experts: int, top_k: int, batch: int, count: int, seed: int = 0) -> Iterator[list[Item]]:
    """So many, each with the experts that `batch` tokens choose."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        liking = draw.normal(0, SKEW, experts)
        resident = set(np.argsort(-liking)[: experts // 4].tolist())
        noise = draw.gumbel(size=(batch, experts))
        picks = np.argsort(-(liking + noise), axis=1)[:, :top_k]
        used, tokens = np.unique(picks, return_counts=True)
        yield [
            Item(ExpertId(0, expert), n, Place.DEVICE if expert in resident else Place.HOST)
            for expert, n in zip(used.tolist(), tokens.tolist(), strict=True)
        ]


def ratios(drawn: Sequence[Sequence[Item]], costs: Costs) -> dict[str, Ratios]:
    """By scheduler."""

    def seconds(name: str) -> list[float]:
        scheduler = make_scheduler(name)
        return [makespan(scheduler.plan(items, costs), costs).makespan_s for items in drawn]

    exact = seconds("exact")
    found = {}
    for name in SCHEDULERS:
        of = [taken / least for taken, least in zip(seconds(name), exact, strict=True)]
        found[name] = Ratios(statistics.fmean(of), max(of))
    return found


def main(count: Annotated[int, typer.Option(min=1, help="Events for each number of tokens.")] = 500) -> None:
    """Print the mean ratios, and the worst ones in brackets."""
    print("| mean (worst) | tokens | " + " | ".join(SCHEDULERS) + " |")
    print("|---|---:|" + "---:|" * len(SCHEDULERS))
    for case in CASES:
        for batch in BATCHES:
            found = ratios(list(events(case.experts, case.top_k, batch, count)), case.costs)
            cells = [f"{one.mean:.3f} ({one.worst:.2f})" for one in found.values()]
            print(f"| {case.name} | {batch} | " + " | ".join(cells) + " |")
        Console(stderr=True).print(f"{case.name}: done")


if __name__ == "__main__":
    typer.run(main)
