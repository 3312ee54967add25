"""Forecasts of speed against the speeds that come, on this machine: the planner's, and simulated time's.

    python bench/make_checkpoint.py olmoe-bench /data/olmoe --layers 4
    python bench/forecast.py /data/olmoe --budgets 25%,50%,75% --rounds 3 --json forecast.json

Each round calibrates the checkpoint and then loads it with each budget, twice, because disks and neighbours change by
the minute; forecasts are from the medians of the calibrations, and compared with the medians of the runs. The planner
forecasts decoding and reading a prompt from the calibration and the routing of other prompts; simulated time replays
the routing of the very prompts that are timed, as recorded with all experts in memory. The model runs without
prediction of experts, which forecasts know nothing of. Random weights route almost evenly: a cache hits about its
share.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import machine as about_machine
from rich.console import Console
from rich.table import Table
from start import start_with

import moert
from moert.calibration import CalibratedMachine, Calibration, Measured
from moert.cli.plan import make_plan
from moert.cli.routing import read_routing
from moert.cli.this_machine import this_machine
from moert.config import parse_budget
from moert.hf.calibrating import calibrate
from moert.hf.model_needs import read_needs
from moert.hf.text import hush
from moert.simulate.timed import simulate_time
from moert.torch_threads import wanted_settings
from moert.trace import Trace, TraceWriter

POLICY = "ema"
PASSES = 2
"""Over all budgets after each calibration, which takes longer than they do."""


@dataclass
class Timed:
    """One prompt that was continued."""

    first_s: float
    decode_s: float
    decode_hits: int
    decode_misses: int


class Watch:
    """A streamer for `generate` that looks at the clock and at the cache when tokens come."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.looks: list[tuple[float, int, int]] = []
        self.look()

    def look(self) -> None:
        from time import perf_counter

        stats = moert.stats(self._model)
        self.looks.append((perf_counter(), stats.hits, stats.misses))

    def put(self, value: torch.Tensor) -> None:
        if len(self.looks) < 3:  # the prompt, then the first token
            self.look()

    def end(self) -> None:
        self.look()

    def timed(self) -> Timed:
        """What it has seen."""
        begin, _, first, end = self.looks
        return Timed(first[0] - begin[0], end[0] - first[0], end[1] - first[1], end[2] - first[2])


def go_on(model: Any, prompt: list[int], tokens: int) -> Timed:
    """Continue a prompt by exactly so many tokens."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    watch = Watch(model)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
        streamer=watch,
    )
    return watch.timed()


def error(forecast: float, measured: float) -> float:
    return forecast / measured - 1


def middle(found: list[Calibration]) -> Calibration:
    """Of each number the one in the middle."""

    def of(parts: list[Any]) -> Any:
        if isinstance(parts[0], Measured):
            return sorted(parts, key=lambda part: part.seconds)[(len(parts) - 1) // 2]
        if isinstance(parts[0], dict):
            return {n: of([part[n] for part in parts]) for n in parts[0] if all(n in part for part in parts)}
        return parts[0]

    return Calibration(**{name: of([vars(one)[name] for one in found]) for name in vars(found[0])})


def study(folder: Path, budgets: list[str], prompt_tokens: int, tokens: int, rounds: int, say: Any) -> dict[str, Any]:
    """All of one checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, config["vocab_size"] // 2, (4, prompt_tokens), generator=draw).tolist()
    asked = prompts[2:]
    needs = read_needs(folder)
    base = this_machine()
    found: list[Calibration] = []
    live: dict[str, list[list[Timed]]] = {budget: [] for budget in budgets}
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.safetensors"
        say(f"{folder.name}: routing")
        with moert.load(folder, host_memory="100%") as model, moert.record(model, weights=False) as recorded:
            for prompt in prompts:
                go_on(model, prompt, tokens)
        writer = TraceWriter(trace, recorded.header)
        for sequence in recorded.sequences[:2]:
            writer.add(sequence)
        writer.close()
        routing = read_routing(trace, needs)
    own = Trace(recorded.header, recorded.sequences[2:])
    for number in range(rounds):
        say(f"{folder.name}: round {number + 1} of {rounds}, calibrating")
        found.append(calibrate(folder))
        for budget in budgets * PASSES:
            say(f"{folder.name}: round {number + 1} of {rounds}, {budget}")
            with moert.load(folder, host_memory=budget, predictor="none") as model:
                live[budget].append([go_on(model, prompt, tokens) for prompt in asked])
    calibration = middle(found)
    machine = CalibratedMachine.of(base, calibration)
    rows, replays = [], []
    for budget in budgets:
        how = {"context": prompt_tokens + tokens, "batch": 1, "host_memory": parse_budget(budget, "budgets")}
        plan = make_plan(needs, machine, hits=routing.hits, prompts=routing.prompts, prompt=prompt_tokens, **how)
        replay = simulate_time(
            own,
            POLICY,
            budget,
            machine.costs(calibration.shape.slot_bytes),
            layer_s=(calibration.dense_s(1) + calibration.steps_s(1)) / len(needs.layers),
        )
        each = [sum(one.decode_s for one in ran) for ran in live[budget]]
        live_s = statistics.median(each)
        ran = live[budget][0]
        replays.append(
            {
                "budget": budget,
                "live_s": live_s,
                "live_each_s": each,
                "simulated_s": replay.seconds,
                "error": error(replay.seconds, live_s),
                "live_hits": sum(one.decode_hits for one in ran),
                "simulated_hits": replay.hits,
                "live_misses": sum(one.decode_misses for one in ran),
                "simulated_misses": replay.accesses - replay.hits,
            }
        )
        for phase in ("decode", "prefill"):
            # The second prompt's: the first one finds empty slots.
            spent = [ran[1].decode_s if phase == "decode" else ran[1].first_s for ran in live[budget]]
            count = tokens - 1 if phase == "decode" else prompt_tokens
            measured = count / statistics.median(spent)
            forecast = plan[phase]["tokens_per_s"]
            rows.append(
                {
                    "budget": budget,
                    "phase": phase,
                    "forecast_tokens_per_s": forecast,
                    "measured_tokens_per_s": measured,
                    "measured_each": [count / s for s in spent],
                    "error": error(forecast, measured),
                    "expected_hit_rate": plan[phase]["hit_rate"],
                }
            )
    return {
        "checkpoint": folder.name,
        "calibrations": [one.as_dict() for one in found],
        "forecasts": rows,
        "replays": replays,
    }


def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="Folders of safetensors checkpoints.")],
    budgets: Annotated[str, typer.Option(help="Of host memory, with commas between.")] = "25%,50%,75%",
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="New ones for each prompt.")] = 25,
    rounds: Annotated[int, typer.Option(min=1, help="Of a calibration and a run with each budget.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all that was measured there.")] = None,
) -> None:
    """Compare forecasts with measurements."""
    console = Console()
    console.width = max(console.width, 110)
    hush(bars=True)
    sizes = [text.strip() for text in budgets.split(",")]
    with console.status("") as status:
        studies = [study(folder, sizes, prompt_tokens, tokens, rounds, status.update) for folder in checkpoints]
    table = Table("", "budget", "", "forecast", "measured", "off by", title="tokens/s")
    for one in studies:
        for row in one["forecasts"]:
            table.add_row(
                one["checkpoint"],
                row["budget"],
                row["phase"],
                f"{row['forecast_tokens_per_s']:.1f}",
                f"{row['measured_tokens_per_s']:.1f}",
                f"{row['error']:+.1%}",
            )
    console.print(table)
    replays = Table(
        "", "budget", "simulated", "live", "off by", "hits simulated", "hits live", title="seconds of decoding"
    )
    for one in studies:
        for row in one["replays"]:
            replays.add_row(
                one["checkpoint"],
                row["budget"],
                f"{row['simulated_s']:.2f}",
                f"{row['live_s']:.2f}",
                f"{row['error']:+.1%}",
                str(row["simulated_hits"]),
                str(row["live_hits"]),
            )
    console.print(replays)
    summary = {
        "forecast_median_error": statistics.median(abs(row["error"]) for one in studies for row in one["forecasts"]),
        "replay_errors": [row["error"] for one in studies for row in one["replays"]],
        "hits_equal": all(row["live_hits"] == row["simulated_hits"] for one in studies for row in one["replays"]),
    }
    console.print(
        f"forecasts are off by {summary['forecast_median_error']:.1%} at the median, simulated times by at most "
        f"{max(map(abs, summary['replay_errors'])):.1%}; hits equal: {summary['hits_equal']}",
        highlight=False,
    )
    if json_path is not None:
        content = {
            "command": shlex.join(sys.argv),
            "machine": about_machine(),
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            "rounds": rounds,
            "summary": summary,
            "studies": studies,
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    start_with(wanted_settings())
    typer.run(main)
