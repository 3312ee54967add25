"""Experts that moert cannot run, by class, each with the reason a user is told."""

from __future__ import annotations

from torch import nn

_OWN_CONTRACT = "moert runs experts that are called with (hidden states, expert ids, router weights); {}"
_PACKED = "its weights are packed as {}, which this version cannot read; load the bf16 checkpoint of the model"

REASONS = {
    "Llama4TextExperts": _OWN_CONTRACT.format("this class runs every expert on every token and never sees the ids"),
    "SequentialLlama4TextExperts": _OWN_CONTRACT.format("this class runs every expert on every token"),
    "FbgemmFp8Llama4TextExperts": _OWN_CONTRACT.format("this class runs every expert on every token, in FBGEMM's FP8"),
    "JetMoeParallelExperts": _OWN_CONTRACT.format(
        "this class is one linear layer over tokens sorted by expert, and attention uses it too"
    ),
    # Of transformers 5.17; later ones have Aria's experts as those of other families.
    "AriaGroupedExpertsGemm": _OWN_CONTRACT.format(
        "this class is one linear layer over tokens sorted by expert; a newer transformers has another one"
    ),
    "DogeCDMoE": _OWN_CONTRACT.format("here an expert is a row of an embedding, far too small to move on its own"),
    "SwitchTransformersExperts": _OWN_CONTRACT.format("this class is a ModuleDict of MLPs that its block calls"),
    "NllbMoeExperts": _OWN_CONTRACT.format("this class is a ModuleDict of MLPs that its block calls"),
    "VitPoseNaiveMoe": _OWN_CONTRACT.format("here a data set's index picks the expert, not a router"),
    "FP8Experts": _PACKED.format("FP8 with block scales"),
    "Mxfp4GptOssExperts": _PACKED.format("MXFP4"),
    "GgufExperts": _PACKED.format("GGUF blocks"),
}


def why_unsupported(module: nn.Module) -> str | None:
    """The reason why `module` cannot be run, if it is such an experts module; None for any other module."""
    for cls in type(module).__mro__:
        if cls.__name__ in REASONS:
            return REASONS[cls.__name__]
    return None
