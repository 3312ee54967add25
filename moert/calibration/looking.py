"""A short look at the disk, to see whether it is still as fast as when it was measured."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence

from moert.calibration.result import Calibration
from moert.schedule import Residual
from moert.tiers.disk import measure_read_bandwidth

LOOK_S = 0.2
LOOKS = 3
NOISE = 0.1
"""By so much two looks at a disk differ that has not changed."""


def read_factor(found: Calibration, paths: Sequence[str]) -> float:
    """How many times as long a read of these files takes now as when they were calibrated, by a short look. Blocks.

    Raises:
        TransferError, CorruptFileError: as reading raises them.
    """
    seen = Residual()
    with contextlib.suppress(ValueError):  # none of them is as large as a record
        seen.note(1 / found.disk_bytes_per_s, 1 / look(paths, found.shape.slot_bytes))
    return 1.0 if abs(seen.factor - 1) < NOISE else seen.factor


def look(paths: Sequence[str], record_bytes: int) -> float:
    """Bytes per second of random records of these files, on a short look. Blocks.

    Raises:
        ValueError, TransferError, CorruptFileError: as `measure_read_bandwidth`.
    """
    return statistics.median(measure_read_bandwidth(paths, record_bytes, 4, LOOK_S) for _ in range(LOOKS))
