"""What the steps over a device have done so far."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DeviceCounts:
    """What the steps have done so far, in experts."""

    on_device: int = 0
    fetched: int = 0
    on_cpu: int = 0
    halved: int = 0
    """How often a step was cut in two because the device had no memory for it."""
    without: int = 0
    """Steps that the CPU computed alone because the device had none even for one token."""
    ways: dict[str, int] = field(default_factory=dict)
    """Steps that went by each scheduler, or were planned on the device."""
