"""Host memory that a device copies from: as much of it page-locked as the system gives, the rest through buffers."""

from __future__ import annotations

import pytest
from device_support import COSTS, NumberTier

from moert.device.simulated import Machine, SimulatedDevice
from moert.runtime.device_pinning import BUFFERS, LEAST_BYTES, PinnedHost
from moert.schedule import Costs, Curve

MIB = 1 << 20
BEGIN = 1 << 30
ALL_ON_DEVICE = Costs(Curve.constant(10.0), Curve.constant(1e-3), move_s=1e-3)


@pytest.mark.parametrize("limit", [0, 8, 48, 99, 100])
def test_as_much_is_locked_as_the_system_gives(limit: int) -> None:
    """Tried in halves, so that less is lost than what is too little to try again."""
    device = SimulatedDevice(Machine(lockable_bytes=limit * MIB), virtual=True)
    pinned = PinnedHost(device)
    if limit < 100:
        with pytest.warns(RuntimeWarning, match=r"of 100\.0 MiB of experts in host memory can be page-locked here"):
            pinned.lock([(BEGIN, 100 * MIB)])
    else:
        pinned.lock([(BEGIN, 100 * MIB)])
    assert limit * MIB - LEAST_BYTES < pinned.locked_bytes <= limit * MIB
    assert device.locked_bytes == pinned.locked_bytes
    pinned.unlock()
    assert device.locked_bytes == 0


@pytest.mark.filterwarnings("ignore:only .* can be page-locked:RuntimeWarning")
def test_no_buffer_is_filled_again_while_it_is_copied() -> None:
    """Pageable ones, as the system gives nothing, in a copy that takes its time all the same."""
    tier = NumberTier(
        layers=1,
        num_experts=8,
        host_slots=8,
        spare_rows=8,
        schedule="fetch_all",
        costs=ALL_ON_DEVICE,
        machine=Machine(lockable_bytes=0, latency_s=1e-2),
        promoting=False,
    )
    event = [[expert, expert + 1] for expert in range(0, 8, 2)]
    assert tier.step(0, event) == tier.right(0, event)
    transfers = tier.tier.transfers
    for expert in [*tier.caches[0].residency.residents]:
        tier.caches[0].drop([expert])
    most = 0
    own = transfers._start_part

    def spy(coming: object) -> None:
        nonlocal most
        own(coming)  # type: ignore[arg-type]
        most = max(most, sum(not copy.event.ready for copy in transfers._copies))

    transfers._start_part = spy  # type: ignore[method-assign]
    begin = tier.device.now()
    assert tier.step(0, event) == tier.right(0, event)
    assert most == BUFFERS
    assert tier.device.now() - begin >= 0.99 * 8e-2
    tier.check()


def test_rows_that_are_given_back_are_nan_where_somebody_looks_for_stale_reads() -> None:
    for poison in (True, False):
        tier = NumberTier(device_slots=1, schedule="fetch_all", costs=COSTS, promoting=False, poison=poison)
        for expert in range(6):
            tier.step(0, [[expert]])
        tier.settle()
        bank = tier.bank
        left = [row for row in bank._free if bank._fillings[row]]
        assert left
        assert all(bool((bank._table[row] == 0xFF).all()) == poison for row in left)
