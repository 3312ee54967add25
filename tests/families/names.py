"""Which model families there are, found by reading the installed transformers, and which class stands for each."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from pathlib import Path
from types import ModuleType

import transformers
from transformers import PreTrainedModel

_MODELS = Path(transformers.__file__).parent / "models"


def _uses_experts_hook(folder: Path) -> bool:
    return any("use_experts_implementation" in source.read_text() for source in folder.glob("modeling_*.py"))


def _is_there(family: str) -> bool:
    return (_MODELS / family).is_dir()


HOOK_FAMILIES: tuple[str, ...] = tuple(
    sorted(folder.name for folder in _MODELS.iterdir() if folder.is_dir() and _uses_experts_hook(folder))
)
"""Model folders whose experts class is marked with `use_experts_implementation` (64 in transformers 5.23)."""

_WRAPPER_CLASSES = {
    "aria+vl": "AriaForConditionalGeneration",
    "dots3_note+vl": "Dots3NoteForConditionalGeneration",
    "gemma4+vl": "Gemma4ForConditionalGeneration",
    "inkling+vl": "InklingForConditionalGeneration",
    "inkling2+vl": "Inkling2ForConditionalGeneration",
    "minimax_m3_vl+vl": "MiniMaxM3SparseForConditionalGeneration",
    "qwen3_5_moe+vl": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_omni_moe+talker": "Qwen3OmniMoeForConditionalGeneration",
    "qwen4_exp+vl": "Qwen4ExpForConditionalGeneration",
}
WRAPPER_FAMILIES: tuple[str, ...] = tuple(name for name in _WRAPPER_CLASSES if name.partition("+")[0] in HOOK_FAMILIES)
"""Second classes of hook families: the whole multi-modal model around the text model (or a second head)."""

ADAPTER_FAMILIES: tuple[str, ...] = tuple(filter(_is_there, ("dbrx", "longcat_flash", "step3p7")))
"""Families outside the hook that are supported all the same."""

UNSUPPORTED_FAMILIES: tuple[str, ...] = tuple(
    family
    for family in ("aria", "doge", "jetmoe", "llama4", "nllb_moe", "switch_transformers")
    if _is_there(family) and family not in HOOK_FAMILIES
)
"""Families that must be refused with `UnsupportedModelError`."""

SUPPORTED_FAMILIES: tuple[str, ...] = HOOK_FAMILIES + WRAPPER_FAMILIES + ADAPTER_FAMILIES
FAMILIES: tuple[str, ...] = SUPPORTED_FAMILIES + UNSUPPORTED_FAMILIES

LAYOUT_FAMILIES: tuple[str, ...] = tuple(
    family
    for family in (
        "dbrx",
        "deepseek_v3",
        "ernie4_5_vl_moe",
        "gpt_oss",
        "granitemoe",
        "inkling2",
        "jamba",
        "longcat_flash",
        "minimax_m3_vl+vl",
        "mixtral",
        "nemotron_h",
        "qwen3_moe",
        "qwen3_vl_moe",
        "step3p7",
    )
    if family in FAMILIES
)
"""A family of each kind of checkpoint layout and of experts, for tests too long to run on all."""

# The class tested where it is not the folder's own <X>ForCausalLM or <X>ForConditionalGeneration.
_HEAD_CLASSES = {
    "aria": "AriaTextForCausalLM",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}

OUTSIDE_EXPERTS_CLASSES = {
    # In transformers 5.17; it is one of the hook's since.
    "aria": "AriaGroupedExpertsGemm",
    "dbrx": "DbrxExperts",
    "doge": "DogeCDMoE",
    "jetmoe": "JetMoeParallelExperts",
    "llama4": "Llama4TextExperts",
    "longcat_flash": "LongcatFlashExperts",
    "nllb_moe": "NllbMoeExperts",
    "step3p7": "Step3p7Experts",
    "switch_transformers": "SwitchTransformersExperts",
}
"""Experts class of each family outside the hook."""

UNSUPPORTED_REASONS = {
    "aria": "experts take rows sorted by expert and a list of counts",
    "doge": "experts are rows of two embeddings, not feed-forward networks",
    "jetmoe": "experts take rows sorted by expert and a list of counts; the attention has experts too",
    "llama4": "every expert is run on every token, the router scores being multiplied into the input",
    "nllb_moe": "encoder-decoder whose experts are one module each in a ModuleDict",
    "switch_transformers": "encoder-decoder whose experts are one module each in a ModuleDict",
}


def modeling_module(family: str) -> ModuleType:
    """The `modeling_*` module of a family or of a wrapper variant such as `"gemma4+vl"`."""
    folder = family.partition("+")[0]
    return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")


@cache
def model_class(family: str) -> type[PreTrainedModel]:
    """The class that stands for the family in the contract tests."""
    module = modeling_module(family)
    name = _WRAPPER_CLASSES.get(family) or _HEAD_CLASSES.get(family)
    if name is None:
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
        ]
        heads = [key for suffix in ("ForCausalLM", "ForConditionalGeneration") for key in own if key.endswith(suffix)]
        if not heads:
            raise LookupError(f"{family}: no causal or conditional head among {own}")
        name = heads[0]
    found: type[PreTrainedModel] = getattr(module, name)
    return found
