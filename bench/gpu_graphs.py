"""Single tokens that the device runs by itself: each pass a graph, with a share for the CPU or without, or each kernel
started one by one."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from gpu_bounds import GRAPH, GRAPH_OVER_EAGER
from gpu_layers import Setting
from gpu_random_model import make_model
from gpu_results import Rows
from gpu_tiered import ENOUGH_S, go_by, make_device, prompt_of, tier_of

from moert.config import OffloadConfig
from moert.device.simulated import SimulatedDevice
from moert.runtime.device_ways import HYBRID as BY_BOTH
from moert.runtime.device_ways import Ways

ALONE = "the device alone"
ROUNDS = 3


@dataclass(frozen=True)
class Run:
    """Greedy tokens, and the seconds of each but the first ones."""

    greedy: tuple[int, ...]
    seconds: list[float]


def compare(setting: Setting, layers: int, share: int, rows: Rows, until: float) -> None:
    """Rows: seconds a token in either way, in turns, and how many times as fast the graph is.

    The model routes as its random weights make it, since a trace could not be followed within a graph.
    """
    from moert.hf import patching

    layers = 1 if setting.is_dry else layers
    model = make_model(setting, layers)
    # Kernels of the CPU could not be captured where it stands for a GPU.
    config = OffloadConfig(device_memory=f"{share}%", predictor="none", dense_kernels=False)
    device = SimulatedDevice(virtual=True) if setting.is_dry else make_device(setting)
    patching.patch(model, config, device=device, triton=True, promoting=False)
    go_by(model, ALONE)
    forward = vars(model)["forward"]
    # The kernels for few tokens alone take seconds under the interpreter, and the others more.
    prompt, tokens = (prompt_of(model, setting, 2), 4) if setting.is_dry else (prompt_of(model, setting, 32), 48)
    runs: dict[bool, list[Run]] = {False: [], True: []}
    for _ in range(1 if setting.is_dry else ROUNDS):
        for is_graph in (False, True):
            forward.is_on = is_graph
            if time.monotonic() < until - ENOUGH_S or not runs[is_graph]:
                runs[is_graph].append(_run(model, prompt, tokens))
    facts = {"goal": "G9", "share": share, "layers": layers, "captured": forward.captured, "replayed": forward.replayed}
    median = {way: statistics.median(second for run in found for second in run.seconds) for way, found in runs.items()}
    same = len({run.greedy for found in runs.values() for run in found}) == 1
    rows.add(f"a token at {share} %, kernels one by one", median[False], "s", **facts)
    why = forward.why_not or tier_of(model).planned.why_not
    is_real = forward.replayed > 0
    rows.add(f"a token at {share} %, a graph", median[True] if is_real else None, "s", **facts, why=why)
    ratio = median[False] / median[True] if is_real else None
    rows.add(f"decode at {share} %, {GRAPH_OVER_EAGER}", ratio, "x", target=GRAPH, wrong=not same, **facts, why=why)
    _with_a_share(model, prompt, tokens, f"a token at {share} %, a graph, with a share for the CPU", rows)


def _with_a_share(model: Any, prompt: torch.Tensor, tokens: int, name: str, rows: Rows) -> None:
    """The CPU computes as much of what is missing as the exact scheduler gives it; what it is told is in the graph."""
    tier, forward = tier_of(model), vars(model)["forward"]
    tier.settle()
    tier.go_by(Ways("exact", tier.device.now, (), BY_BOTH))
    forward.is_on = True
    before = forward.replayed
    _run(model, prompt, 2)  # the prompt has the costs measured that shares are made of
    tier.settle()
    left = tier.counts.on_cpu
    run = _run(model, prompt, tokens)
    tier.settle()
    why = tier.planned.why_not_shared or forward.why_not
    seconds = statistics.median(run.seconds) if forward.replayed > before and not why else None
    rows.add(name, seconds, "s", goal="G9", on_cpu=tier.counts.on_cpu - left, tokens=tokens, why=why)


def _run(model: Any, prompt: torch.Tensor, tokens: int) -> Run:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens)
    greedy, seconds = [], []
    with torch.inference_mode():
        logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        for _ in range(tokens):
            begin = time.perf_counter()
            token = logits[:, -1:].argmax(-1)
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            greedy.append(int(logits[0, -1].argmax()))
            seconds.append(time.perf_counter() - begin)
    # By then a graph has been captured, and what comes up at first has.
    return Run(tuple(greedy), seconds[len(seconds) // 2 :])
