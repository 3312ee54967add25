"""The layers that the CPU expert benchmark runs: shapes, weights, routing, quantisation, the right answer in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moert.tiers.arena import HostArena

GROUP = 32
FORMATS = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Shape:
    """One MoE layer: hidden size, width of an expert, experts, and experts a token picks."""

    hidden: int
    width: int
    experts: int
    picks: int

    @property
    def expert_numbers(self) -> int:
        return 3 * self.hidden * self.width


SHAPES = {
    "olmoe": Shape(2048, 1024, 64, 8),
    "qwen3": Shape(2048, 768, 128, 8),
    "mixtral": Shape(4096, 14336, 8, 2),
    "mixtral-4": Shape(4096, 14336, 4, 2),
    "tiny": Shape(256, 128, 8, 2),
}


@dataclass(frozen=True)
class Step:
    """What a layer is asked: tokens `x` [T, hidden] bf16, the experts each picks, and their router weights in fp32."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @property
    def touched(self) -> int:
        """How many experts are read."""
        return int(self.ids.unique().numel())


@dataclass(frozen=True)
class Layer:
    """Experts as transformers holds them: `up` [E, 2F, D] (gate rows, then up rows) and `down` [E, D, F], in bf16."""

    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Quantised:
    """Codes and fp16 scales of groups of 32; int4 codes lie two a byte, the first in the low nibble."""

    codes: torch.Tensor
    scales: torch.Tensor


class Pages:
    """Memory of 2 MiB pages, given out piece by piece as tensors. It must outlive them."""

    def __init__(self, nbytes: int) -> None:
        self.arena = HostArena(nbytes)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        numbers = 1
        for length in shape:
            numbers *= length
        nbytes = numbers * dtype.itemsize
        view = self.arena.view(self._used, nbytes)
        self._used += -(-nbytes // 4096) * 4096
        return torch.frombuffer(view, dtype=dtype).view(shape)

    def take_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.take(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def page_bytes(*nbytes: int) -> int:
    """What `Pages` needs for pieces of these sizes."""
    return sum(-(-size // 4096) * 4096 for size in nbytes)


def make_layers(shape: Shape, copies: int, seed: int = 0) -> tuple[Pages, list[Layer]]:
    """Random weights, `copies` times in memory: the same numbers at other addresses, as further layers would be."""
    draw = torch.Generator().manual_seed(seed)
    up_shape = (shape.experts, 2 * shape.width, shape.hidden)
    down_shape = (shape.experts, shape.hidden, shape.width)
    sizes = [2 * shape.experts * shape.width * shape.hidden * parts for parts in (2, 1)]
    pages = Pages(page_bytes(*sizes) * copies)
    first = Layer(pages.take(up_shape, torch.bfloat16), pages.take(down_shape, torch.bfloat16))
    for stack, fan_in in ((first.up, shape.hidden), (first.down, shape.width)):
        for expert in stack:
            expert.copy_(torch.randn(expert.shape, generator=draw).mul_(fan_in**-0.5))
    return pages, [first] + [Layer(pages.take_copy(first.up), pages.take_copy(first.down)) for _ in range(copies - 1)]


def make_steps(shape: Shape, batch: int, seed: int = 0) -> list[Step]:
    """One token: steps that pick disjoint experts, until all are read. More: one step, uniform picks."""
    draw = torch.Generator().manual_seed(seed + batch)

    def step(ids: torch.Tensor) -> Step:
        x = torch.randn(batch, shape.hidden, generator=draw).bfloat16()
        return Step(x, ids, torch.rand(ids.shape, generator=draw).softmax(-1))

    if batch == 1:
        order = torch.randperm(shape.experts, generator=draw)
        return [step(ids[None]) for ids in order.split(shape.picks) if len(ids) == shape.picks]
    return [step(torch.rand(batch, shape.experts, generator=draw).topk(shape.picks).indices)]


def quantise(weight: torch.Tensor, form: str) -> Quantised:
    """Symmetric in groups of 32 along the last dimension; int4 lets the largest number of a group be exactly -8."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    if form == "int8":
        scales = (groups.abs().amax(-1) / 127).half()
        codes = (groups / scales.float()[..., None].clamp_min(1e-12)).round_().clamp_(-127, 127).to(torch.int8)
        return Quantised(codes.flatten(-2), scales)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = (largest / -8).half()
    safe = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    codes = (groups / safe[..., None]).round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(-2)
    return Quantised(codes[..., ::2] | codes[..., 1::2] << 4, scales)


def dequantise(weight: Quantised, form: str) -> torch.Tensor:
    """The numbers that codes and scales stand for, in fp64."""
    codes = weight.codes
    if form == "int4":
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - 8
    return (codes.double().unflatten(-1, (-1, GROUP)) * weight.scales.double()[..., None]).flatten(-2)


def rounded(x: torch.Tensor, form: str) -> torch.Tensor:
    """An activation as a kernel for `form` is to see it: bf16, and for integer weights int8 in groups of 32."""
    x = x.bfloat16().float()
    if form == "bf16":
        return x.double()
    groups = x.unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    # Not 127 / largest, which torch computes as a reciprocal times 127: another rounding.
    inverse = torch.full_like(largest, 127).div_(largest)
    codes = (groups * torch.where(largest > 0, inverse, 0.0)).round()
    return (codes.double() * (largest / 127).double()).flatten(-2)


def reference(
    step: Step,
    up: Callable[[int], torch.Tensor],
    down: Callable[[int], torch.Tensor],
    see: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double,
    decodes: Callable[[int], bool] = lambda tokens: False,
) -> torch.Tensor:
    """The layer's output in fp64.

    Args:
        up, down: an expert's weights in fp64.
        see: rounds activations.
        decodes: whether an expert of that many tokens is computed from weights and activations rounded to bf16 instead.
    """
    result = torch.zeros(step.x.shape, dtype=torch.float64)
    for expert in step.ids.unique().tolist():
        tokens, places = torch.where(step.ids == expert)
        is_decoded = decodes(len(tokens))
        look = _as_bf16 if is_decoded else see
        first, second = (_as_bf16(weight(expert)) if is_decoded else weight(expert) for weight in (up, down))
        gate, value = (look(step.x[tokens]) @ first.T).chunk(2, dim=-1)
        hidden = look(torch.nn.functional.silu(gate) * value).double()
        result.index_add_(0, tokens, hidden @ second.T * step.weights[tokens, places, None].double())
    return result


def _as_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.float().bfloat16().double()


def worst_error(output: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative RMS error of the worst token."""
    return float(((output.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def rms_error(output: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative RMS error over all tokens."""
    return float((output.double() - wanted).norm() / wanted.norm())
