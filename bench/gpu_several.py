"""A model over several GPUs, beside the same one over one GPU with as much memory for experts as they have together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from gpu_layers import Setting
from gpu_results import Rows
from gpu_tiered import (
    ENOUGH_S,
    FETCHED,
    HYBRID,
    MEASURED,
    WARM_UP,
    Counts,
    Decoded,
    Lengths,
    decode,
    follow_sequence,
    go_by,
    make_device,
    prompt_of,
    tiers_of,
)

from moert.config import OffloadConfig
from moert.device.base import Device
from moert.device.cuda import CudaDevice
from moert.device.simulated import SimulatedDevice
from moert.trace import Trace

MOST = 2
"""More than two are not asked for: the second one shows what there is to be seen."""


def count(setting: Setting) -> int:
    """GPUs of this machine; a dry run has as many as are asked for."""
    return MOST if setting.is_dry else torch.cuda.device_count()


def make_devices(setting: Setting, n: int) -> list[Device]:
    """The first one is that of `setting`."""
    first = make_device(setting)
    if isinstance(first, SimulatedDevice):
        return [first, *(SimulatedDevice(first.machine, name=f"simulated {i}", beside=first) for i in range(1, n))]
    assert isinstance(first, CudaDevice)
    others = (index for index in range(torch.cuda.device_count()) if index != first.index)
    return [first, *(CudaDevice(index) for _, index in zip(range(1, n), others, strict=False))]


def device_map(layers: int, n: int) -> dict[str, int]:
    """Each of `n` devices has as many layers as the others, in their order; the first one all that is no layer."""
    return {"": 0} | {f"model.layers.{index}": index * n // layers for index in range(layers)}


def compare(model: Any, config: OffloadConfig, setting: Setting, routing: Trace, rows: Rows, until: float) -> None:
    """Rows: tokens a second over one GPU and over several; whether tokens are the same, and layers where they belong.

    `config` has the same share of experts on the device either way, so it is as many bytes in all. The model is
    unpatched in between.
    """
    import moert
    from moert.hf import patching

    layers, found = model.config.num_hidden_layers, {}
    for n in (1, MOST):
        places = device_map(layers, n)
        devices = make_devices(setting, n)
        begin = time.perf_counter()
        if n == 1:
            patching.patch(model, config, device=devices[0])
        else:
            patching.patch(model, config, device=devices, device_map=places)
        facts = {"stored_as": "bf16", "share": config.device_memory, "gpus": n, "layers": layers}
        rows.add(f"patched over {n} GPUs", time.perf_counter() - begin, "s", **facts)
        if n > 1:
            _check_places(model, devices, places, rows)
        for way in (FETCHED, HYBRID):
            if time.monotonic() > until - ENOUGH_S:
                break
            one = found[n, way] = _decode(model, way, setting, routing, until)
            what = f"decode, {config.device_memory} on {n} GPUs, {way}"
            rows.add(what, 1 / one.s_per_token, "tokens/s", goal="offload", several="speed", way=way, **facts)
        moert.unpatch(model)
    _judge(found, rows)


def _decode(model: Any, way: str, setting: Setting, routing: Trace, until: float) -> Decoded:
    lengths = Lengths.of(setting)
    prompt = prompt_of(model, setting, lengths.prompt)
    go_by(model, way)
    with follow_sequence(model, routing, WARM_UP):
        decode(model, prompt, lengths.warm_up, until, None)
    with follow_sequence(model, routing, MEASURED):
        return decode(model, prompt, lengths.tokens, until, lambda: Counts.of(model))


def _check_places(model: Any, devices: Sequence[Device], places: dict[str, int], rows: Rows) -> None:
    """Each device has the layers that it was given, their experts in its own memory, and ran steps of them."""
    right = 0
    for place, (device, tier) in enumerate(zip(devices, tiers_of(model), strict=True)):
        for cache in tier.caches:
            memory = cache.bank.memory
            is_there = tier.device is device and memory is not None and memory.device == device.torch_device
            right += is_there and places[f"model.layers.{cache.spec.index}"] == place
    layers = len(places) - 1
    what = f"layers on the GPU that device_map gave them, of {layers}"
    rows.add(what, float(right), "layers", goal="offload", several="places", wrong=right != layers)


def _judge(found: dict[tuple[int, str], Decoded], rows: Rows) -> None:
    for way in (FETCHED, HYBRID):
        one, several = found.get((1, way)), found.get((MOST, way))
        what = f"decode, {MOST} GPUs over one with the same memory, {way}"
        if one is None or several is None:
            rows.add(what, None, "x", goal="offload", several="ratio", why="no time was left")
            continue
        ratio = one.s_per_token / several.s_per_token
        rows.add(what, ratio, "x", goal="offload", several="ratio", way=way)
        if way == FETCHED:
            pairs = list(zip(one.greedy, several.greedy, strict=False))
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
            what = f"first greedy tokens on {MOST} GPUs that are those of one, of {len(pairs)}"
            rows.add(what, float(same), "tokens", goal="offload", several="tokens", wrong=same < len(pairs))
