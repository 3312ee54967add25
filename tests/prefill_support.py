"""Prompts through a device tier in virtual time, where kernels take as long as their picks say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from device_support import NumberTier

from moert.device.simulated import Machine, SimulatedDevice
from moert.runtime.device_kernels import Inputs, LayerKernels, OpenStep, Work
from moert.schedule import Costs, Curve
from moert.types import ExpertId

ON_DEVICE = Costs(Curve.constant(10.0), Curve.constant(1e-3), move_s=1e-3)


class Timed(LayerKernels):
    """Another layer's kernels, whose launches take `pick_s` for each pick, and `launch_s` each."""

    def __init__(self, kernels: LayerKernels, device: SimulatedDevice, pick_s: float, launch_s: float) -> None:
        self.name, self.kernels, self.device = kernels.name, kernels, device
        self.pick_s, self.launch_s = pick_s, launch_s
        self.is_whole = False
        """A step is one launch if its experts can be there at once, as few tokens are on a GPU."""
        self.seconds = 0.0
        """Of all launches so far."""
        self.launches: list[list[int]] = []
        """The experts of each launch so far."""

    def open(self, inputs: Inputs, *, whole: bool) -> OpenStep:
        opened = self.kernels.open(inputs, whole=whole)
        return _TimedStep(self, inputs, opened, can_split=not (whole and self.is_whole))

    def bank_goes(self) -> None:
        self.kernels.bank_goes()

    def bank_comes(self) -> None:
        self.kernels.bank_comes()

    def next_launch(self, picks: int) -> None:
        """The one after this call has so many picks."""
        seconds = self.launch_s + picks * self.pick_s
        self.device.change(launch_s=seconds)
        self.seconds += seconds


class _TimedStep(OpenStep):
    def __init__(self, kernels: Timed, inputs: Inputs, opened: OpenStep, *, can_split: bool) -> None:
        self.can_split, self._kernels, self._inputs, self._opened = can_split, kernels, inputs, opened

    def compute(self, rows: Mapping[int, int]) -> Work:
        groups = [self._inputs.groups[turn] for turn in rows]
        self._kernels.launches.append([group.expert for group in groups])
        self._kernels.next_launch(sum(len(group.weights) for group in groups))
        return self._opened.compute(rows)

    def take_in(self, turns: Sequence[int], outputs: torch.Tensor) -> Work:
        self._kernels.next_launch(0)
        return self._opened.take_in(turns, outputs)

    def finish(self) -> Callable[[], torch.Tensor]:
        self._kernels.next_launch(0)
        return self._opened.finish()


@dataclass(frozen=True)
class Passed:
    """What a prompt took."""

    wall_s: float
    copy_s: float
    """Of all copies of experts."""
    compute_s: float
    """Of all launches, and of the dense layers between them."""
    copies: int
    least: int
    """Experts that were needed and not resident when the pass began."""

    @property
    def ratio(self) -> float:
        """To what it takes if copies and launches are beside each other all the time."""
        return self.wall_s / max(self.copy_s, self.compute_s)


class Prompts(NumberTier):
    """A tier all of whose experts are in host memory."""

    def __init__(
        self,
        *,
        layers: int = 6,
        num_experts: int = 32,
        top_k: int = 4,
        device_slots: int = 8,
        spare_rows: int = 7,
        move_s: float = 1e-3,
        pick_s: float = 1e-4,
        launch_s: float = 0.0,
        dense_s: float = 0.0,
        host_slots: int | None = None,
        **options: object,
    ) -> None:
        settings = {"schedule": "fetch_all", "costs": ON_DEVICE, "promoting": False, "poison": False, **options}
        super().__init__(
            layers=layers,
            num_experts=num_experts,
            host_slots=host_slots or num_experts,
            device_slots=device_slots,
            spare_rows=spare_rows,
            machine=Machine(latency_s=move_s),
            **settings,  # type: ignore[arg-type]
        )
        self.layers, self.num_experts, self.top_k = layers, num_experts, top_k
        self.move_s, self.dense_s = move_s, dense_s
        self.kernels = [Timed(kernels, self.device, pick_s, launch_s) for kernels in self.tier.hosted._kernels]
        self.tier.hosted._kernels = tuple(self.kernels)
        self.fill()

    def fill(self) -> None:
        """Bring every expert into host memory, and make residents of the first ones that a prompt does not displace."""
        for layer in range(self.layers):
            for expert in range(self.num_experts):
                self.step(layer, [[expert]])
            for _ in range(20):
                self.step(layer, [list(range(self.caches[layer].residency.capacity))])
        self.settle()

    def prompt(self, tokens: int, skew: float = 0.0) -> list[list[list[int]]]:
        """For each layer and token its experts, each as likely as any other, or the less even the larger `skew` is."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.num_experts,)
        return [
            (torch.rand((tokens, *shape), generator=generator) + skew * torch.rand(shape, generator=generator))
            .topk(self.top_k)
            .indices.tolist()
            for _ in range(self.layers)
        ]

    def run(self, prompt: Sequence[Sequence[Sequence[int]]]) -> Passed:
        """One pass, checked."""
        self.settle()
        counts = self.tier.transfers.counts
        begin, copies = self.device.now(), sum(counts.copies.values())
        computed = sum(kernels.seconds for kernels in self.kernels)
        least = 0
        for layer, event in enumerate(prompt):
            needed = {ExpertId(layer, expert) for token in event for expert in token}
            least += len(needed - set(self.caches[layer].residency.residents))
            self.device.change(launch_s=self.dense_s)
            self.device.compute.launch(lambda: None)
            assert self.step(layer, event) == self.right(layer, event)
        end = self.device.now()
        copies = sum(counts.copies.values()) - copies
        compute_s = sum(kernels.seconds for kernels in self.kernels) - computed + self.dense_s * len(prompt)
        self.settle()
        self.check()
        return Passed(end - begin, copies * self.move_s, compute_s, copies, least)
