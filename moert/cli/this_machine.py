"""This machine as a description, from a look of some seconds."""

from __future__ import annotations

import tempfile
import time
from typing import TYPE_CHECKING

from moert.cli import probes
from moert.errors import MoertError

if TYPE_CHECKING:
    from moert.planning.machine import Machine

_SIDE = 1536
_PASSES = 3


def this_machine() -> Machine:
    """What is here, measured: memory's speed, the disk's below the temporary folder, and products of matrices. Blocks.

    A layer's own time is assumed. Without a device: those of this machine are not measured yet.

    Raises:
        MoertError: something could not be measured.
    """
    from moert.planning.machine import read_machine

    processor = probes.probe(probes.cpu)
    memory = probes.probe(probes.memory, processor.get("cores_usable") or 1)
    disk = probes.probe(probes.folder_disk, tempfile.gettempdir())
    for name, found in (("memory", memory), ("disk", disk)):
        if "problem" in found:
            raise MoertError(f"this machine's {name} could not be measured ({found['problem']}); describe it in a file")

    def measured(value: float, how: str) -> dict[str, object]:
        return {"value": value, "measured": how}

    values = {
        "host_memory_bytes": measured(memory["available_bytes"], f"limited by {memory['binding']}"),
        "host_bytes_per_s": measured(memory["read_bytes_per_s"], "read by all usable cores"),
        "cpu_flops": measured(_flops(), f"torch, bfloat16, {_SIDE} x {_SIDE}"),
        "disk_bytes_per_s": measured(disk["read_bytes_per_s"], f"{disk['file_system']}, {disk['record_bytes']} bytes"),
        "layer_start_s": {"value": 5e-4, "assumed": "Python and torch between a layer's products"},
    }
    return read_machine({"values": values}, "this")


def _flops() -> float:
    import torch

    a = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(_PASSES):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2.0 * _SIDE**3 / best
