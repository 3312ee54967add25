"""A machine in numbers, and what the parts of an expert's work take on it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moert.errors import ConfigError
from moert.schedule import Costs, Curve

FOLDER = Path(__file__).parent.parent / "data" / "machines"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Where the curves of a machine have their points; between them they are straight."""


@dataclass(frozen=True)
class Machine:
    """What a machine does at best, as far as experts and the weights around them go. Zero: it has no such part."""

    name: str
    host_memory_bytes: float
    host_bytes_per_s: float
    """Weights that the CPU computes with, read by all of its threads."""
    cpu_flops: float
    """Of the CPU in matrix products of many tokens."""
    device_memory_bytes: float = 0.0
    device_bytes_per_s: float = 0.0
    """Weights that the device's kernels compute with for one token."""
    device_flops: float = 0.0
    link_bytes_per_s: float = 0.0
    """Host to device, page-locked, in pieces of an expert."""
    disk_bytes_per_s: float = 0.0
    """In pieces of an expert, as many at once as the disk likes best."""
    cpu_expert_start_s: float = 0.0
    """What an expert takes on the CPU before its first byte: its fixed start."""
    cpu_start_s: float = 0.0
    """Handing the CPU an event's experts."""
    merge_s: float = 0.0
    """Waiting for them, and adding up what the CPU and the device computed."""
    layer_start_s: float = 0.0
    """What a layer takes for launching its kernels and all else that is not in its bytes."""
    notes: Mapping[str, str] | None = None
    """Where each number is from."""

    def __post_init__(self) -> None:
        for field in fields(Machine):
            value = getattr(self, field.name)
            if field.name in ("name", "notes"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"machine {self.name!r}: {field.name}={value!r} must be a finite number, 0 or above")
        for name in ("host_memory_bytes", "host_bytes_per_s", "cpu_flops"):
            if not getattr(self, name):
                raise ConfigError(f"machine {self.name!r}: {name} must be above 0")
        device = ("device_bytes_per_s", "device_flops", "link_bytes_per_s")
        if self.has_device and not all(getattr(self, name) for name in device):
            raise ConfigError(f"machine {self.name!r} has device_memory_bytes and so needs {', '.join(device)} above 0")

    @property
    def has_device(self) -> bool:
        """Whether there is anything besides the CPU."""
        return self.device_memory_bytes > 0

    def ends(self) -> tuple[Machine, Machine] | None:
        """The machine as fast, and as slow, as it has been seen to be; None: nobody has looked more than once."""
        return None

    def costs(self, expert_bytes: float, weight_bits: float = 16) -> Costs:
        """The times of experts of so many bytes; `weight_bits` of a weight say how many products they stand for."""
        flops = 2 * expert_bytes * 8 / weight_bits
        host_s = expert_bytes / self.host_bytes_per_s
        cpu = [self.cpu_expert_start_s + max(host_s, n * flops / self.cpu_flops) for n in TOKENS]
        device = None
        if self.has_device:
            move_s = expert_bytes / self.device_bytes_per_s
            device = Curve(TOKENS, tuple(max(move_s, n * flops / self.device_flops) for n in TOKENS))
        return Costs(
            Curve(TOKENS, tuple(cpu)),
            device,
            move_s=expert_bytes / self.link_bytes_per_s if self.has_device else 0.0,
            read_s=expert_bytes / self.disk_bytes_per_s if self.disk_bytes_per_s else 0.0,
            cpu_start_s=self.cpu_start_s if self.has_device else 0.0,
            merge_s=self.merge_s if self.has_device else 0.0,
        )

    def layer_s(self, dense_bytes: float, tokens: int = 1, weight_bits: float = 16) -> float:
        """What a layer takes besides its experts, with `dense_bytes` of other weights (and of what attention reads)."""
        rate, flops = (
            (self.device_bytes_per_s, self.device_flops) if self.has_device else (self.host_bytes_per_s, self.cpu_flops)
        )
        return self.layer_start_s + max(dense_bytes / rate, tokens * 2 * dense_bytes * 8 / weight_bits / flops)

    def forward_s(
        self, dense_bytes: float, layers: int, tokens: int = 1, weight_bits: float = 16
    ) -> tuple[float, float]:
        """What a forward of so many layers takes besides experts: (overhead of its layers, work on other weights)."""
        work_s = self.layer_s(dense_bytes, tokens, weight_bits) - self.layer_start_s
        return layers * self.layer_start_s, work_s


def machine_names() -> list[str]:
    """The machines that come with moert, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_machine(text: str) -> Machine:
    """The machine of that name, or of the description in a file.

    Raises:
        ConfigError: there is no such machine or file, or it is not a description.
    """
    path = FOLDER / f"{text}.json" if text in machine_names() else Path(text).expanduser()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"no machine named {text!r}; there are {', '.join(machine_names())}, and files such as these are "
            f"({path}: {error.strerror})"
        ) from None
    except ValueError as error:
        raise ConfigError(f"machine {text!r}: {path} is not JSON: {error}") from None
    return read_machine(document, path.stem)


def read_machine(document: Any, name: str) -> Machine:
    """A machine from its description: `{"values": {NAME: {"value": NUMBER, "source" or "assumed": TEXT}}}`.

    Raises:
        ConfigError: it lacks something, has something unknown, or a number without where it is from.
    """
    values = document.get("values") if isinstance(document, dict) else None
    if not isinstance(values, dict):
        raise ConfigError(f'machine {name!r}: a description is {{"values": {{NAME: {{"value": NUMBER, ...}}}}}}')
    known = {field.name for field in fields(Machine)} - {"name", "notes"}
    numbers: dict[str, Any] = {}
    notes = {}
    for key, entry in values.items():
        if key not in known:
            raise ConfigError(f"machine {name!r}: {key!r} is unknown; known are {', '.join(sorted(known))}")
        origin = [word for word in ("source", "assumed", "measured") if isinstance(entry, dict) and entry.get(word)]
        if not isinstance(entry, dict) or "value" not in entry or len(origin) != 1:
            raise ConfigError(
                f'machine {name!r}: {key} must be {{"value": NUMBER}} with one of "source", "assumed" or "measured"'
            )
        numbers[key] = entry["value"]
        notes[key] = f"{origin[0]}: {entry[origin[0]]}"
    missing = [key for key in ("host_memory_bytes", "host_bytes_per_s", "cpu_flops") if key not in numbers]
    if missing:
        raise ConfigError(f"machine {name!r} lacks {', '.join(missing)}")
    return Machine(name, **numbers, notes=notes)
