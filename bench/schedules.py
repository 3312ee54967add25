"""Milliseconds a token with each way of scheduling, simulated on real traces beside a published-style table.

    python bench/schedules.py ../shared/traces --json bench/results/schedules.json

One sequence decodes; a quarter of each layer's experts is on the device; caches are warmed by the tokens before the
middle of a trace's first `SAMPLE` tokens, and the next ones are timed. Times are of experts and the layers' other
work: no launches, no contention between the link and the CPU. Rates of links and the bytes of an expert are given
(see `COLUMNS`); what a layer takes besides its experts, an expert on the device and the rate of the CPU are fitted:
so that the rows of LRU, of everything on the device and of the frozen hot set come out as in the reference column.
All other rows follow. With this sample of MMLU-Pro the reference's hit rates, 39.2 % frozen and 72.9 % promoted, come
out too, so it is the one that it was made with. That of DeepSeek-V2-Lite is not known, and its rows are up to a tenth
off: those of `exact` with promotion by 5 to 10 %, as are those where MIN evicts, which no way of caching could
change, by 7 to 11 %. In the reference promotion leaves 83 to 85 % of the misses of the frozen set, whatever the
fitted times are, and here 93 %.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from scipy.optimize import brentq

from moert.schedule import Costs, Curve, Promotion
from moert.simulate.timed import Timed, simulate_time
from moert.trace import Phase, Sequence, Trace
from moert.trace.importers.base import ImportOptions
from moert.trace.importing import load_importer, recognise
from moert.types import ExpertId


@dataclass(frozen=True)
class Column:
    """A model on a machine, and what the reference has for it in ms a token."""

    name: str
    file: str
    experts: int
    expert_bytes: float
    link_bytes_per_s: float
    cpu_bytes_per_s: float
    reference: dict[str, float]


@dataclass(frozen=True)
class Way:
    """A row: how events are scheduled, what leaves, and whether the idle link promotes."""

    name: str
    scheduler: str
    policy: str
    promotes: bool = False
    is_hot: bool = False
    """Begins with the experts that were used most before, not with what the policy keeps."""


FETCHED = "fetch, LRU"
FITTED = "frozen hot set + CPU"
WAYS = (
    Way(FETCHED, "fetch_all", "lru"),
    Way("fetch, MIN", "fetch_all", "min_bypass"),
    Way(FITTED, "static_split", "ema", is_hot=True),
    Way("CPU for misses + promotion", "static_split", "ema", promotes=True),
    Way("HybriMoE, MRS", "hybrimoe", "mrs"),
    Way("DALI, LFU", "dali", "lfu"),
    Way("exact, no promotion", "exact", "ema", is_hot=True),
    Way("exact + promotion", "exact", "ema", promotes=True),
    Way("exact + promotion, MIN evicts", "exact", "min_bypass", promotes=True),
)
ON_DEVICE = "all on the device"
BOUND = "bound"

SAMPLE = 4000
"""Tokens of a trace, those included that its file marks as a model repeating itself."""
GPT_OSS = "gpt-oss-20b/gpt-oss-20b_mmlu_pro_test.npz"
DEEPSEEK = "deepseek-v2-lite/deepseek_v2_lite_summary.npz"
DESKTOP, LAPTOP = (25e9, 40e9), (7e9, 30e9)
"""Bytes a second of the link, 16 lanes of PCIe 4 and 8 of PCIe 3, and of the CPU, where that is not fitted."""
NAMES = [
    FETCHED,
    "fetch, MIN",
    FITTED,
    "CPU for misses + promotion",
    "exact, no promotion",
    "exact + promotion",
    "exact + promotion, MIN evicts",
    BOUND,
    ON_DEVICE,
]


def _reference(*values: float) -> dict[str, float]:
    return dict(zip(NAMES, values, strict=True))


COLUMNS = (
    Column(
        "gpt-oss-20b, PCIe 4", GPT_OSS, 32, 13.2e6, *DESKTOP,
        _reference(22.6, 14.9, 22.9, 12.9, 11.6, 11.5, 10.2, 6.1, 5.8)
    ),
    Column(
        "gpt-oss-20b, laptop", GPT_OSS, 32, 13.2e6, *LAPTOP,
        _reference(72.7, 44, 30.9, 17.8, 30.9, 17.8, 16.1, 10.7, 9.1)
    ),
    Column(
        "DeepSeek-V2-Lite 4-bit, PCIe 4", DEEPSEEK, 64, 4.9e6, *DESKTOP,
        _reference(19.3, 12.8, 15.5, 13.5, 10.5, 10.5, 8.1, 5.4, 5.7),
    ),
    Column(
        "DeepSeek-V2-Lite 4-bit, laptop", DEEPSEEK, 64, 4.9e6, *LAPTOP,
        _reference(62.5, 38.3, 20.8, 18.3, 18.5, 17.6, 13.9, 9.3, 8.6),
    ),
    Column(
        "DeepSeek-V2-Lite bf16, PCIe 4", DEEPSEEK, 64, 17e6, *DESKTOP,
        _reference(60.9, 36.5, 43.7, 37.1, 27.9, 27.9, 19.6, 13.6, 5.7),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A trace cut for timing, and its hottest experts before what is timed."""

    trace: Trace
    hot: list[ExpertId]


def cut(path: Path, experts: int, *, warm_up: int, measured: int, sample: int | None = None) -> Case:
    """The tokens about the middle of a trace as one sequence, those before it as its prompt, a token a step.

    Args:
        sample: of so many tokens of the trace, repetitions among them; None: of all that are none.
    """
    options = ImportOptions(experts=experts, keep_repetition=sample is not None)
    header, found = load_importer(recognise(path)).read(path, options)
    ids = np.concatenate([sequence.experts for sequence in found])[:sample]
    middle = len(ids) // 2
    slots = experts // 4
    hot = []
    for layer in range(ids.shape[1]):
        counts = np.bincount(ids[:middle, layer].ravel(), minlength=experts)
        hot += [ExpertId(layer, int(e)) for e in np.argsort(-counts, kind="stable")[:slots]]
    begin = max(0, middle - warm_up)
    ids = ids[begin : middle + measured]
    phases = np.where(np.arange(len(ids)) < middle - begin, Phase.PREFILL, Phase.DECODE).astype(np.uint8)
    return Case(Trace(header, [Sequence(ids, np.arange(len(ids)), phases)]), hot)


def costs_of(column: Column, case: Case, layer_s: float) -> Costs:
    """What the column's numbers say, with what is left of the row with everything on the device for an expert there."""
    layers = case.trace.header.layers
    picks = len(layers) * case.trace.header.top_k
    device_s = (column.reference[ON_DEVICE] * 1e-3 - len(layers) * layer_s) / picks
    return Costs(
        Curve.proportional(column.expert_bytes / column.cpu_bytes_per_s),
        Curve.constant(device_s),
        move_s=column.expert_bytes / column.link_bytes_per_s,
    )


def timed(way: Way, column: Column, case: Case, layer_s: float) -> Timed:
    """One cell."""
    return simulate_time(
        case.trace,
        way.policy,
        "25%",
        costs_of(column, case, layer_s),
        layer_s=layer_s,
        scheduler=way.scheduler,
        promotion=Promotion() if way.promotes else None,
        residents=case.hot if way.is_hot else None,
    )


def fit(column: Column, case: Case) -> tuple[Column, float]:
    """The column with the rate of its CPU, and the seconds that a layer takes besides its experts.

    So that LRU and the frozen row are the reference's, as far as they can.
    """
    ways = {way.name: way for way in WAYS}
    most = column.reference[ON_DEVICE] * 1e-3 / len(case.trace.header.layers)
    layer_s = _root(
        lambda layer_s: (
            timed(ways[FETCHED], column, case, layer_s).seconds_per_token - column.reference[FETCHED] * 1e-3
        ),
        0.02 * most,
        0.98 * most,
    )
    rate = _root(
        lambda rate: (
            column.reference[FITTED] * 1e-3
            - timed(ways[FITTED], replace(column, cpu_bytes_per_s=rate), case, layer_s).seconds_per_token
        ),
        10e9,
        80e9,
    )
    return replace(column, cpu_bytes_per_s=rate), layer_s


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function is 0, or the end that is nearest to it."""
    if excess(low) >= 0:
        return low
    if excess(high) <= 0:
        return high
    return float(brentq(excess, low, high, rtol=1e-4))


def run(column: Column, case: Case) -> dict[str, Any]:
    """Every row of a column."""
    column, layer_s = fit(column, case)
    rows = {way.name: timed(way, column, case, layer_s) for way in WAYS}
    costs = costs_of(column, case, layer_s)
    assert costs.device is not None
    return {
        **asdict(column),
        "tokens": next(iter(rows.values())).tokens,
        "fitted_layer_s": layer_s,
        "fitted_device_s": costs.device(1),
        "bound_ms": 1e3 * rows["exact + promotion"].bound_s / rows["exact + promotion"].tokens,
        "rows": {
            name: {
                "ms_per_token": 1e3 * row.seconds_per_token,
                "hit_rate": row.hit_rate,
                "fetched_per_token": row.fetched / row.tokens,
                "promoted_per_token": row.promoted / row.tokens,
                "share_of_bound": row.share_of_bound,
            }
            for name, row in rows.items()
        },
    }


def markdown(columns: list[dict[str, Any]]) -> str:
    """The table: simulated ms a token, the reference's in brackets."""
    lines = [
        "| ms/token | " + " | ".join(column["name"] for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name in [*(way.name for way in WAYS), BOUND, ON_DEVICE]:
        cells = []
        for column in columns:
            value = {BOUND: column["bound_ms"], ON_DEVICE: column["reference"][ON_DEVICE]}.get(name)
            value = column["rows"][name]["ms_per_token"] if value is None else value
            known = column["reference"].get(name)
            cells.append(f"{value:.1f}" + ("" if known is None else f" ({known:.1f})"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    traces: Annotated[Path, typer.Argument(help="The folder with the traces.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are timed.")] = 600,
    warm_up: Annotated[int, typer.Option(min=0, help="Tokens before them that warm the caches.")] = SAMPLE // 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything there.")] = None,
) -> None:
    """Simulate every cell, and print the table."""
    found = []
    for column in COLUMNS:
        case = cut(traces / column.file, column.experts, warm_up=warm_up, measured=tokens, sample=SAMPLE)
        found.append(run(column, case))
        Console(stderr=True).print(f"{column.name}: done")
    print(markdown(found))
    if json_path is not None:
        document = {"tokens": tokens, "warm_up": warm_up, "sample": SAMPLE, "cached": "25%", "columns": found}
        json_path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
