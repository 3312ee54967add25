"""A calibration made more than once, because disks and neighbours change by the minute."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from moert.calibration.result import Calibration
from moert.calibration.sampling import SPREAD, Measured

ALIKE = 0.1
"""What two times differ by at most that are the same, for all that anybody knows."""

WATCHED = ("read_step", "read_prompt", "token")
"""What most of a forecast hangs on; if one of them has changed, everything is measured a third time."""

MOST = 3
"""Times that it is measured."""


def repeated(once: Callable[[int], Calibration]) -> Calibration:
    """Measure all of it twice, one time after the other, and once more if they disagree; blocks as often.

    Each time is measured whole, so what belongs together is of one moment. Of each number the one in the middle counts,
    of two their mean; its interval holds those of all, and where they differ by more than a fifth it is unsteady.

    Args:
        once: is told how often it has been called before.
    """
    found = [once(0), once(1)]
    if any(not _alike(getattr(found[0], name), getattr(found[1], name)) for name in WATCHED):
        found.append(once(2))
    return joined(found)


def joined(found: Sequence[Calibration]) -> Calibration:
    """Several calibrations of one machine and shape as one; see `repeated`."""
    names = [field.name for field in fields(Calibration)]
    parts: dict[str, Any] = {}
    for name in names:
        values = [getattr(one, name) for one in found]
        if isinstance(values[0], Measured):
            parts[name] = _joined(values)
        elif isinstance(values[0], Mapping):
            # The longest ones are not tried where the machine is slow.
            known = sorted({n for value in values for n in value})
            parts[name] = {n: _joined([value[n] for value in values if n in value]) for n in known}
    rates = [one.disk_bytes_per_s for one in found]
    return replace(found[-1], **parts, disk_bytes_per_s=statistics.median(rates))


def _joined(values: Sequence[Measured]) -> Measured:
    seconds = [one.seconds for one in values]
    middle = statistics.median(seconds)
    return Measured(
        middle,
        min(one.low for one in values),
        max(one.high for one in values),
        sum(one.repeats for one in values),
        all(one.is_steady for one in values) and max(seconds) - min(seconds) <= SPREAD * middle,
    )


def _alike(one: Measured, other: Measured) -> bool:
    less, more = sorted((one.seconds, other.seconds))
    return more <= (1 + ALIKE) * less
