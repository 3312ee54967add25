"""The gates that the fused kernels can compute between the up and the down product of an expert."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moert.errors import ConfigError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "identity")


@dataclass(frozen=True)
class Gate:
    """What becomes of the up product; `kernels.reference.gate` is the meaning of the fields.

    Raises:
        ConfigError: on construction, for a value that has no meaning.
    """

    activation: str = "silu"
    """One of `ACTIVATIONS`; "gelu" is the exact one, "gelu_tanh" its approximation."""
    gated: bool = True
    """The up product is twice as wide as the expert: gates, and numbers that they are multiplied with."""
    interleaved: bool = False
    """The two halves alternate, the gates first, instead of standing side by side."""
    alpha: float = 1.0
    """silu(x) is x * sigmoid(alpha * x)."""
    gate_limit: float = math.inf
    """Gates above it are lowered to it before the activation."""
    up_limit: float = math.inf
    """The other half is clamped to plus and minus it."""
    up_offset: float = 0.0
    """Added to the other half once it is clamped."""
    output_limit: float = math.inf
    """Activations above it are lowered to it."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")
        for name in ("alpha", "up_offset"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be finite")
        for name in ("gate_limit", "output_limit"):
            if not getattr(self, name) > -math.inf:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a number; inf sets no limit")
        if not self.up_limit >= 0:
            raise ConfigError(f"up_limit={self.up_limit!r} must not be negative; inf sets no limit")
        if self.alpha != 1 and self.activation != "silu":
            raise ConfigError(f"alpha={self.alpha!r} is silu's, the activation is {self.activation!r}")
        if not self.gated:
            for name in ("interleaved", "gate_limit", "up_limit", "up_offset", "output_limit"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(f"{name}={getattr(self, name)!r} needs a gated expert, and gated=False")
