"""Schedulers: where the experts of one event run, and which of the missing ones are brought to the device.

One file a scheduler: its name is the file's name, and the file holds one `Scheduler` subclass. Code outside the tree
is named `"package.module:Class"`. A scheduler sees counts and seconds only, so the same object runs live and simulated.
"""

from __future__ import annotations

from moert.plugins import available, load_plugin, read_choice
from moert.schedule._costs import Costs, Curve
from moert.schedule._flow import Timing, makespan
from moert.schedule._guard import Guard
from moert.schedule._promotion import Promotion, Swap
from moert.schedule._residual import Residual
from moert.schedule.base import Item, Place, Schedule, Scheduler

PACKAGE = "moert.schedule"

__all__ = [
    "Costs",
    "Curve",
    "Guard",
    "Item",
    "Place",
    "Promotion",
    "Residual",
    "Schedule",
    "Scheduler",
    "Swap",
    "Timing",
    "make_scheduler",
    "makespan",
    "scheduler_names",
]


def scheduler_names() -> list[str]:
    """The names of the schedulers that come with moert, sorted."""
    return available(PACKAGE)


def make_scheduler(text: str) -> Scheduler:
    """A scheduler by its name, `"exact"`, or with parameters, `"static_split,share=0.5"`.

    Raises:
        ConfigError: there is none of that name, or it has no such parameter or refuses the value.
    """
    name, parameters = read_choice(PACKAGE, text, Scheduler)  # type: ignore[type-abstract]  # only looked up
    return load_plugin(PACKAGE, name, Scheduler)(**parameters)  # type: ignore[type-abstract]
