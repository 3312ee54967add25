"""Tiny models with random weights in which the routed experts matter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .configs import tiny_config
from .names import OUTSIDE_EXPERTS_CLASSES, model_class

PROMPT_TOKENS = 12
BATCH = 2


def experts_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Every module holding routed experts, with its path: those of the hook, and those of the families outside it."""
    outside = set(OUTSIDE_EXPERTS_CLASSES.values())
    return [(name, m) for name, m in model.named_modules() if _follows_hook(m) or type(m).__name__ in outside]


def _follows_hook(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "_apply_gate")) and isinstance(
        getattr(module, "down_proj", None), nn.Parameter
    )


def stacked_parameters(experts: Any) -> dict[str, nn.Parameter]:
    """The experts' own weights by name; what every expert shares (such as a norm after them) is left out."""
    named = dict(experts.named_parameters())
    if _follows_hook(experts):
        parts = ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
        wanted = parts + [f"{part}_bias" for part in parts if experts.has_bias]
        return {name: named[name] for name in wanted}
    return named


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Full names of the routed experts' weights, as `state_dict` has them."""
    return {f"{path}.{name}" for path, module in experts_modules(model) for name in stacked_parameters(module)}


def expert_bytes(model: nn.Module) -> int:
    """Bytes of all routed experts, tied ones counted once and zero-computation ones not at all."""
    nbytes: dict[int, int] = {}
    for _, module in experts_modules(model):
        weights = stacked_parameters(module).values()
        rows = min(weight.shape[0] for weight in weights)
        nbytes.update({weight.data_ptr(): weight[:rows].nbytes for weight in weights})
    return sum(nbytes.values())


def build(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, config: PreTrainedConfig | None = None
) -> Any:
    """A tiny model of the family in eval mode: the same weights for the same seed, experts run by the eager code.

    Args:
        family: One of `FAMILIES`.
        seed: Decides all weights.
        dtype: Of the model, except for what its class keeps in fp32.
        config: In place of the family's `tiny_config`.
    """
    torch.manual_seed(seed)
    # Built in the dtype rather than cast to it: a class may keep some of its modules in fp32.
    model = model_class(family)._from_config(config or tiny_config(family), dtype=dtype).eval()
    use_eager_experts(model)
    _fill(model, torch.Generator().manual_seed(seed + 1))
    return model


def skeleton(family: str) -> Any:
    """A tiny model of the family without weights; with them, where a tower computes its sizes from tensors' values."""
    try:
        with torch.device("meta"):
            return model_class(family)(tiny_config(family))
    except (RuntimeError, NotImplementedError):
        return build(family)


def use_eager_experts(model: Any) -> None:
    """Have the model's own loop over experts run, in place of transformers' batched or grouped ones."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    in_experts = {id(weight) for _, module in experts_modules(model) for weight in stacked_parameters(module).values()}
    experts = max((getattr(m, "num_experts", 0) for _, m in experts_modules(model)), default=0)

    def normal(tensor: torch.Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    for name, weight in model.named_parameters():
        if id(weight) in in_experts and weight.ndim == 3:
            normal(weight, 1.5 / weight.shape[-1] ** 0.5)
        elif id(weight) in in_experts:
            normal(weight, 0.2)  # biases, and DBRX's experts in one matrix
        elif weight.ndim == 2:
            normal(weight, 1 / weight.shape[-1] ** 0.5)
        elif weight.ndim == 1 and name.endswith("bias"):
            normal(weight, 0.05)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name or "expert_bias" in name:
            normal(buffer, 0.05)
        elif name.endswith("balancing_biases"):
            # ZAYA sets the last, its skip expert's, to -1 on every load: that is picked only if the others are low.
            normal(buffer, 0.05)
            buffer.sub_(1)[-1] = -1
        elif name.endswith("tid2eid"):
            # DeepSeek-V4's hash layers: uninitialised, it would send every token to expert 0.
            rows = [torch.randperm(experts, generator=generator)[: buffer.shape[1]] for _ in range(buffer.shape[0])]
            buffer.copy_(torch.stack(rows))


def inputs_for(family: str, model: Any, seed: int = 7) -> dict[str, Any]:
    """Keyword arguments of a forward: two prompts of 12 tokens, and what the family's experts need to all run."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (BATCH, PROMPT_TOKENS), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids}
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if family == "ernie4_5_vl_moe":
        # Some tokens of an image, in the first prompt only.
        vision_tokens = torch.zeros_like(ids)
        vision_tokens[0, 3:7] = 1
        inputs["moe_mm_token_type_ids"] = vision_tokens
        inputs["position_ids"] = torch.arange(PROMPT_TOKENS).expand(3, BATCH, PROMPT_TOKENS).contiguous()
    elif family == "diffusion_gemma":
        inputs.pop("use_cache", None)
        inputs["decoder_input_ids"] = ids
    elif family == "dots3_note+vl":
        inputs.update(_picture(model, ids, generator))
    elif "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids
    return inputs


def _picture(model: Any, ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A picture of 4 by 4 patches, merged two by two into 4 tokens of the first prompt, for towers with experts."""
    vision = model.config.vision_config
    ids[0, 3:7] = model.config.image_token_id
    patch_values = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.randn((16, patch_values), generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The scores of one forward, in fp32: [2, 12, vocabulary] (or labels, where the class classifies tokens)."""
    if hasattr(model, "talker"):
        # Qwen3-Omni as a whole has no forward: its two halves side by side.
        codes = model.talker.get_input_embeddings()(inputs["input_ids"])
        # That of transformers 5.17 does not find its positions by itself.
        positions = torch.arange(codes.shape[1]).expand(3, *codes.shape[:2])
        talker = model.talker(inputs_embeds=codes, position_ids=positions, use_cache=False)
        halves = model.thinker(**inputs).logits, talker.logits
        return torch.cat(halves, dim=-1).float()
    scores: torch.Tensor = model(**inputs).logits
    return scores.float()


def greedy_tokens(model: Any, inputs: dict[str, Any], n: int = 8) -> torch.Tensor:
    """The next `n` tokens by `generate`, [2, n]; the best label of each token where the class cannot generate."""
    if not model.can_generate():
        return logits(model, inputs).argmax(-1)
    model = getattr(model, "thinker", model)
    prompt = {
        key: value
        for key, value in inputs.items()
        if key not in ("decoder_input_ids", "moe_mm_token_type_ids", "position_ids", "use_cache")
    }
    if model.config.model_type == "diffusion_gemma":
        # It draws its first canvas and each refinement of it; the steps end in the best tokens all the same.
        torch.manual_seed(0)
        options = {"max_denoising_steps": 4}
    else:
        options = {"min_new_tokens": n, "do_sample": False}
    out = model.generate(
        **prompt,
        attention_mask=torch.ones_like(prompt["input_ids"]),
        max_new_tokens=n,
        pad_token_id=0,
        **options,
    )
    tokens: torch.Tensor = getattr(out, "sequences", out)
    return tokens[:, -n:]


@contextmanager
def silent_experts(model: nn.Module) -> Iterator[None]:
    """Every routed expert contributes nothing meanwhile: what the logits lose is what the experts matter."""

    def zero(_module: nn.Module, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        assert isinstance(output, torch.Tensor)
        return torch.zeros_like(output)

    hooks = [module.register_forward_hook(zero) for _, module in experts_modules(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
