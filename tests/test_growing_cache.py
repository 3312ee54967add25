"""A cache that grows in place holds what transformers' own does, and never changes what it has handed out."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from transformers import OlmoeForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

import moert
from moert.hf.growing_cache import GrowingLayer, grow

H, D = 2, 3


def same(layer: DynamicLayer, reference: DynamicLayer) -> None:
    assert torch.equal(layer.keys, reference.keys)
    assert torch.equal(layer.values, reference.values)
    assert layer.get_seq_length() == reference.get_seq_length()


class CacheMachine(RuleBasedStateMachine):
    """All that transformers does to a layer, side by side with a layer of its own."""

    @initialize(batch=st.integers(1, 3))
    def start(self, batch: int) -> None:
        self.pairs = [(GrowingLayer(), DynamicLayer())]
        self.batches = [batch]
        self.handed_out: list[tuple[torch.Tensor, torch.Tensor]] = []

    def draw(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.pairs) - 1), label="layer")

    @rule(data=st.data(), tokens=st.integers(1, 5))
    def update(self, data: st.DataObject, tokens: int) -> None:
        at = self.draw(data)
        new = [torch.randn(self.batches[at], H, tokens, D) for _ in range(2)]
        layer, reference = self.pairs[at]
        for found, wanted in zip(layer.update(*new), reference.update(*new), strict=True):
            assert torch.equal(found, wanted)
            self.handed_out.append((found, wanted.clone()))

    @rule(data=st.data())
    def many_updates(self, data: st.DataObject) -> None:
        for _ in range(70):
            self.update(data, 1)

    @rule(data=st.data(), cut=st.integers(1, 4))
    def crop(self, data: st.DataObject, cut: int) -> None:
        for layer in self.pairs[self.draw(data)]:
            if layer.is_initialized and layer.get_seq_length() > cut:
                layer.crop(-cut)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        at = self.draw(data)
        order = torch.tensor(data.draw(st.permutations(range(self.batches[at]))))
        for layer in self.pairs[at]:
            if layer.is_initialized:
                layer.reorder_cache(order)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        at = self.draw(data)
        if self.batches[at] < 4 and self.pairs[at][0].is_initialized:
            self.batches[at] *= 2
            for layer in self.pairs[at]:
                layer.batch_repeat_interleave(2)

    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        layer, reference = self.pairs[self.draw(data)]
        if layer.is_initialized:
            layer.keys, reference.keys = layer.keys * 2, reference.keys * 2

    @rule(data=st.data(), how=st.sampled_from(["copy", "deepcopy", "pickle"]))
    def copied(self, data: st.DataObject, how: str) -> None:
        at = self.draw(data)
        if len(self.pairs) > 3:
            return
        copies = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
        layer, reference = self.pairs[at]
        again = copies[how](layer)
        assert type(again) is DynamicLayer
        again.__class__ = GrowingLayer
        self.pairs.append((again, copy.deepcopy(reference)))
        self.batches.append(self.batches[at])

    @invariant()
    def nothing_has_changed(self) -> None:
        for found, wanted in getattr(self, "handed_out", []):
            assert torch.equal(found, wanted)
        for layer, reference in getattr(self, "pairs", []):
            if layer.is_initialized:
                same(layer, reference)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_one_token_is_written_behind_the_others() -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(1, H, 10, D), torch.randn(1, H, 10, D))
    layer.update(torch.randn(1, H, 1, D), torch.randn(1, H, 1, D))
    at = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(50):
        layer.update(torch.randn(1, H, 1, D), torch.randn(1, H, 1, D))
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == at


def test_gradients_go_through_the_classs_own_update() -> None:
    layer = GrowingLayer()
    first, second = (torch.randn(1, H, 2, D, requires_grad=True) for _ in range(2))
    layer.update(first, first)
    keys, values = layer.update(second, second)
    (keys.sum() + values.sum()).backward()
    assert first.grad is not None
    assert torch.equal(first.grad, torch.full_like(first, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
    ],
)
def test_generation_is_the_same(options: dict[str, Any], tiny_olmoe: Path) -> None:
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe).eval()
    prompt = torch.tensor([[5, 3, 5, 3, 5, 3]])

    def run() -> Any:
        torch.manual_seed(0)
        return model.generate(prompt, max_new_tokens=90, min_new_tokens=90, pad_token_id=0, **options)

    want = run()
    hook = grow(model)
    assert torch.equal(run(), want)
    hook.remove()


def test_what_was_cached_in_inference_mode_goes_on_outside_of_it() -> None:
    layer, reference = GrowingLayer(), DynamicLayer()

    def add(tokens: int) -> None:
        new = torch.randn(1, H, tokens, D)
        layer.update(new, new)
        reference.update(new, new)

    with torch.inference_mode():
        for tokens in (4, 1, 1):
            add(tokens)
    for _ in range(3):
        add(1)
    with torch.inference_mode():
        add(1)
    same(layer, reference)


def test_patched_models_caches_grow_and_unpatched_ones_do_not(tiny_olmoe: Path) -> None:
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe, dtype=torch.bfloat16).eval()

    def kind() -> type:
        cache = DynamicCache()
        for _ in range(3):
            model(torch.tensor([[1]]), past_key_values=cache)
        return type(cache.layers[0])

    assert kind() is DynamicLayer
    with moert.patch(model):
        assert kind() is GrowingLayer
    assert kind() is DynamicLayer
    with moert.patch(model, dense_kernels=False):
        assert kind() is DynamicLayer
