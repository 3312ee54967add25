"""Single tokens in one call of the kernels: the bits of the layers' own code, and that code wherever it is to run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import Zoo
from transformers.cache_utils import DynamicCache, StaticCache

import moert
from moert.hf import dense_compute, layer_chain
from moert.hf.decoder_layer import DecoderLayerForward
from moert.hf.dense_compute import count, give_back, take_over
from moert.hf.self_attention import SelfAttentionForward
from moert.kernels.self_attention import SelfAttention
from moert.kernels.token_layer import LayerOutput, TokenLayer

PROMPT = torch.tensor([[5, 3, 9, 11, 2, 8, 1]])
STEPS = 5
WHOLE = ["olmoe", "mixtral", "qwen3_moe", "granitemoe"]
WITH_MORE_BESIDE_THE_EXPERTS = ["qwen2_moe", "glm4_moe"]


class Counted:
    """How often attentions and whole layers ran as one call, and how often with the experts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attentions = self.layers = self.complete = self.ahead = 0
        attend, run = SelfAttention.run, TokenLayer.run

        def attention(kernel: SelfAttention, *args: Any) -> Any:
            found = attend(kernel, *args)
            self.attentions += found is not None
            return found

        def layer(kernel: TokenLayer, *args: Any) -> LayerOutput | None:
            found = run(kernel, *args)
            self.layers += found is not None
            self.complete += found is not None and found.output is not None
            return found

        def layers(*args: Any) -> Any:
            found = run_layers(*args)
            if found is not None:
                self.layers += len(found.experts_s)
                self.complete += len(found.experts_s)
                self.ahead += len(found.experts_s) - 1
            return found

        run_layers = layer_chain.run_layers
        monkeypatch.setattr(SelfAttention, "run", attention)
        monkeypatch.setattr(TokenLayer, "run", layer)
        monkeypatch.setattr(layer_chain, "run_layers", layers)

    def take(self) -> tuple[int, int, int]:
        """Since the last time."""
        counts = self.attentions, self.layers, self.complete
        self.attentions = self.layers = self.complete = self.ahead = 0
        return counts


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@contextmanager
def layers_own_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models that are patched within it run the code of their classes, with moert's kernels for its parts."""
    with monkeypatch.context() as patch:
        for name in ("self_attention_forward", "decoder_layer_forward"):
            patch.setattr(dense_compute, name, lambda module: None)
        yield


def decode(
    model: Any, ids: torch.Tensor = PROMPT, cache: Any = None, steps: int = STEPS, grad: bool = False, **given: Any
) -> torch.Tensor:
    """The logits [B, steps, vocabulary] of tokens that follow the prompt one by one."""
    mask = given.pop("attention_mask", None)
    with torch.set_grad_enabled(grad):
        cache = DynamicCache(config=model.config) if cache is None else cache
        found = []
        model(ids, attention_mask=mask, past_key_values=cache, **given)
        for step in range(steps):
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = model(torch.full((len(ids), 1), 7 + step), attention_mask=mask, past_key_values=cache, **given)
            found.append(out.logits[:, -1].detach())
    return torch.stack(found, 1)


def both_ways(
    model: Any, monkeypatch: pytest.MonkeyPatch, run: Callable[[Any], Any] = decode, budget: str = "100%"
) -> tuple[Any, Any]:
    """What `run` gives with the layers' own code, and in one call a token."""
    with layers_own_code(monkeypatch), moert.patch(model, host_memory=budget):
        assert count(model, DecoderLayerForward) == count(model, SelfAttentionForward) == 0
        wanted = run(model)
    with moert.patch(model, host_memory=budget):
        return wanted, run(model)


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


@pytest.mark.parametrize("family", WITH_MORE_BESIDE_THE_EXPERTS)
def test_layers_with_more_than_experts(
    family: str, zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.fresh(family, torch.bfloat16)
    wanted, found = both_ways(model, monkeypatch)
    attentions, layers, _ = counted.take()
    # Those of the trial come to it.
    assert attentions >= (STEPS - 1) * model.config.num_hidden_layers
    assert layers == 0
    assert torch.equal(found, wanted)


def test_attentions_alone(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.fresh("phimoe", torch.bfloat16)
    wanted, found = both_ways(model, monkeypatch)
    assert counted.take()[0] >= (STEPS - 1) * model.config.num_hidden_layers
    assert torch.equal(found, wanted)
    with moert.patch(model, host_memory="100%"):
        assert count(model, DecoderLayerForward) == 0 < count(model, SelfAttentionForward)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_what_computes_something_else_is_left_alone(family: str, zoo: Zoo) -> None:
    with moert.patch(zoo.fresh(family, torch.bfloat16), host_memory="100%") as model:
        assert count(model, DecoderLayerForward) == count(model, SelfAttentionForward) == 0


@pytest.mark.parametrize("budget", ["25%", "60%"])
@pytest.mark.parametrize("predictor", ["none", "gate_ahead_corrected"])
def test_layers_whose_experts_are_not_all_there(
    budget: str, predictor: str, zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    seen = []
    for own in (True, False):
        with monkeypatch.context() as patch:
            if own:
                for name in ("self_attention_forward", "decoder_layer_forward"):
                    patch.setattr(dense_compute, name, lambda module: None)
            with moert.patch(model, host_memory=budget, predictor=predictor):
                logits = decode(model)
                stats = moert.stats(model)
        # What is brought up early comes when it comes.
        seen.append((logits, (stats.hits, stats.misses) if predictor == "none" else stats.hits + stats.misses))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]
    _, layers, complete = counted.take()
    assert layers == (STEPS - 1) * model.config.num_hidden_layers
    assert complete == 0


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


HOOKED = [
    "model.layers.1",
    "model.layers.1.input_layernorm",
    "model.layers.1.self_attn",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.self_attn.q_norm",
    "model.layers.1.post_attention_layernorm",
    "model.layers.1.mlp",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.experts",
]


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_see_what_they_did(path: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(model: Any) -> Any:
        seen: list[Any] = []
        module = model.get_submodule(path)

        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [*args, *kwargs.values(), *(output if isinstance(output, tuple) else (output,))]
            seen.extend(value.clone() for value in tensors if isinstance(value, torch.Tensor))

        handle = module.register_forward_hook(look, with_kwargs=True)
        logits = decode(model, steps=2)
        handle.remove()
        return [*seen, logits, decode(model, steps=2)]

    wanted, found = both_ways(zoo.fresh("qwen3_moe", torch.bfloat16), monkeypatch, watch)
    assert len(found) == len(wanted) > 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_hooks_may_change_things(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def disturb(model: Any) -> Any:
        experts = model.model.layers[1].mlp.experts
        handle = experts.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
        changed = decode(model)
        handle.remove()
        return torch.stack([changed, decode(model)])

    wanted, found = both_ways(zoo.fresh("olmoe", torch.bfloat16), monkeypatch, disturb)
    assert torch.equal(found, wanted)
    assert not torch.equal(found[0], found[1])


def test_hooks_on_every_module(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(model: Any) -> Any:
        names: list[str] = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output: names.append(type(module).__name__)
        )
        try:
            decode(model)
        finally:
            handle.remove()
        return names

    wanted, found = both_ways(zoo.fresh("olmoe", torch.bfloat16), monkeypatch, watch)
    assert found == wanted


def _batch(model: Any) -> torch.Tensor:
    return decode(model, torch.cat([PROMPT, PROMPT.flip(1)]))


def _padded(model: Any) -> torch.Tensor:
    mask = torch.ones_like(PROMPT)
    mask[0, :2] = 0
    return decode(model, attention_mask=mask)


def _static(model: Any) -> torch.Tensor:
    return decode(model, cache=StaticCache(config=model.config, max_cache_len=32))


def _eager(model: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    try:
        return decode(model)
    finally:
        model.set_attn_implementation("sdpa")


def _training(model: Any) -> torch.Tensor:
    model.train()
    try:
        return decode(model)
    finally:
        model.eval()


def _autocast(model: Any) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return decode(model)


def _watched(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        PROMPT,
        max_new_tokens=4,
        do_sample=False,
        output_hidden_states=True,
        output_attentions=False,
        return_dict_in_generate=True,
    ).hidden_states[-1][-1]
    return found


@pytest.mark.parametrize("run", [_batch, _padded, _static, _eager, _training, _autocast, _watched])
def test_what_the_kernels_are_not_for(
    run: Callable[[Any], torch.Tensor], zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, found = both_ways(zoo.fresh("qwen3_moe", torch.bfloat16), monkeypatch, run)
    assert torch.equal(found, wanted)
    if run is not _watched:
        assert counted.take()[1] == 0


def test_sliding_windows(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.fresh("mixtral", torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.sliding_window = 4
    wanted, found = both_ways(model, monkeypatch)
    assert torch.equal(found, wanted)
    assert counted.take()[1] == 0


def test_drafts_that_are_taken_back(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: Any) -> torch.Tensor:
        prompt = torch.tensor([[5, 3, 9, 5, 3, 9, 5, 3]])
        tokens: torch.Tensor = model.generate(prompt, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
        return tokens

    wanted, found = both_ways(zoo.fresh("olmoe", torch.bfloat16), monkeypatch, generate)
    assert torch.equal(found, wanted)


def change_weight_data(model: Any) -> None:
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data = weight.data.clone() * 2


def change_weight(model: Any) -> None:
    projection = model.model.layers[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach() * 2)


def change_module(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.v_proj = torch.nn.Sequential(attention.v_proj, torch.nn.Hardtanh(-0.01, 0.01))


def change_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def change_forward(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    plain = type(gate).forward
    gate.forward = lambda x: plain(gate, 3 * x)


def change_scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 2.0


def change_router(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    gate.weight.data = gate.weight.data.flip(0).clone()


CHANGES = [
    change_weight_data,
    change_weight,
    change_module,
    change_norm,
    change_forward,
    change_scale,
    change_router,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_count(change: Callable[[Any], None], zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for own in (True, False):
        model = zoo.fresh("qwen3_moe", torch.bfloat16)
        with monkeypatch.context() as patch:
            if own:
                for name in ("self_attention_forward", "decoder_layer_forward"):
                    patch.setattr(dense_compute, name, lambda module: None)
            patched = moert.patch(model, host_memory="100%")
        before = decode(patched)
        change(patched)
        found[own] = decode(patched)
        assert not torch.equal(found[own], before)
        moert.close(patched)
    assert torch.equal(found[True], found[False])


def test_settings_that_are_not_tried_keep_the_code(zoo: Zoo) -> None:
    model = zoo.fresh("olmoe", torch.bfloat16)
    model.config.clip_qkv = 8.0
    with moert.patch(model, host_memory="100%"):
        assert count(model, SelfAttentionForward) == 0
    model = zoo.fresh("granitemoe", torch.bfloat16)
    for layer in model.model.layers:
        layer.residual_multiplier = 0.5
    with moert.patch(model, host_memory="100%"):
        assert count(model, DecoderLayerForward) == 0 < count(model, SelfAttentionForward)


def test_code_of_another_class_runs(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.fresh("mixtral", torch.bfloat16)
    block = type(model.model.layers[0].mlp)
    own = block.forward
    with moert.patch(model, host_memory="100%"):
        before = decode(model)
        monkeypatch.setattr(block, "forward", lambda module, x: own(module, x) * 0.5)
        counted.take()
        assert not torch.equal(decode(model), before)
        assert counted.take()[1] == 0


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


def test_without_dense_kernels(zoo: Zoo) -> None:
    with moert.patch(zoo.fresh("olmoe", torch.bfloat16), host_memory="100%", dense_kernels=False) as model:
        assert count(model, DecoderLayerForward) == count(model, SelfAttentionForward) == 0


def test_a_failing_step_can_be_run_again(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with moert.patch(zoo.fresh("olmoe", torch.bfloat16), host_memory="100%") as model:
        wanted = decode(model)

        def fail(*args: Any) -> None:
            raise MemoryError

        for holder, name in ((layer_chain, "run_layers"), (TokenLayer, "run")):
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
