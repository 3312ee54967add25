"""What a runtime is asked about how much of a device's memory its experts have, and told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moert.runtime.uses import UsedAlone, whole

if TYPE_CHECKING:
    from moert.runtime.device_group import DeviceGroup
    from moert.runtime.device_sizing import CacheBytes, Given, Regained
    from moert.runtime.device_tier import DeviceTier


class SizingCalls(UsedAlone):
    """The part of a runtime that gives experts less of a device, and more again."""

    def __init__(self) -> None:
        super().__init__()
        self.device: DeviceTier | DeviceGroup | None = None
        """The tier above host memory; `attach` sets it."""

    @whole
    def give_back(self, nbytes: int, share: float, cache_bytes: CacheBytes) -> Given | None:
        """Have fewer experts on a device, whose memory is short; see `DeviceSizing.give_back`. None: there is no
        device.

        Raises:
            MoertError: the runtime has been closed.
            OutOfDeviceMemoryError, DeviceLostError: see there.
        """
        return None if self.device is None else self.device.sizing.give_back(nbytes, share, cache_bytes)

    @property
    def is_short(self) -> bool:
        """Whether experts have less of a device than at first; asked at any time, without waiting for another use."""
        return self.device is not None and self.device.sizing.is_short

    @whole
    def can_grow(self, cache_bytes: CacheBytes) -> bool:
        """Whether `grow` is worth its while; asked before each pass where `is_short`. See `DeviceSizing.can_grow`.

        Raises:
            MoertError: the runtime has been closed.
            DeviceLostError: see there.
        """
        return self.device is not None and self.device.sizing.can_grow(cache_bytes)

    @whole
    def grow(self, cache_bytes: CacheBytes) -> list[Regained]:
        """Have experts get back what there is room for; between passes, when all that `capture` gave is gone. See
        `DeviceSizing.grow`.

        Raises:
            MoertError: the runtime has been closed.
            DeviceLostError: see there.
        """
        return [] if self.device is None else self.device.sizing.grow(cache_bytes)
