"""How long torch's threads spin after an operation, on the cores that moert computes with.

A thread of GNU's OpenMP, which torch's wheels bring, spins when it has done its part, so as to be there for the next
operation: 300,000 turns, which take 8 ms. moert's own threads share the core with it meanwhile: 64 tokens through 8
layers take 190 ms on two cores instead of 118, 256 tokens 366 instead of 302. `SPIN_COUNT` turns take a quarter of a
millisecond, by which torch loses nothing; with a tenth of them its own operations take a fifth longer, as its threads
have to be woken more often.

The library reads its settings once, when torch is imported. `import moert` makes them where it comes before that, and
so does the command line; the processes that this one starts inherit them.
"""

from __future__ import annotations

import os
import sys
import time

SPIN_COUNT = 10_000

_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_WATCHED_S = 0.02
_TRIES = 5


def settings() -> dict[str, str]:
    """The variables that say how long torch's threads spin, as far as they are set."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def wanted_settings() -> dict[str, str]:
    """What to set before torch is imported: nothing where the user has decided."""
    return {} if settings() else {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


def limit_spinning() -> None:
    """Set what is wanted, for this process and those it starts, unless torch has been imported already."""
    if "torch" not in sys.modules:
        os.environ.update(wanted_settings())


def spinning_s() -> float:
    """Seconds for which each of torch's other threads spins after an operation, at most 0.02; 0 if it has one thread.

    The median of a few measurements of all CPU time of the process; blocks for 0.1 s.
    """
    import statistics

    import torch

    threads = torch.get_num_threads()
    if threads == 1:
        return 0.0
    numbers = torch.zeros(threads << 15)  # torch gives each thread 32,768 of a fill
    taken = []
    for _ in range(_TRIES):
        numbers.zero_()
        begin = time.process_time()
        time.sleep(_WATCHED_S)
        taken.append(time.process_time() - begin)
    return statistics.median(taken) / (threads - 1)
