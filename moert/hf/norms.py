"""Root mean square norms of a model on the CPU, computed by moert's kernel where trying shows what they compute."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moert.hf.own_forward import Note, OwnForward, is_differentiated, is_recorded
from moert.kernels.cpu import HALVES
from moert.kernels.norm import SCALES, Norm, rms_norm

# A rounding that goes the other way may move the next one.
_ROUNDINGS = {"after_rounding": 2}
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


class NormForward(OwnForward):
    """Stands in a norm's own `forward`; what the kernel is not for is computed as the class does it."""

    def __init__(self, module: nn.Module, eps: float, scale: str, note: Note | None = None) -> None:
        super().__init__(module, note)
        self._eps, self._scale = eps, scale
        self._forward = type(module).forward
        self._settings = tuple(settings_of(module).items())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's forward."""
        module = self.module()
        forward = type(module).forward
        if len(args) == 1 and not kwargs and forward is self._forward:
            y = self._compute(module, args[0])
            if y is not None:
                if self._note is not None:
                    self._note(y, forward(module, args[0]), _ROUNDINGS.get(self._scale, 1))
                return y
        return forward(module, *args, **kwargs)

    def _compute(self, module: nn.Module, x: Any) -> torch.Tensor | None:
        if is_recorded() or type(x) is not torch.Tensor or torch.is_autocast_enabled("cpu"):
            return None
        norm = self.norm()
        if norm is None or is_differentiated(x) or is_differentiated(norm.weight):
            return None
        return rms_norm(x, *norm)

    def norm(self) -> Norm | None:
        """What its module computes now; None: that is not known."""
        attributes = self.module().__dict__
        weight = attributes["_parameters"].get("weight")
        if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor:
            return None
        for name, value in self._settings:
            if attributes.get(name) is not value:
                return None
        return Norm(weight, self._eps, self._scale)


def norm_forward(module: nn.Module, note: Note | None = None) -> NormForward | None:
    """A forward for `module`, if on the CPU in 16 bits it is a norm that moert computes.

    The class's own code is called on rows of many magnitudes, infinities and NaN, with random weights. Its eps is
    looked for among the module's numbers; what they are called does not matter. The module is left as it is. Takes
    milliseconds, and none for a module that cannot be one.
    """
    weight = _only_parameter(module)
    if weight is None:
        return None
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = _search(module, len(weight))
    except Exception:  # the class's own code may fail in any way
        return None
    return None if found is None else NormForward(module, *found, note)


def _only_parameter(module: nn.Module) -> torch.Tensor | None:
    """The weight of a module that has nothing else but plain settings; None for others."""
    parameters = dict(module.named_parameters(recurse=False))
    if list(parameters) != ["weight"] or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    weight = parameters["weight"]
    if (
        type(weight) is not nn.Parameter
        or weight.dtype not in HALVES
        or not weight.is_cpu
        or weight.dim() != 1
        or not weight.numel()
        or not all(is_plain(value) for value in settings_of(module).values())
    ):
        return None
    return weight


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What the module holds beside what every module does."""
    return {
        name: value for name, value in vars(module).items() if name[0] != "_" and name not in ("training", "forward")
    }


def is_plain(value: Any) -> bool:
    """Whether a setting says all by its value."""
    return all(map(is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def _search(module: nn.Module, width: int) -> tuple[float, str] | None:
    """Its eps, and where its weight comes in."""
    numbers = [value for value in settings_of(module).values() if isinstance(value, float)]
    weights = [_normal(width).to(dtype) for dtype in HALVES]
    runs = [(weight, x, _call(module, weight, x)) for weight in weights for x in _probe(width, weight.dtype, numbers)]
    for eps in dict.fromkeys(numbers):
        for scale in SCALES:
            if all(_agree(rms_norm(x, weight, eps, scale), own, _ROUNDINGS.get(scale, 1)) for weight, x, own in runs):
                return eps, scale
    return None


def _call(module: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the class's code makes of `x` with another weight.

    Raises:
        ValueError: it leaves something behind, changes its input, or computes differently when training.
    """
    outputs = []
    for training in (False, True):
        stand_in = copy.copy(module)
        stand_in.training = training
        vars(stand_in)["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
        before, mine = dict(vars(stand_in)), x.clone()
        outputs.append(type(module).forward(stand_in, mine))
        after = vars(stand_in)
        if before.keys() != after.keys() or any(after[name] is not value for name, value in before.items()):
            raise ValueError("it leaves something behind")
        if not _same(mine, x):
            raise ValueError("it changes its input")
    if not _same(*outputs):
        raise ValueError("it computes differently when training")
    return outputs[0]


def _probe(width: int, dtype: torch.dtype, numbers: list[float]) -> Iterator[torch.Tensor]:
    yield _normal(1, 1, width).to(dtype)
    yield _normal(2, 3, width).to(dtype)
    # Where the mean square is about eps, another eps shows.
    sizes = [1e-3, 1.0, 30.0, *(math.sqrt(abs(number)) for number in numbers)]
    scales = torch.tensor(sizes, dtype=torch.float32, device="cpu")
    yield (_normal(len(sizes), width) * scales[:, None]).to(dtype)
    special = _normal(4, width)
    special[0] = 0
    special[1, 0] = math.inf
    special[2, -1] = math.nan
    largest = torch.finfo(dtype).max
    special[3] = (special[3] * (largest / 4)).clamp(-largest, largest)
    yield special.to(dtype)


def _normal(*shape: int) -> torch.Tensor:
    # HuggingFace's loader may have set another default dtype and device.
    generator = torch.Generator("cpu").manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _agree(found: torch.Tensor | None, own: torch.Tensor, ulps: int) -> bool:
    if found is None or own.dtype is not found.dtype or own.shape != found.shape:
        return False
    if not torch.equal(found.isnan(), own.isnan()):
        return False
    apart = (_ordered(found) - _ordered(own)).abs()[~own.isnan()]
    return bool((apart <= ulps).all()) and int(apart.count_nonzero()) <= 1 + apart.numel() // 256


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def _ordered(halves: torch.Tensor) -> torch.Tensor:
    """Numbers that count units in the last place, from 0."""
    bits = halves.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
