"""What single tokens get of one call of the kernels, in every family: the attention, the experts, or whole layers."""

from __future__ import annotations

import pytest
import torch
from families import SUPPORTED_FAMILIES, build

import moert
from moert.hf.block_forward import BlockForward
from moert.hf.decoder_layer import DecoderLayerForward
from moert.hf.dense_compute import count
from moert.hf.self_attention import SelfAttentionForward


def _named(text: str) -> set[str]:
    return set(text.split())


WHOLE_LAYERS = _named(
    "aria aria+vl deepseek_ocr2 dots1 glm4_moe glm4v_moe granitemoe hy_v3 mellum minimax_m2 mixtral olmoe "
    "qwen2_moe qwen3_moe qwen3_omni_moe qwen3_omni_moe+talker qwen3_vl_moe solar_open unlimited_ocr"
)
ATTENTIONS = WHOLE_LAYERS | _named("exaone_moe flex_olmo granitemoehybrid granitemoeshared kolibri1 minimax phimoe")
BLOCKS = WHOLE_LAYERS | _named(
    "axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots3_note dots3_note+vl "
    "exaone_moe flex_olmo flint glm4_moe_lite glm5_next glm_moe_dsa gpt_oss granitemoe_swa granitemoehybrid "
    "granitemoeshared hy_v4 jamba kimi_linear kolibri1 laguna lfm2_moe mimo_v2_flash minimax minimax_m3_vl "
    "minimax_m3_vl+vl mistral4 mistral_large4 nemotron_h qwen3_5_moe qwen3_5_moe+vl qwen3_next qwen4_exp "
    "qwen4_exp+vl step3p7"
)


@pytest.mark.slow
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_what_a_family_gets(family: str) -> None:
    with moert.patch(build(family, dtype=torch.bfloat16), host_memory="100%") as model:
        layers = [vars(module).get("forward") for module in model.modules()]
        whole = [f for f in layers if isinstance(f, DecoderLayerForward) and f._whole is not None]
        found = bool(whole), count(model, SelfAttentionForward) > 0, count(model, BlockForward) > 0
    assert found == (family in WHOLE_LAYERS, family in ATTENTIONS, family in BLOCKS)


def test_numbers_that_the_documentation_gives() -> None:
    assert len(SUPPORTED_FAMILIES) != 76 or (len(WHOLE_LAYERS), len(ATTENTIONS), len(BLOCKS)) == (19, 26, 57)
