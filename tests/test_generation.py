"""An offloaded model is an ordinary HuggingFace model: `generate` in all its ways, pipelines, modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import Zoo, logits

import moert

FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
PROMPT = {
    "input_ids": torch.tensor([[5, 17, 29, 41, 53, 17, 29], [7, 11, 13, 17, 19, 23, 29]]),
    "attention_mask": torch.ones((2, 7), dtype=torch.int64),
}

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy without a cache": {"do_sample": False, "use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "nucleus": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.3},
}


@pytest.fixture(params=["load", "patch"])
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FAMILIES)
def models(request: pytest.FixtureRequest, route: str, zoo: Zoo) -> Iterator[tuple[Any, Any]]:
    """The model as transformers runs it, and the same one offloaded with a quarter of its experts in memory."""
    family = request.param
    if route == "load":
        offloaded = moert.load(zoo.specimen(family).path, host_memory="25%", dtype=torch.float32)
    else:
        offloaded = moert.patch(zoo.fresh(family), host_memory="25%")
    yield zoo.specimen(family).model, offloaded
    moert.close(offloaded)


def tokens(model: Any, prompt: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(11)
    out: torch.Tensor = model.generate(**prompt, pad_token_id=0, min_new_tokens=10, max_new_tokens=10, **options)
    return out


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_same_tokens(way: str, models: tuple[Any, Any]) -> None:
    plain, offloaded = models
    assert torch.equal(tokens(offloaded, PROMPT, **WAYS[way]), tokens(plain, PROMPT, **WAYS[way]))


def test_prompt_lookup_decoding_gives_the_same_tokens(models: tuple[Any, Any]) -> None:
    plain, offloaded = models
    prompt = {"input_ids": PROMPT["input_ids"][:1].repeat(1, 3)}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    options = {"do_sample": False, "prompt_lookup_num_tokens": 3}
    assert torch.equal(tokens(offloaded, prompt, **options), tokens(plain, prompt, **options))


def test_assistant_model_gives_the_same_tokens(models: tuple[Any, Any], zoo: Zoo) -> None:
    plain, offloaded = models
    prompt = {name: tensor[:1] for name, tensor in PROMPT.items()}
    options = {"do_sample": False, "assistant_model": zoo.specimen("qwen2_moe").model}
    assert torch.equal(tokens(offloaded, prompt, **options), tokens(plain, prompt, **options))


def test_left_padded_batch_gives_the_same_tokens(models: tuple[Any, Any]) -> None:
    plain, offloaded = models
    prompt = {name: tensor.clone() for name, tensor in PROMPT.items()}
    prompt["input_ids"][0, :3] = 0
    prompt["attention_mask"][0, :3] = 0
    found = tokens(offloaded, prompt, do_sample=False)
    assert torch.equal(found, tokens(plain, prompt, do_sample=False))
    alone = {name: tensor[:1, 3:] for name, tensor in prompt.items()}
    assert torch.equal(tokens(offloaded, alone, do_sample=False)[0, 4:], found[0, 7:])


def test_inference_mode_and_no_grad_and_neither_agree(models: tuple[Any, Any]) -> None:
    _, offloaded = models
    with torch.inference_mode():
        inferred = offloaded(**PROMPT).logits.clone()
    with torch.no_grad():
        without = offloaded(**PROMPT).logits
    assert torch.equal(without, inferred)
    assert torch.equal(offloaded(**PROMPT).logits.detach(), inferred)


def test_train_and_eval_toggle_without_a_trace(models: tuple[Any, Any]) -> None:
    _, offloaded = models
    before = logits(offloaded, PROMPT)
    offloaded.train()
    assert all(module.training for module in offloaded.modules())
    assert torch.isfinite(logits(offloaded, PROMPT)).all()
    offloaded.eval()
    assert not any(module.training for module in offloaded.modules())
    assert torch.equal(logits(offloaded, PROMPT), before)


def test_router_logits_and_hidden_states_are_those_of_the_plain_model(models: tuple[Any, Any]) -> None:
    plain, offloaded = models
    asked = {"output_router_logits": True, "output_hidden_states": True}
    with torch.no_grad():
        expected, found = plain(**PROMPT, **asked), offloaded(**PROMPT, **asked)
    assert len(found.router_logits) == len(expected.router_logits) > 0
    torch.testing.assert_close(found.router_logits, expected.router_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-4)


def test_streamed_tokens_arrive_one_by_one(models: tuple[Any, Any]) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[torch.Tensor] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.flatten())

        def end(self) -> None:
            self.ended = True

    _, offloaded = models
    collector = Collector()
    prompt = {name: tensor[:1] for name, tensor in PROMPT.items()}
    out = tokens(offloaded, prompt, do_sample=False, streamer=collector)
    assert collector.ended
    assert torch.equal(torch.cat(collector.pieces), out[0])


def test_text_generation_pipeline_gives_the_same_text(models: tuple[Any, Any]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, 128)}}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="left")
    plain, offloaded = models
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)(
            ["w5 w17 w29", "w7"], do_sample=False, max_new_tokens=8, min_new_tokens=8, batch_size=2
        )
        for model in (plain, offloaded)
    ]
    assert texts[0] == texts[1]


def test_many_steps_give_the_same_tokens_with_hits_and_misses(models: tuple[Any, Any]) -> None:
    plain, offloaded = models
    prompt = {name: tensor[:1] for name, tensor in PROMPT.items()}
    options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": 64, "max_new_tokens": 64}
    assert torch.equal(offloaded.generate(**prompt, **options), plain.generate(**prompt, **options))
    stats = moert.stats(offloaded).as_dict()
    assert stats["hits"] > 0
    assert stats["misses"] > 0
