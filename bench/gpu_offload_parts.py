"""The parts of the offload step, each as it runs in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gpu_graphs
import gpu_several
import torch
from gpu_layers import Setting
from gpu_random_model import Draw, in_huge_pages, layer_bytes, make_model, most_layers, shape_of
from gpu_results import Rows
from gpu_routing import recorded, synthetic
from gpu_tiered import ENOUGH_S, FETCHED, HYBRID, WAYS, Lengths, Tiered, decode, make_device, prefill, prompt_of

from moert.config import OffloadConfig
from moert.trace import Trace

SETUP_S = 8.0
"""What making a model and page-locking it may take in each part: it decides how many layers there are."""

FEWEST_LAYERS = 2
DISK_LAYERS = 4
"""Of the checkpoint that is written."""

HOST_SHARE, DEVICE_SHARE = 0.55, 0.7
"""How much of each memory experts may take."""

HF_TOKENS = 6

PURE_OTHERS = tuple(way for way in WAYS if way not in (HYBRID, FETCHED))


@dataclass(frozen=True)
class Plan:
    """What all parts share."""

    setting: Setting
    scratch: Path
    layers: int

    @cached_property
    def routing(self) -> Trace:
        shape, lengths = shape_of(self.setting), Lengths.of(self.setting)
        long = max(lengths.long_prompt, lengths.prompt + lengths.tokens)
        what = (self.layers, shape.experts, shape.top_k, (long, lengths.prompt + lengths.warm_up))
        return synthetic(*what) if self.setting.trace is None else recorded(self.setting.trace, *what)

    @property
    def disk_layers(self) -> int:
        return min(DISK_LAYERS, self.layers)

    @property
    def checkpoint(self) -> Path:
        return self.scratch / "checkpoint"


Work = Callable[[Plan, Rows, float], None]


def probe(plan: Plan, rows: Rows, until: float) -> None:
    """How fast experts are made, locked and copied, and so how many layers the model has."""
    from moert.tiers.memory import available_bytes

    setting, shape = plan.setting, shape_of(plan.setting)
    device, draw = make_device(setting), Draw(setting.device)
    begin = time.perf_counter()
    values = in_huge_pages((layer_bytes(shape) // 2,))
    draw.into(values, 1.0)
    made_s = time.perf_counter() - begin
    begin = time.perf_counter()
    device.page_lock(values.data_ptr(), values.nbytes)
    locked_s = time.perf_counter() - begin
    there = device.allocate(values.nbytes).view(values.dtype)
    copies = []
    for _ in range(4):
        begin = time.perf_counter()
        there.copy_(values, non_blocking=True)
        device.synchronize()
        copies.append(time.perf_counter() - begin)
    rows.add("experts of a layer made", values.nbytes / made_s / 1e9, "GB/s")
    rows.add("experts of a layer page-locked", values.nbytes / locked_s / 1e9, "GB/s")
    rows.add("experts of a layer copied to the device", values.nbytes / min(copies) / 1e9, "GB/s", key="link")
    bounds = {
        "whole model": most_layers(setting),
        "time": int(SETUP_S / (made_s + locked_s)),
        "host memory": int(HOST_SHARE * available_bytes() / values.nbytes),
        "device memory": int(DEVICE_SHARE * device.memory.total_bytes / values.nbytes),
    }
    layers = max(FEWEST_LAYERS, min(bounds.values()))
    kind = "synthetic" if setting.trace is None else "recorded"
    source = "as skewed and repetitive as published traces are" if setting.trace is None else setting.trace.name
    facts = {"bounds": bounds, "routing": f"{kind}, {source}"}
    rows.add(f"layers of the model, {kind} routing", float(layers), "layers", goal="offload", key="layers", **facts)


def config(setting: Setting, share: int, **options: Any) -> OffloadConfig:
    """Of one kind for all parts: no predictor knows the trace, and a dry run's CPU is to stand for a GPU."""
    return OffloadConfig(
        device_memory=f"{share}%", predictor="none", dense_kernels=False, context=_context(setting), **options
    )


def at_budget(share: int) -> Work:
    """bf16, all experts in host memory."""

    def work(plan: Plan, rows: Rows, until: float) -> None:
        from moert.hf import patching

        setting = plan.setting
        model = make_model(setting, plan.layers)
        begin = time.perf_counter()
        patching.patch(model, config(setting, share), device=make_device(setting))
        rows.add(f"patched, bf16 at {share} %", time.perf_counter() - begin, "s")
        tiered = Tiered(model, setting, plan.routing, rows, until, stored_as="bf16", share=share)
        if share == 100:
            tiered.decode(FETCHED)
            tiered.prefill(FETCHED)
        else:
            for way in (HYBRID, FETCHED):
                tiered.decode(way)
                tiered.prefill(way)
            for way in PURE_OTHERS:
                tiered.decode(way)
        _add_peak(rows, setting, f"bf16 at {share} %")

    return work


def graphs(share: int) -> Work:
    """The device's own passes, with and without graphs."""

    def work(plan: Plan, rows: Rows, until: float) -> None:
        if share == 25 or not plan.setting.is_dry:  # one of them is enough of the interpreter's time
            gpu_graphs.compare(plan.setting, plan.layers, share, rows, until)

    return work


def several_gpus(share: int) -> Work:
    """The same share of experts, on one GPU and on two; left out where there is one."""

    def work(plan: Plan, rows: Rows, until: float) -> None:
        if gpu_several.count(plan.setting) < 2:
            rows.add("several GPUs", None, "", goal="offload", why="one GPU: left out")
            return
        model = make_model(plan.setting, plan.layers)
        gpu_several.compare(model, config(plan.setting, share), plan.setting, plan.routing, rows, until)

    return work


def beside_hf(share: int) -> Work:
    """What `from_pretrained(device_map=...)` ends in: whole layers in host memory, brought up for each pass."""

    def work(plan: Plan, rows: Rows, until: float) -> None:
        from accelerate import dispatch_model

        setting, lengths = plan.setting, Lengths.of(plan.setting)
        model = make_model(setting, plan.layers)
        here = round(plan.layers * share / 100)
        # To accelerate a model on the CPU has nothing but a disk to be offloaded to.
        main, away = ("cpu", "disk") if setting.is_dry else (setting.device.index or 0, "cpu")
        places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), main)
        places |= {f"model.layers.{index}": main if index < here else away for index in range(plan.layers)}
        model = dispatch_model(
            model,
            places,
            main_device=main,
            offload_dir=str(plan.scratch / f"hf-{share}"),
            skip_keys=model._skip_keys_device_placement,
        )
        facts = {"stored_as": "bf16", "share": share, "way": "device_map", "layers": plan.layers, "layers_there": here}
        prompt = prompt_of(model, setting, lengths.prompt)
        found = decode(model, prompt, HF_TOKENS, until, None)
        kept = found.seconds[1:] or found.seconds
        rows.add(
            f"decode, device_map at {share} %",
            len(kept) / sum(kept),
            "tokens/s",
            goal="offload",
            kind="hf decode",
            **facts,
            n=len(kept),
        )
        if time.monotonic() < until - ENOUGH_S - 2 * max(found.seconds):
            seconds = prefill(model, prompt_of(model, setting, lengths.long_prompt))
            what = f"{lengths.long_prompt} tokens of prompt, device_map at {share} %"
            rows.add(what, seconds, "s", goal="offload", kind="hf prefill", **facts)
        _add_peak(rows, setting, f"device_map at {share} %")

    return work


def write_checkpoint(plan: Plan, rows: Rows, until: float) -> None:
    """A few layers, for the parts that load."""
    model = make_model(plan.setting, plan.disk_layers)
    begin = time.perf_counter()
    model.save_pretrained(plan.checkpoint, save_original_format=False, max_shard_size="2GB")
    seconds = time.perf_counter() - begin
    nbytes = sum(path.stat().st_size for path in plan.checkpoint.iterdir())
    rows.add(f"checkpoint of {plan.disk_layers} layers written", nbytes / seconds / 1e9, "GB/s", nbytes=nbytes)


def from_disk(plan: Plan, rows: Rows, until: float) -> None:
    """A quarter on the device, half in host memory, the rest on disk."""
    _loaded(plan, plan.checkpoint, rows, until, "bf16, half on disk", host_memory="50%")


def int4(plan: Plan, rows: Rows, until: float) -> None:
    """A quarter of a pack on the device, all of it in host memory."""
    import moert
    from moert.formats import FormatChoice
    from moert.hf.packing import pack

    folder = plan.scratch / "int4"
    begin = time.perf_counter()
    pack(str(plan.checkpoint), folder, stored_as=FormatChoice.parse("int4"), moert_version=moert.__version__)
    rows.add(f"{plan.disk_layers} layers packed as int4", time.perf_counter() - begin, "s")
    _loaded(plan, folder, rows, until, "int4", host_memory="100%")


def _loaded(plan: Plan, folder: Path, rows: Rows, until: float, stored_as: str, **options: Any) -> None:
    from moert.hf import loading

    setting = plan.setting
    begin = time.perf_counter()
    chosen, device = config(setting, 25, **options), make_device(setting)
    model = loading.load(folder, chosen, None, device=device, dtype="auto")
    rows.add(f"loaded, {stored_as} at 25 %", time.perf_counter() - begin, "s")
    tiered = Tiered(model.eval(), setting, plan.routing, rows, until, stored_as=stored_as, share=25)
    for way in (HYBRID, FETCHED):
        tiered.decode(way)
    tiered.prefill(FETCHED)
    _add_peak(rows, setting, stored_as)


def _context(setting: Setting) -> int:
    lengths = Lengths.of(setting)
    return max(lengths.long_prompt, lengths.prompt + lengths.tokens)


def _add_peak(rows: Rows, setting: Setting, what: str) -> None:
    if not setting.is_dry:
        rows.add(f"most device memory in use, {what}", torch.cuda.max_memory_allocated(setting.device) / 1e9, "GB")
