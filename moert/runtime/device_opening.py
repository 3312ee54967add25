"""The devices that experts come to where nobody hands one over: the GPUs of this machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.config import OffloadConfig
from moert.device.base import Device
from moert.errors import ConfigError


def check_machine(config: OffloadConfig) -> None:
    """Refuse `device_memory` before anything is loaded where there is no GPU to be used.

    Raises:
        ConfigError: torch finds none, with its reason.
    """
    if torch.cuda.is_available():
        return
    why = "torch finds none"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].strip() or why
    raise ConfigError(
        f"device_memory={config.device_memory!r} needs a CUDA device, and there is none here ({why}); install or "
        "update the NVIDIA driver, or leave device_memory out to run the experts on the CPU"
    )


def open_devices(wanted: Sequence[torch.device]) -> list[Device]:
    """The GPUs `wanted`, in that order; the current one if that is none. Whoever asks owns them.

    Raises:
        ConfigError: there is no such GPU, or no driver.
        KernelUnavailableError: a GPU is too old for the kernels.
    """
    from moert.device.cuda import CudaDevice

    indices = [torch.cuda.current_device() if device.index is None else device.index for device in wanted]
    return [CudaDevice(index) for index in indices or [torch.cuda.current_device()]]
