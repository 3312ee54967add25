"""Models without a head: a token through all layers without their modules, and all else by the class's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoder_support import PROMPT, STEPS, decode
from families import Zoo
from torch import nn
from transformers.cache_utils import DynamicCache

import moert
from moert.hf import base_model
from moert.hf.base_model import BaseModelForward, base_model_forward
from moert.hf.dense_compute import count
from moert.kernels.token_layer import LayersOneByOne
from moert.runtime import one_token_misses

WHOLE = ["olmoe", "mixtral", "qwen3_moe"]


class Counted:
    """How many tokens went past the layers' modules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        run = BaseModelForward._run

        def counting(forward: BaseModelForward, *args: Any) -> Any:
            output = run(forward, *args)
            self.tokens += output is not None
            return output

        monkeypatch.setattr(BaseModelForward, "_run", counting)

    def take(self) -> int:
        """Since the last time."""
        tokens, self.tokens = self.tokens, 0
        return tokens


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def patched(zoo: Zoo) -> Iterator[Any]:
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    with moert.patch(model, host_memory="100%"):
        yield model


def by_the_class(model: Any, run: Callable[[Any], Any] = decode) -> Any:
    """What `run` gives while the base model's forward is the class's, and the layers' are moert's."""
    base = model.base_model
    forward = base.__dict__.pop("forward")
    try:
        return run(model)
    finally:
        base.forward = forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", WHOLE)
def test_the_same_bits_and_counts(family: str, dtype: torch.dtype, zoo: Zoo, counted: Counted) -> None:
    model = zoo.fresh(family, dtype)
    with moert.patch(model, host_memory="100%"):
        seen = []
        for run in (by_the_class, decode):
            before = moert.stats(model)
            logits = run(model)
            after = moert.stats(model)
            # The first token after a prompt makes room in the cache, by the class's code.
            assert counted.take() == (0 if run is by_the_class else STEPS - 1)
            seen.append((logits, after.hits - before.hits, after.decoding.steps - before.decoding.steps))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1:] == seen[1][1:]


@pytest.mark.parametrize("masked", [False, True])
def test_generate_gives_the_same_tokens(masked: bool, patched: Any, counted: Counted) -> None:
    mask = torch.ones_like(PROMPT) if masked else None

    def generate(model: Any) -> torch.Tensor:
        found: torch.Tensor = model.generate(PROMPT, attention_mask=mask, max_new_tokens=12, do_sample=False)
        return found

    wanted = by_the_class(patched, generate)
    assert counted.take() == 0
    assert torch.equal(generate(patched), wanted)
    assert counted.take() >= 8


def hidden_states(model: Any) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        for _ in range(2):
            out = model(PROMPT[:, :1], past_key_values=cache, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    return torch.stack([state[:, -1] for state in out.hidden_states])


def padded(model: Any) -> torch.Tensor:
    mask = torch.ones_like(PROMPT)
    mask[:, :3] = 0
    return decode(model, attention_mask=mask)


def two_sequences(model: Any) -> torch.Tensor:
    return decode(model, PROMPT.expand(2, -1).contiguous())


def without_cache(model: Any) -> torch.Tensor:
    return decode(model, use_cache=False)


def begun(model: Any) -> DynamicCache:
    """A cache with a prompt in it and room for more."""
    cache = DynamicCache(config=model.config)
    for ids in (PROMPT, PROMPT[:, :1]):
        model(ids, past_key_values=cache)
    return cache


def as_tuple(model: Any) -> torch.Tensor:
    with torch.no_grad():
        cache = begun(model)
        out = model.base_model(input_ids=PROMPT[:, :1], past_key_values=cache, return_dict=False)
    assert isinstance(out, tuple)
    hidden: torch.Tensor = out[0]
    return hidden


def by_config(model: Any) -> torch.Tensor:
    with torch.no_grad():
        cache = begun(model)
        # Whose hooks are put in only now.
        model.config.output_hidden_states = True
        try:
            out = model.base_model(input_ids=PROMPT[:, :1], past_key_values=cache)
        finally:
            model.config.output_hidden_states = False
    return torch.stack([state[:, -1] for state in out.hidden_states])


def embedded(model: Any) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        for ids in (PROMPT, PROMPT[:, :1], PROMPT[:, :1]):
            out = model(inputs_embeds=embed(ids), past_key_values=cache)
    logits: torch.Tensor = out.logits
    return logits


def with_gradients(model: Any) -> torch.Tensor:
    return decode(model, grad=True)


@pytest.mark.parametrize(
    "run",
    [hidden_states, padded, two_sequences, as_tuple, by_config, embedded, with_gradients],
    ids=lambda run: run.__name__,
)
def test_all_else_is_the_class_s(run: Callable[[Any], Any], patched: Any, counted: Counted) -> None:
    found = run(patched)
    assert counted.take() == 0
    assert torch.equal(found, by_the_class(patched, run))


def test_without_a_cache_too(patched: Any, counted: Counted) -> None:
    assert torch.equal(without_cache(patched), by_the_class(patched, without_cache))
    assert counted.take() == 0


@pytest.mark.parametrize("place", ["layers.0", "layers.1", "layers.1.self_attn", "embed_tokens", "norm", "rotary_emb"])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_are_called(place: str, before: bool, patched: Any, counted: Counted) -> None:
    calls = []
    module = patched.base_model.get_submodule(place)
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(lambda *_: calls.append(place))
    wanted = decode(patched)
    assert len(calls) == STEPS + 1
    assert counted.take() == 0
    handle.remove()
    assert torch.equal(decode(patched), wanted)
    assert counted.take() == STEPS - 1


def test_another_module_in_its_place(patched: Any, counted: Counted) -> None:
    class Doubled(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.inner = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            doubled: torch.Tensor = 2 * self.inner(x)
            return doubled

    base = patched.base_model
    plain, norm = decode(patched), base.norm
    counted.take()
    base.norm = Doubled(norm)
    changed = decode(patched)
    assert counted.take() == 0
    base.norm = norm
    assert not torch.equal(changed, plain)
    assert torch.equal(decode(patched), plain)


def test_fewer_layers(patched: Any, counted: Counted) -> None:
    base = patched.base_model
    whole, layers = decode(patched), base.layers
    counted.take()
    base.layers = layers[:1]
    one = decode(patched)
    assert counted.take() == 0
    base.layers = layers
    assert not torch.equal(one, whole)


@pytest.mark.parametrize("name", ["num_hidden_layers", "sliding_window"])
def test_settings_that_change(name: str, patched: Any, counted: Counted) -> None:
    before = getattr(patched.config, name)
    setattr(patched.config, name, 1)
    decode(patched)
    assert counted.take() == 0
    setattr(patched.config, name, before)
    decode(patched)
    assert counted.take() == STEPS - 1


def test_one_more_layer(patched: Any, counted: Counted) -> None:
    layers = patched.base_model.layers
    patched.config.num_hidden_layers += 1
    layers.append(layers[0])
    decode(patched)
    assert counted.take() == 0
    layers._modules.popitem()
    patched.config.num_hidden_layers -= 1
    decode(patched)
    assert counted.take() == STEPS - 1


def test_compiling_sees_the_class(patched: Any, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(decode(patched), by_the_class(patched))
    assert counted.take() == 0


def test_training_is_the_class_s(patched: Any, counted: Counted) -> None:
    patched.train()
    decode(patched)
    assert counted.take() == 0


def test_experts_that_are_not_all_there(zoo: Zoo, counted: Counted) -> None:
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    with moert.patch(model, host_memory="50%"):
        wanted = by_the_class(model)
        misses = moert.stats(model).misses
        assert torch.equal(decode(model), wanted)
        assert moert.stats(model).misses > misses
        assert counted.take() > 0
        moert.resize(model, host_memory="100%")
        with torch.no_grad():
            model(torch.arange(120).unsqueeze(0))  # which brings all experts up
        assert torch.equal(decode(model), wanted)
        assert counted.take() == STEPS - 1


def test_a_layer_that_its_kernel_is_not_for(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    with moert.patch(model, host_memory="50%"):
        wanted = by_the_class(model)
        run = LayersOneByOne.run
        monkeypatch.setattr(LayersOneByOne, "run", lambda self, *given: run(self, *given) and None)
        assert torch.equal(decode(model), wanted)


def test_reads_that_only_python_can_do(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been computed when one of them fails is not computed again."""
    model, left_out = zoo.fresh("qwen3_moe", torch.bfloat16), []
    right = one_token_misses.run_arriving

    def failing(ffn: Any, hidden: Any, experts: Any, places: Any, weights: Any, records: list[Any]) -> Any:
        found = right(ffn, hidden, experts, places, weights, records)
        missing = [place for place, record in enumerate(records) if record is not None]
        if len(missing) < 2:
            return found
        left_out.append(missing[0])
        found.held[missing[0]] = 0
        return found._replace(output=None, is_computed=[place != missing[0] for place in range(len(records))])

    with moert.patch(model, host_memory="25%", predictor="none"):
        wanted = by_the_class(model)
        monkeypatch.setattr(one_token_misses, "run_arriving", failing)
        assert torch.equal(decode(model), wanted)
    assert left_out


def test_a_window_is_not_left_out(zoo: Zoo) -> None:
    """Caches that keep everything are masked by the window, which only the class's code knows of."""
    # Its attentions were made without one, and take what they are given.
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    model.config.sliding_window = 8
    with moert.patch(model, host_memory="100%"):
        assert count(model, BaseModelForward) == 0
        assert model.base_model.forward.__func__ is type(model.base_model).forward
    model.config.sliding_window = None
    with moert.patch(model, host_memory="100%"):
        assert count(model, BaseModelForward) == 1


def _scaled(forward: Any) -> Any:
    def run(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        return forward(self, inputs_embeds=self.embed_tokens(input_ids) * 2, **kwargs)

    return run


def _backwards(forward: Any) -> Any:
    def run(self: Any, **kwargs: Any) -> Any:
        layers = self._modules["layers"]
        self._modules["layers"] = nn.ModuleList(list(layers)[::-1])
        try:
            return forward(self, **kwargs)
        finally:
            self._modules["layers"] = layers

    return run


def _normed_twice(forward: Any) -> Any:
    def run(self: Any, **kwargs: Any) -> Any:
        out = forward(self, **kwargs)
        out.last_hidden_state = self.norm(out.last_hidden_state)
        return out

    return run


def _says_more(forward: Any) -> Any:
    def run(self: Any, **kwargs: Any) -> Any:
        out = forward(self, **kwargs)
        out["hidden_states"] = (out.last_hidden_state,)
        return out

    return run


def _moved_on(forward: Any) -> Any:
    def run(self: Any, position_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        if position_ids is None:
            position_ids = torch.tensor([[past_key_values.get_seq_length() + 1]])
        return forward(self, position_ids=position_ids, past_key_values=past_key_values, **kwargs)

    return run


@pytest.mark.parametrize(
    "other", [_scaled, _backwards, _normed_twice, _says_more, _moved_on], ids=lambda other: other.__name__
)
def test_classes_that_do_something_else(other: Any, zoo: Zoo) -> None:
    model = zoo.fresh("olmoe", torch.bfloat16)
    base = model.base_model
    kind = type(base)
    base.__class__ = type(kind.__name__, (kind,), {"forward": other(kind.forward), "__module__": kind.__module__})
    with moert.patch(model, host_memory="100%"):
        assert count(model, BaseModelForward) == 0
    base.__class__ = kind
    with moert.patch(model, host_memory="100%"):
        assert count(model, BaseModelForward) == 1


def test_looking_leaves_the_model_as_it_is(zoo: Zoo) -> None:
    model = zoo.fresh("olmoe", torch.bfloat16)
    with moert.patch(model, host_memory="100%"):
        base = model.base_model
        forward = base.__dict__.pop("forward")
        before, children = dict(vars(base)), dict(base._modules)
        assert isinstance(base_model_forward(base), BaseModelForward)
        assert dict(vars(base)) == before
        assert dict(base._modules) == children
        base.forward = forward


def test_unpatch_gives_the_class_back(zoo: Zoo) -> None:
    model = zoo.fresh("olmoe", torch.bfloat16)
    with moert.patch(model, host_memory="100%"):
        assert "forward" in vars(model.base_model)
    assert "forward" not in vars(model.base_model)


def test_positions_are_what_the_caller_says(patched: Any, counted: Counted) -> None:
    def at_places(model: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(PROMPT, past_key_values=cache)
            for place in (20, 3, 40):
                out = model(PROMPT[:, :1], past_key_values=cache, position_ids=torch.tensor([[place]]))
        logits: torch.Tensor = out.logits
        return logits

    wanted = by_the_class(patched, at_places)
    assert torch.equal(at_places(patched), wanted)
    assert counted.take() == 2
    assert base_model._PAST < 20
