"""What a runtime is asked about passes that a device runs by itself, and told of them."""

from __future__ import annotations

from collections.abc import Callable

from moert.device.base import CaptureError, Graph
from moert.runtime.pace import Pace
from moert.runtime.sizing import HostSizing
from moert.runtime.sizing_calls import SizingCalls
from moert.runtime.uses import whole


class PlannedCalls(SizingCalls):
    """The part of a runtime that looks at no layer: whole passes of one token, with or without a graph."""

    _sizing: HostSizing | None
    _pace: Pace

    @property
    def is_planning(self) -> bool:
        """Whether a device runs passes of one token by itself now; asked at any time, without waiting for another
        use."""
        return self.device is not None and self.device.is_planning

    @property
    def may_miss(self) -> bool:
        """Whether the passes that a device runs by itself now may turn out to be void."""
        return self.device is not None and self.device.may_miss

    @whole
    def begin_planned(self, can_repeat: Callable[[], bool]) -> bool:
        """A pass of one token begins, which is the device's if this returns True, by a graph or not. The caller asks
        `is_void` when it is over, and does it again then; only if he `can_repeat` it may that be.

        Raises:
            MoertError: the runtime has been closed.
        """
        if self._sizing is not None:
            self._sizing.relieve()
        assert self.device is not None
        self._pace.begin(1)
        return self.device.begin_planned(can_repeat)

    @whole
    def is_void(self) -> bool:
        """Whether the pass that is over needed an expert that was on disk: it does not count, and the host decides
        about it when it is done again. Blocks until it is over, if it could be.

        Raises:
            MoertError: the runtime has been closed.
        """
        is_void = self.device is not None and self.device.is_void()
        self._pace.repeat(is_void)
        return is_void

    def capture(self, work: Callable[[], object]) -> Graph:
        """Make a graph of a pass that the device runs by itself; see `Device.capture`. Steps within it count nothing.

        Raises:
            MoertError: the runtime has been closed.
            CaptureError, OutOfDeviceMemoryError: there is none.
        """
        with self.alone():
            if not self.is_planning:
                raise CaptureError("the device does not run passes by itself any more")
            assert self.device is not None
            return self.device.capture(work)

    @whole
    def replay(self, graph: Graph) -> bool:
        """Do a pass that `begin_planned` was told of by a graph of `capture`. Returns at once.

        Returns:
            False, and nothing has happened, if the device has ceased to run passes by itself since: experts may be
            elsewhere in host memory than the graph would look for them.

        Raises:
            MoertError: the runtime has been closed.
        """
        if not self.is_planning:
            return False
        graph.replay()
        return True
