"""Tiny models of every mixture-of-experts family of the installed transformers, and the table of support."""

from __future__ import annotations

from .checkpoints import Specimen, Zoo, plain_load, save, transpose_fused_experts, zoo_at
from .configs import all_configs, tiny_config
from .models import (
    build,
    expert_bytes,
    expert_parameter_names,
    experts_modules,
    greedy_tokens,
    inputs_for,
    logits,
    silent_experts,
    skeleton,
    stacked_parameters,
    use_eager_experts,
)
from .names import (
    ADAPTER_FAMILIES,
    FAMILIES,
    HOOK_FAMILIES,
    LAYOUT_FAMILIES,
    OUTSIDE_EXPERTS_CLASSES,
    SUPPORTED_FAMILIES,
    UNSUPPORTED_FAMILIES,
    UNSUPPORTED_REASONS,
    WRAPPER_FAMILIES,
    model_class,
)
from .support import SupportRow, support_table

__all__ = [
    "ADAPTER_FAMILIES",
    "FAMILIES",
    "HOOK_FAMILIES",
    "LAYOUT_FAMILIES",
    "OUTSIDE_EXPERTS_CLASSES",
    "SUPPORTED_FAMILIES",
    "UNSUPPORTED_FAMILIES",
    "UNSUPPORTED_REASONS",
    "WRAPPER_FAMILIES",
    "Specimen",
    "SupportRow",
    "Zoo",
    "all_configs",
    "build",
    "expert_bytes",
    "expert_parameter_names",
    "experts_modules",
    "greedy_tokens",
    "inputs_for",
    "logits",
    "model_class",
    "plain_load",
    "save",
    "silent_experts",
    "skeleton",
    "stacked_parameters",
    "support_table",
    "tiny_config",
    "transpose_fused_experts",
    "use_eager_experts",
    "zoo_at",
]
