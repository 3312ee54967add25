"""What the machine can do at best: the limits that every other number stands beside."""

from __future__ import annotations

import torch
from gpu_layers import Setting
from gpu_results import Rows
from gpu_timing import elapsed, race

MIB = 1 << 20


def run(setting: Setting, rows: Rows) -> None:
    _memory(setting, rows)
    _link(setting, rows)
    _products(setting, rows)


def _memory(setting: Setting, rows: Rows) -> None:
    nbytes = (64 if setting.is_dry else 2048) * MIB
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    taken = race({"copy": [lambda: target.copy_(source)]}, setting.device)["copy"]
    rows.add("device copy, read and written", 2 * nbytes / taken.median / 1e9, "GB/s", key="device_copy")


def _link(setting: Setting, rows: Rows) -> None:
    device = setting.device
    nbytes = (4 if setting.is_dry else 512) * MIB
    pageable = torch.randint(0, 255, (nbytes,), dtype=torch.uint8)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    kinds = {"pageable": pageable, "pinned": pageable if setting.is_dry else pageable.pin_memory()}
    for kind, here in kinds.items():
        for direction, to, of in (("to the device", there, here), ("from the device", here, there)):
            taken = elapsed(lambda to=to, of=of: to.copy_(of, non_blocking=True), device)  # type: ignore[misc]
            key = "host_to_device" if kind == "pinned" and to is there else None
            rows.add(f"{kind} memory {direction}", nbytes / taken.median / 1e9, "GB/s", key=key)
    pieces = [kinds["pinned"][begin : begin + 9 * MIB] for begin in range(0, nbytes - 9 * MIB, 9 * MIB)]

    def in_pieces() -> None:
        for number, piece in enumerate(pieces):
            there[number * 9 * MIB : (number + 1) * 9 * MIB].copy_(piece, non_blocking=True)

    if pieces:
        taken = elapsed(in_pieces, device)
        rows.add("pinned, in pieces of 9 MiB", len(pieces) * 9 * MIB / taken.median / 1e9, "GB/s")


def _products(setting: Setting, rows: Rows) -> None:
    size = 64 if setting.is_dry else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=setting.device) for _ in range(2))
    taken = race({"matmul": [lambda: a @ b]}, setting.device)["matmul"]
    rows.add("dense bf16 product", 2 * size**3 / taken.median / 1e12, "TFLOP/s", key="dense")
