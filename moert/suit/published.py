"""What the paper found for models that many know, to see a measured value beside."""

from __future__ import annotations

SRP_16 = {
    "LLaMA-MoE-v2": 0.782,
    "Qwen3-30B-A3B": 0.541,
    "OLMoE": 0.509,
    "DeepSeek-V2-Lite": 0.379,
    "DeepSeekMoE": 0.369,
    "OpenMoE": 0.288,
    "Switch": 0.193,
}
"""SRP for windows of 16 tokens (Liang et al., 2025, arXiv 2505.16056)."""


def neighbours(srp: float) -> tuple[str | None, str | None]:
    """The models whose published SRP(16) is the next higher, or equal, and the next lower."""
    above = [name for name, value in SRP_16.items() if value >= srp]
    below = [name for name, value in SRP_16.items() if value < srp]
    return (
        min(above, key=lambda name: SRP_16[name], default=None),
        max(below, key=lambda name: SRP_16[name], default=None),
    )
