"""What a machine takes for a model's parts, measured on it and kept for later.

What is measured, and what follows from it, is plain numbers: `Calibration`, and files of them. Only
`moert.calibration.measuring`, with what it is made of, and `moert.calibration.looking` run anything.
"""

from __future__ import annotations

from moert.calibration.machine import CalibratedMachine
from moert.calibration.result import Calibration, Fingerprint, Shape
from moert.calibration.sampling import Measured, sampled
from moert.calibration.store import default_folder, find, load, make_folder, save

__all__ = [
    "CalibratedMachine",
    "Calibration",
    "Fingerprint",
    "Measured",
    "Shape",
    "default_folder",
    "find",
    "load",
    "make_folder",
    "sampled",
    "save",
]
