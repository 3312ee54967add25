"""Single tokens in one call of the kernels: the bits of the layers' own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import decoder_support
import pytest
import torch
from decoder_support import PROMPT, STEPS, Counted, both_ways, decode, layers_own_code
from families import Zoo
from transformers.cache_utils import DynamicCache

import moert
from moert.hf import layer_chain
from moert.hf.decoder_layer import DecoderLayerForward
from moert.hf.dense_compute import count, give_back, take_over
from moert.hf.layer_chain import LayerChain
from moert.hf.self_attention import SelfAttentionForward
from moert.kernels.token_layer import LayersOneByOne

counted = decoder_support.counted

WHOLE = ["olmoe", "mixtral", "qwen3_moe", "granitemoe"]


# The first token after the prompt makes room in the cache.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", WHOLE)
def test_whole_layers(
    family: str, dtype: torch.dtype, zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.fresh(family, dtype)
    wanted, found = both_ways(model, monkeypatch)
    layers = model.config.num_hidden_layers
    assert counted.ahead == (STEPS - 1) * (layers - 1)
    assert counted.take() == (2 * layers, (STEPS - 1) * layers, (STEPS - 1) * layers)
    assert wanted.isfinite().all()
    if dtype is torch.bfloat16 and family != "mixtral":
        assert torch.equal(found, wanted)
    else:  # the router's weights are finer, and torch computes exp in its own way
        assert (found - wanted).float().norm() <= 2**-8 * wanted.float().norm()


def test_attentions_alone(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.fresh("phimoe", torch.bfloat16)
    wanted, found = both_ways(model, monkeypatch)
    assert counted.take()[0] >= (STEPS - 1) * model.config.num_hidden_layers
    assert torch.equal(found, wanted)
    with moert.patch(model, host_memory="100%"):
        assert count(model, DecoderLayerForward) == 0 < count(model, SelfAttentionForward)


@pytest.mark.parametrize("budget", ["25%", "60%"])
@pytest.mark.parametrize("predictor", ["none", "gate_ahead_corrected"])
def test_layers_whose_experts_are_not_all_there(
    budget: str, predictor: str, zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    seen, asked, take = [], [], LayerChain._take

    def noted(chain: LayerChain, place: int, *args: Any) -> Any:
        asked.append(place)
        return take(chain, place, *args)

    monkeypatch.setattr(LayerChain, "_take", noted)
    for own in (True, False):
        with (
            layers_own_code(monkeypatch) if own else nullcontext(),
            moert.patch(model, host_memory=budget, predictor=predictor),
        ):
            logits = decode(model)
            stats = moert.stats(model)
        # What is brought up early comes when it comes.
        seen.append((logits, (stats.hits, stats.misses) if predictor == "none" else stats.hits + stats.misses))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]
    _, layers, complete = counted.take()
    assert layers == (STEPS - 1) * model.config.num_hidden_layers
    assert complete == 0
    assert set(asked) <= {0}, "each layer would ask all that follow it"
    assert len(asked) <= 2  # until the cache has room for a token, and the layers are known


def test_slots_that_hold_all_and_then_do_not(zoo: Zoo, counted: Counted) -> None:
    path = zoo.specimen("qwen3_moe", torch.bfloat16).path
    with moert.load(path, host_memory="100%", dtype="auto") as model:
        steps = (STEPS - 1) * model.config.num_hidden_layers
        wanted = decode(model)
        assert counted.take()[1:] == (steps, steps)
        for budget in ("30%", "100%", "50%"):
            moert.resize(model, host_memory=budget)
            for _ in range(3):
                assert torch.equal(decode(model), wanted)
            assert (counted.take()[2] > 0) <= (budget == "100%")


def test_the_policy_learns_the_same(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(model: Any) -> Any:
        decode(model)
        runtime = next(module.runtime for module in model.modules() if hasattr(module, "runtime"))
        policies = [vars(layer.residency.policy) for layer in runtime.layers]
        return [{name: repr(value) for name, value in policy.items() if name != "_residents"} for policy in policies]

    wanted, found = both_ways(zoo.fresh("olmoe", torch.bfloat16), monkeypatch, state)
    assert found == wanted


@pytest.mark.parametrize("scores", [False, True])
def test_recording_sees_the_same(scores: bool, zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(model: Any) -> Any:
        with moert.record(model, scores=scores) as trace:
            decode(model)
        (sequence,) = trace
        return [value.tolist() for value in vars(sequence).values() if hasattr(value, "tolist")]

    model = zoo.fresh("olmoe", torch.bfloat16)
    wanted, found = both_ways(model, monkeypatch, record)
    assert found == wanted
    assert len(found) >= 3 + scores
    assert counted.take()[2] == (STEPS - 1) * model.config.num_hidden_layers


def test_drafts_that_are_taken_back(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: Any) -> torch.Tensor:
        prompt = torch.tensor([[5, 3, 9, 5, 3, 9, 5, 3]])
        tokens: torch.Tensor = model.generate(prompt, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
        return tokens

    wanted, found = both_ways(zoo.fresh("olmoe", torch.bfloat16), monkeypatch, generate)
    assert torch.equal(found, wanted)


def test_a_copy_of_an_attention_is_of_its_own_weights(zoo: Zoo) -> None:
    model = zoo.fresh("olmoe", torch.bfloat16)
    take_over(model, None)
    attention = model.model.layers[0].self_attn
    copied = copy.deepcopy(attention)
    with torch.no_grad():
        copied.q_proj.weight.mul_(3)
    own = vars(attention)["forward"]
    assert isinstance(own, SelfAttentionForward)
    assert own.token is not None
    assert vars(copied)["forward"].token is None
    give_back(model)
    assert "forward" not in vars(attention)


def test_unpatch_leaves_the_classes_code(zoo: Zoo) -> None:
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    before = decode(model)
    with moert.patch(model, host_memory="100%"):
        assert count(model, DecoderLayerForward) == model.config.num_hidden_layers
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(decode(model), before)


def test_a_failing_step_can_be_run_again(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with moert.patch(zoo.fresh("olmoe", torch.bfloat16), host_memory="100%") as model:
        wanted = decode(model)

        def fail(*args: Any) -> None:
            raise MemoryError

        for holder, name in ((layer_chain, "run_layers"), (LayersOneByOne, "run")):
            with monkeypatch.context() as patch:
                patch.setattr(holder, name, fail)
                if name == "run":
                    patch.setattr(layer_chain, "run_layers", lambda *args: None)
                with pytest.raises(MemoryError):
                    decode(model)
            assert torch.equal(decode(model), wanted)


def _steering_in_place(model: Any) -> Any:
    return model.model.layers[0].register_forward_hook(lambda module, args, output: output.mul_(1.5))


def _steering_anew(model: Any) -> Any:
    return model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)


def _steering_before(model: Any) -> Any:
    return model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


@pytest.mark.parametrize("steer", [_steering_in_place, _steering_anew, _steering_before])
@pytest.mark.parametrize("inference", [False, True])
def test_what_happens_between_layers_counts(
    steer: Callable[[Any], Any], inference: bool, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(model: Any) -> torch.Tensor:
        with torch.inference_mode(inference):
            handle = steer(model)
            steered = decode(model)
            handle.remove()
            return torch.stack([steered, decode(model)])

    wanted, found = both_ways(zoo.fresh("olmoe", torch.bfloat16), monkeypatch, run)
    assert torch.equal(found, wanted)
    assert not torch.equal(found[0], found[1])


def test_code_between_layers_counts(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose own loop changes what a layer gave, in place, where no hook tells."""

    def run(model: Any) -> torch.Tensor:
        layers = model.model.layers
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(PROMPT, past_key_values=cache)
            found = []
            for step in range(3):
                position = torch.tensor([[PROMPT.shape[1] + step]])
                x = model.model.embed_tokens(torch.tensor([[7 + step]]))
                angles = model.model.rotary_emb(x, position)
                for at, layer in enumerate(layers):
                    if at == 1 and step:
                        x[..., 3] += 1
                    if at == 2 and step == 2:
                        continue
                    x = layer(x, attention_mask=None, position_embeddings=angles, past_key_values=cache)
                found.append(x.clone())
            lengths = [layer.get_seq_length() for layer in cache.layers]
        runtime = layers[0].mlp.experts.runtime
        return torch.stack(found), lengths, [layer.stats.hits for layer in runtime.layers]

    model = zoo.fresh("olmoe", torch.bfloat16)
    wanted, found = both_ways(model, monkeypatch, run)
    assert torch.equal(found[0], wanted[0])
    assert found[1:] == wanted[1:]
    assert counted.ahead > 0
