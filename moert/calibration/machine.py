"""A machine whose numbers for one model are measured, not computed from rates."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from moert.calibration.result import Calibration
from moert.planning.machine import Machine
from moert.schedule import Costs


@dataclass(frozen=True)
class CalibratedMachine(Machine):
    """For experts of the calibrated shape, and the model around them, what was measured; for all else its rates."""

    calibration: Calibration | None = None
    read_factor: float = 1.0
    """How many times as long a read takes now as when it was calibrated."""

    @classmethod
    def of(cls, machine: Machine, calibration: Calibration, read_factor: float = 1.0) -> CalibratedMachine:
        """`machine` with a calibration."""
        own = {field.name: getattr(machine, field.name) for field in fields(Machine)}
        return cls(**own, calibration=calibration, read_factor=read_factor)

    def ends(self) -> tuple[Machine, Machine] | None:
        if self.calibration is None:
            return None
        least, most = (replace(self, calibration=end) for end in self.calibration.ends())
        return least, most

    def costs(self, expert_bytes: float, weight_bits: float = 16) -> Costs:
        found = self.calibration
        if found is None or expert_bytes not in (found.shape.slot_bytes, found.shape.expert_bytes):
            return super().costs(expert_bytes, weight_bits)
        return found.costs(read_factor=self.read_factor)

    def forward_s(
        self, dense_bytes: float, layers: int, tokens: int = 1, weight_bits: float = 16
    ) -> tuple[float, float]:
        found = self.calibration
        if found is None:
            return super().forward_s(dense_bytes, layers, tokens, weight_bits)
        return found.steps_s(tokens), found.dense_s(tokens)
