"""A model on a simulated device whose own layers run out of memory there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_device_group import machines
from test_device_model import generate, make

import moert
from moert.config import OffloadConfig
from moert.device.simulated import Machine, SimulatedDevice
from moert.hf import patching
from moert.hf.model import runtime_of
from moert.runtime.device_tier import DeviceTier
from moert.schedule import Costs, Curve

FULL = "CUDA out of memory. Tried to allocate 20.00 KiB. GPU 0 has a total capacity of 1.00 GiB of which\nmore of it"
COSTS = Costs(Curve.proportional(2e-4), Curve.constant(1e-5), move_s=3e-4, read_s=1e-3)


class Short:
    """What a part of a model needs of a device, each time: torch's error if that is not free."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        device: SimulatedDevice,
        part: Any,
        nbytes: int = 0,
        error: Exception | None = None,
    ) -> None:
        self.nbytes, self.device, self.failed = nbytes, device, 0
        own = part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            if self.nbytes > self.device.memory.free_bytes:
                self.failed += 1
                raise error or torch.OutOfMemoryError(FULL)
            return output

        monkeypatch.setattr(part, "forward", forward)


@pytest.fixture(scope="module")
def wanted() -> tuple[torch.Tensor, torch.Tensor]:
    model = moert.patch(make())
    found = generate(model)
    moert.close(model)
    return found


@pytest.fixture
def tiered() -> Iterator[Callable[..., tuple[Any, DeviceTier, SimulatedDevice]]]:
    models = []

    def build(n: int = 1, **options: Any) -> tuple[Any, Any, Any]:
        machine = Machine(latency_s=1e-5)
        devices = machines(n, *(machine,) * n) if n > 1 else [SimulatedDevice(machine, virtual=True)]
        config = OffloadConfig(debug=True, device_memory="50%", host_memory=options.pop("host_memory", "75%"))
        settings = {"headroom_bytes": 0, "costs": COSTS, **options}
        if n > 1:
            settings["device_map"] = {"": 0, "model.layers.2": 1}
        model = make()
        patching.patch(model, config, device=devices if n > 1 else devices[0], **settings)
        models.append(model)
        return model, runtime_of(model).device, devices if n > 1 else devices[0]

    yield build
    for model in models:
        if "_moert_leave" in vars(model):
            moert.close(model)


def nothing(device: torch.device) -> int:
    """What is held besides."""
    return 0


def leave(device: SimulatedDevice, nbytes: int) -> None:
    """Somebody else takes all but so much of what is free."""
    device.others_bytes += device.memory.free_bytes - nbytes
