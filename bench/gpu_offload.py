"""End to end with offloading: a model of Qwen3-30B-A3B's shape under several device budgets, beside transformers'
`device_map`; each part in a process and a time limit of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_bounds import SHARES, WHOLE, judge
from gpu_layers import Setting
from gpu_offload_parts import (
    Plan,
    at_budget,
    beside_hf,
    from_disk,
    graphs,
    int4,
    probe,
    several_gpus,
    write_checkpoint,
)
from gpu_process import run_apart
from gpu_random_model import expert_bytes, shape_of
from gpu_results import Rows

MARGIN_S = 4.0
"""Left of the step's time for what is to be said at its end."""


@dataclass(frozen=True)
class Part:
    """Some of the step."""

    name: str
    limit_s: float
    work: Callable[[Plan, Rows, float], None]
    """The last argument is when it is ended, of `time.monotonic`."""


FIRST = Part("sizes", 40, probe)

PARTS = (
    Part(f"budget {WHOLE} %", 70, at_budget(WHOLE)),
    Part("budget 25 %", 80, at_budget(25)),
    Part("device_map 25 %", 60, beside_hf(25)),
    *(Part(f"budget {share} %", 60, at_budget(share)) for share in SHARES if share != 25),
    *(Part(f"graphs {share} %", 50, graphs(share)) for share in (25, WHOLE)),
    Part("several GPUs 25 %", 80, several_gpus(25)),
    Part("checkpoint", 40, write_checkpoint),
    Part("disk", 50, from_disk),
    Part("int4", 60, int4),
    *(Part(f"device_map {share} %", 50, beside_hf(share)) for share in SHARES if share != 25),
)
"""The most important ones first."""


def run(setting: Setting, rows: Rows, peaks: dict[str, float], until: float, scratch: Path) -> None:
    """All parts, as far as there is time; `scratch` is for checkpoints.

    Raises:
        RuntimeError: some did not end well; everything else was done, and every row written.
    """
    # Who asks whether there is a GPU, as packages do when they are imported, must not use it: its forks could not.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # What every part needs, once: they are forks.
    import accelerate  # noqa: F401
    from transformers import Qwen3MoeForCausalLM  # noqa: F401

    failed: dict[str, str] = {}
    plan = Plan(setting, scratch, layers=1)
    ended = _run_part(FIRST, plan, rows, until - MARGIN_S)
    found = {row["key"]: row["value"] for row in rows.rows if row.get("key")}
    if ended != "well" or "layers" not in found:
        raise RuntimeError(f"{FIRST.name}: {ended}")
    plan = Plan(setting, scratch, layers=int(found["layers"]))
    _ = plan.routing  # made once for all forks
    for part in PARTS:
        ended = _run_part(part, plan, rows, until - MARGIN_S)
        if ended != "well":
            failed[part.name] = ended
            rows.add(f"part {part.name}", None, "", goal="offload", why=ended)
    link = 1e9 * peaks.get("host_to_device", found["link"])
    judge(rows, link, expert_bytes(shape_of(setting)))
    if failed:
        raise RuntimeError("; ".join(f"{name}: {ended}" for name, ended in failed.items()))


def _run_part(part: Part, plan: Plan, rows: Rows, until: float) -> str:
    begin = time.monotonic()
    limit_s = min(part.limit_s, until - begin)
    if limit_s < 2 * MARGIN_S:
        return "not begun: no time was left"
    print(f"-- {part.name}", flush=True)

    def work(into: Any) -> None:
        import torch

        if plan.setting.is_dry:
            torch.set_num_threads(1)
        # It is to end by itself, with what it has.
        part.work(plan, into, begin + limit_s - MARGIN_S)

    ending = run_apart(work, limit_s)
    rows.extend(ending.rows)
    print(f"-- {part.name} ended {ending.ended}, {ending.seconds:.0f} s", flush=True)
    return ending.ended
