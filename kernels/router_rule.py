"""How routers pick experts from their logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moert.errors import ConfigError

SCORES = ("softmax", "sigmoid", "logits")
WEIGHTS = ("scores", "softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")


@dataclass(frozen=True)
class RouterRule:
    """How a router picks; `reference_grouped.router_topk` is the meaning of the fields.

    Mixtral, Qwen3-MoE and OLMoE are `RouterRule(K, normalise=...)`, gpt-oss is `RouterRule(K, "logits", "softmax")`,
    DeepSeek-V3 and GLM-4.5 are `RouterRule(K, "sigmoid", normalise=True, epsilon=1e-20, scale=..., groups=...,
    kept_groups=..., group_score="top2")` with a bias.

    Raises:
        ConfigError: on construction, for a value that has no meaning.
    """

    top_k: int
    """K."""
    scores: str = "softmax"
    """What is compared: one of `SCORES`, of a token's logits."""
    weights: str = "scores"
    """What a pick weighs: its score (without bias), or one of the other `WEIGHTS` of the logits of the picks alone."""
    normalise: bool = False
    """Weights are divided by their sum plus `epsilon`."""
    epsilon: float = 0.0
    scale: float = 1.0
    """Weights are multiplied by it at last."""
    groups: int = 1
    """Experts are in so many groups of equal size, by id; picks come from the best `kept_groups`."""
    kept_groups: int = 1
    group_score: str = "max"
    """A group is as good as its best expert ("max"), or as the sum of its best two ("top2")."""

    def __post_init__(self) -> None:
        for name, values in (("scores", SCORES), ("weights", WEIGHTS), ("group_score", GROUP_SCORES)):
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(values)}")
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1")
        if not 1 <= self.kept_groups <= self.groups:
            raise ConfigError(f"kept_groups={self.kept_groups} must be from 1 to groups={self.groups}")
        if not (math.isfinite(self.scale) and math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ConfigError(f"scale={self.scale} must be finite, epsilon={self.epsilon} finite and not negative")
