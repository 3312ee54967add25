"""The options of moert: one flat, frozen dataclass, and the parsing of byte sizes."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from moert.errors import ConfigError

AUTO = "auto"
"""As a `device_memory`: what is left on the device beside everything else."""

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?|\.\d+)\s*(?P<unit>[a-zA-Z]*|%)\s*")


@dataclass(frozen=True)
class Budget:
    """A parsed byte budget: a number of bytes, or a share of all expert bytes (exactly one of the two is set)."""

    nbytes: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        return f"{self.share:.4g} of the expert bytes" if self.nbytes is None else format_bytes(self.nbytes)


def format_bytes(nbytes: float) -> str:
    """`nbytes` for people, in binary units: `3.1 GiB`."""
    size, unit = _scaled(nbytes)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def format_at_least(nbytes: int) -> str:
    """The same for a size that is to be given as a budget: rounded up, so that what it is needed for fits."""
    size, unit = _scaled(nbytes)
    return f"{nbytes} B" if unit == "B" else f"{math.ceil(10 * size) / 10:.1f} {unit}"


def format_at_most(nbytes: int) -> str:
    """The same for the largest budget that fits: rounded down."""
    size, unit = _scaled(nbytes)
    return f"{nbytes} B" if unit == "B" else f"{math.floor(10 * size) / 10:.1f} {unit}"


def _scaled(nbytes: float) -> tuple[float, str]:
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return size, unit
        size /= 1024
    return size, "TiB"


def parse_budget(value: int | float | str, option: str) -> Budget:
    """Read a budget such as `"4GiB"`, `"512 MB"`, `"25%"` or a number of bytes.

    Decimal units (KB, MB, GB, TB) are powers of 1000, binary ones (KiB, MiB, GiB, TiB) powers of 1024.

    Raises:
        ConfigError: the text is not a size, or the size is not positive and finite; `option` is named.
    """
    hint = 'give bytes, a size such as "4GiB" or "512MB", or a share of the expert bytes such as "25%"'
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"{option}={value!r} is not a size; {hint}")
    if isinstance(value, (int, float)):
        if not math.isfinite(value) or value < 1:
            raise ConfigError(f"{option}={value!r} must be a positive number of bytes; {hint}")
        return Budget(nbytes=int(value))
    match = _SIZE.fullmatch(value)
    unit = match["unit"].lower() if match else ""
    if match is None or (unit != "%" and unit not in _UNITS):
        raise ConfigError(f"{option}={value!r} is not a size; {hint}")
    number = float(match["number"])
    if unit == "%":
        if not 0 < number <= 100:
            raise ConfigError(f"{option}={value!r} must be above 0% and at most 100%")
        return Budget(share=number / 100)
    nbytes = number * _UNITS[unit]
    if not math.isfinite(nbytes) or nbytes < 1:
        raise ConfigError(f"{option}={value!r} is less than one byte; {hint}")
    return Budget(nbytes=int(nbytes))


@dataclass(frozen=True)
class OffloadConfig:
    """How a model's experts are kept and moved. Defaults work; `None` means measured.

    It can be handed to `moert.load` and `moert.patch` field by field, or to HuggingFace as it is:
    `AutoModelForCausalLM.from_pretrained(path, quantization_config=moert.OffloadConfig(host_memory="4GiB"))`.

    Raises:
        ConfigError: on construction, for any value that cannot be honoured.
    """

    host_memory: int | float | str | None = None
    """Bytes of host memory for experts: "4GiB", bytes, or "25%" of the expert bytes. None: what this machine and its
    cgroups have free after the dense weights, less head-room and the KV cache of a text of `context` tokens, as
    `moert plan` divides it."""
    context: int | None = None
    """Tokens of text for whose KV cache room is left: by host_memory=None, or, with device_memory, on the GPU. None:
    4096, or what the model takes if that is less."""
    shrink_on_pressure: bool = True
    """Give host memory back between steps, down to what one token needs, when the machine or a cgroup runs short of it,
    even where host_memory asks for more. It stays given back until `moert.resize`."""
    device_memory: int | float | str | None = None
    """Bytes of GPU memory for experts, of each GPU: "8GiB", bytes, "25%" of the expert bytes, or "auto": what is left
    there beside everything else. New, and not run on a GPU by its authors. None: the CPU computes the experts."""
    policy: str = "ema"
    """Which resident expert leaves: the name of a file in `moert/policies`, or "package.module:Class". Parameters
    follow: "ema,alpha=0.05"."""
    predictor: str = "gate_ahead_corrected"
    """What guesses at the experts that the next layers will need, so that they are read before anybody waits: the name
    of a file in `predictors`, "package.module:Class", or "none". Parameters follow: "joint,speed=0.05"."""
    prefetch: bool = True
    """Read what is predicted before anybody waits for it, where that gains time. False: predictions only tell policies
    that look ahead who should leave."""
    io_depth: int | None = None
    """Reads in flight at once, of each disk. None: starts with 4 and goes where the disk gains, measured in use."""
    direct_io: bool = True
    """Read past the page cache (O_DIRECT) where the file system can; a file system that cannot is read through it."""
    preload: bool | None = None
    """Read experts at load until the host tier is full. None: only when all experts fit."""
    dense_kernels: bool | None = None
    """Compute the model's dense linear layers, norms, routers and rotary embeddings with moert's CPU kernels too, where
    they are bf16 or fp16. None: only if the whole model is on the CPU."""
    cache_dir: str | None = None
    """Where `patch` keeps experts that do not fit in host memory (as an unlinked file). None: the temporary folder."""
    debug: bool = False
    """Check every invariant after every step and fill freed slots with NaN. Slow."""

    quant_method: ClassVar[str] = "moert"

    def __post_init__(self) -> None:
        for option in ("host_memory", "device_memory"):
            value = getattr(self, option)
            if value is not None and (option, value) != ("device_memory", AUTO):
                parse_budget(value, option)
        if not isinstance(self.policy, str) or not self.policy:
            raise ConfigError(f'policy={self.policy!r} must be the name of a policy or "package.module:Class"')
        if not isinstance(self.predictor, str) or not self.predictor:
            raise ConfigError(
                f'predictor={self.predictor!r} must be the name of a predictor, "package.module:Class", or "none"'
            )
        if self.io_depth is not None and (
            isinstance(self.io_depth, bool) or not isinstance(self.io_depth, int) or not 1 <= self.io_depth <= 64
        ):
            raise ConfigError(f"io_depth={self.io_depth!r} must be None or a whole number from 1 to 64")
        if self.context is not None and (
            isinstance(self.context, bool) or not isinstance(self.context, int) or self.context < 1
        ):
            raise ConfigError(f"context={self.context!r} must be None or a whole number of tokens, at least 1")
        for option in ("shrink_on_pressure", "prefetch", "direct_io", "debug"):
            if not isinstance(getattr(self, option), bool):
                raise ConfigError(f"{option}={getattr(self, option)!r} must be True or False")
        for option in ("preload", "dense_kernels"):
            if not isinstance(getattr(self, option), (bool, type(None))):
                raise ConfigError(f"{option}={getattr(self, option)!r} must be True, False or None")
        if self.cache_dir is not None and not isinstance(self.cache_dir, (str, Path)):
            raise ConfigError(f"cache_dir={self.cache_dir!r} must be a folder's path")

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options, in order."""
        return tuple(field.name for field in fields(cls))

    @property
    def host_budget(self) -> Budget | None:
        """`host_memory`, parsed."""
        return None if self.host_memory is None else parse_budget(self.host_memory, "host_memory")

    @property
    def device_budget(self) -> Budget | None:
        """`device_memory`, parsed; None: as much as is left."""
        return None if self.device_memory in (None, AUTO) else parse_budget(self.device_memory, "device_memory")

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as HuggingFace configurations want them."""
        return {"quant_method": self.quant_method, **asdict(self)}

    def get_loading_attributes(self) -> dict[str, Any]:
        """The options that HuggingFace may carry over to a checkpoint with a configuration of its own: all."""
        return asdict(self)
