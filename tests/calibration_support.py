"""Calibrating within a test: the numbers are poor, and come soon."""

from __future__ import annotations

import pytest

from moert.calibration import _disk, _whole_model, _work, looking
from moert.calibration.sampling import sampled
from moert.cli import probes


def measure_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short samples."""
    for module in (_disk, _whole_model, _work):
        monkeypatch.setattr(module, "sampled", lambda sample: sampled(sample, repeats=3, rounds=1))
    monkeypatch.setattr(_work, "SAMPLE_S", 1e-3)
    monkeypatch.setattr(_disk, "TOGETHER_S", 0.01)
    monkeypatch.setattr(looking, "LOOK_S", 0.01)
    monkeypatch.setattr(_whole_model, "MORE_TOKENS", 3)
    monkeypatch.setattr(_work, "TOKENS", (1, 2, 8))
    monkeypatch.setattr(probes, "READ_SECONDS", 0.02)
    monkeypatch.setattr(probes, "SAMPLE_BYTES", 5 << 20)
    monkeypatch.setattr(probes, "ARENA_BYTES", 8 << 20)
