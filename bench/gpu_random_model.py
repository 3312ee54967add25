"""Qwen3-30B-A3B with random weights and as many layers as there is time and memory for, in host memory."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any

import torch
from architectures import configuration
from gpu_layers import TINY, Setting, Shape

ARCHITECTURE = "qwen3-30b-a3b"
SMALL = Shape(64, 32, 40, 4)
"""For dry runs: a tenth of its experts is what one token needs."""

STAGING_BYTES = 256 << 20


def shape_of(setting: Setting) -> Shape:
    return SMALL if setting.shape == TINY else setting.shape


def most_layers(setting: Setting) -> int:
    """Those of the whole model."""
    return 2 if setting.shape == TINY else int(configuration(ARCHITECTURE)["num_hidden_layers"])


def layer_bytes(shape: Shape) -> int:
    """Of the experts of one layer, in bf16."""
    return shape.experts * expert_bytes(shape)


def expert_bytes(shape: Shape) -> int:
    return 3 * shape.hidden * shape.width * 2


def model_config(setting: Setting, layers: int) -> Any:
    """A configuration of transformers."""
    from transformers import AutoConfig

    shape, overrides = shape_of(setting), {}
    if setting.shape == TINY:
        overrides = {"vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        overrides |= {"num_experts_per_tok": shape.top_k}
    settings = configuration(
        ARCHITECTURE,
        layers=layers,
        experts=shape.experts,
        hidden=shape.hidden,
        expert_width=shape.width,
        overrides=overrides,
    )
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def make_model(setting: Setting, layers: int) -> Any:
    """The model on the CPU. The numbers are drawn on the device, which is faster, and the same each time."""
    from transformers import AutoModelForCausalLM

    config = model_config(setting, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are no parameters
    draw = Draw(setting.device)
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        values = in_huge_pages(parameter.shape)
        if parameter.dim() < 2:
            values.fill_(1)
        else:
            draw.into(values, 1.0 if "embed" in name else 1 / math.sqrt(parameter.shape[-1]))
        setattr(model.get_submodule(path), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.generation_config.eos_token_id = None
    return model.eval()


def in_huge_pages(shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Memory as moert's own arena has it: page-locked faster, and read by the CPU with fewer misses."""
    numbers = math.prod(shape)
    memory = mmap.mmap(-1, 2 * numbers, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=numbers).view(shape)


class Draw:
    """Normal numbers, of a seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device
        count = STAGING_BYTES // 2
        self._staging = torch.empty(count, dtype=torch.bfloat16, pin_memory=True) if device.type == "cuda" else None

    def into(self, values: torch.Tensor, std: float) -> None:
        flat = values.view(-1)
        for part in flat.split(STAGING_BYTES // 2):
            drawn = torch.empty(part.shape, dtype=part.dtype, device=self._device)
            drawn.normal_(0, std, generator=self._generator)
            if self._staging is not None:
                # A copy into pageable memory has one thread; a copy within host memory has many.
                drawn = self._staging[: part.numel()].copy_(drawn)
            part.copy_(drawn)
