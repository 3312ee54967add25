"""`moert.record`: what the trace says is what the experts were called with, in any way a model can be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SUPPORTED_FAMILIES, build, experts_modules, inputs_for, logits
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, StaticCache

import moert
from moert.errors import ConfigError, MoertError, UnsupportedModelError
from moert.hf.recorded_model import config_hash
from moert.trace.check import validate
from moert.trace.file import TraceFile
from moert.trace.recorder import Batch, Block, EndOfText, split_passes
from moert.trace.sequence import NO_EXPERT, LayerInfo, Phase, Sequence
from moert.trace.trace import Trace

WITHOUT_SCORES = ("phimoe", "zaya")
"""Their routers' weights do not follow from any module's output."""

UNEVEN = ("ernie4_5_vl_moe", "dots3_note+vl")
"""Each experts module runs some tokens only."""

OFTEN = ("olmoe", "gpt_oss", "deepseek_v3", "longcat_flash", "dbrx", "step3p7", "zaya", "gemma4", *UNEVEN)
RARELY = [pytest.param(family, marks=pytest.mark.slow) for family in SUPPORTED_FAMILIES if family not in OFTEN]

PROMPT = torch.tensor([[5, 17, 33, 8, 61, 44, 12]])


@pytest.fixture(scope="module")
def olmoe() -> Any:
    return build("olmoe")


class Spy:
    """An independent look at what experts modules are called with."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._hooks = [
            module.register_forward_pre_hook(lambda _, args, path=path: self._note(path, args))
            for path, module in experts_modules(model)
        ]

    def _note(self, path: str, args: Any) -> None:
        self.calls.append((path, args[1].clone(), args[2].clone()))

    def __enter__(self) -> Spy:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def events(self, num_experts: int) -> list[set[int]]:
        """What each call fetches."""
        found = []
        for _, ids, weights in self.calls:
            kept = (ids >= 0) & (ids < num_experts) & (weights != 0)
            found.append(set(ids[kept].tolist()))
        return [event for event in found if event]


def events_of(trace: Trace) -> list[set[int]]:
    """The trace's events: steps in order, layers in order."""
    found = []
    for step in sorted({int(step) for sequence in trace for step in sequence.steps}):
        for layer in range(len(trace.header.layers)):
            picks = [sequence.experts[sequence.steps == step, layer].ravel() for sequence in trace]
            found.append({int(expert) for expert in np.concatenate(picks) if expert != NO_EXPERT})
    return [event for event in found if event]


def check(trace: Trace) -> None:
    for sequence in trace:
        validate(sequence, trace.header)


@pytest.mark.parametrize("family", [family for family in SUPPORTED_FAMILIES if family in OFTEN] + RARELY)
def test_every_family(family: str) -> None:
    model = build(family)
    inputs = inputs_for(family, model)
    with_scores = family not in WITHOUT_SCORES

    def run() -> tuple[Trace, Spy]:
        with Spy(model) as spy, moert.record(model, scores=with_scores) as trace:
            logits(model, inputs)
        return trace, spy

    if family in UNEVEN:
        with pytest.warns(RuntimeWarning, match="its events are right, its tokens not"):
            trace, spy = run()
    else:
        trace, spy = run()
    check(trace)
    layers = {layer.name: layer for layer in trace.header.layers}
    num_experts = next(iter(layers.values())).num_experts
    assert sorted(map(sorted, events_of(trace))) == sorted(map(sorted, spy.events(num_experts)))
    if family not in (*UNEVEN, "diffusion_gemma", "qwen3_omni_moe", "qwen3_omni_moe+talker", "zaya", "longcat_flash"):
        assert len(trace) == 2
        for path, ids, weights in spy.calls:
            layer = list(layers).index(path)
            stacked = np.concatenate([sequence.experts[:, layer] for sequence in trace])
            assert (stacked == ids.numpy()).all(), "the order is the router's"
            kept = [sequence.weights[:, layer] for sequence in trace if sequence.weights is not None]
            assert np.concatenate(kept) == pytest.approx(weights.float().numpy(), abs=0)
    for sequence in trace:
        assert (sequence.scores is not None) == with_scores
        if sequence.scores is not None:
            ran = (sequence.experts != NO_EXPERT).any(-1)
            assert sequence.scores.sum(-1)[ran] == pytest.approx(1, abs=1e-3 if not family.startswith("longcat") else 1)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", WITHOUT_SCORES)
def test_scores_that_cannot_be_had_are_an_error(family: str) -> None:
    model = build(family)
    with pytest.raises(UnsupportedModelError, match="record without scores"), moert.record(model, scores=True):
        model(input_ids=PROMPT)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_scores_are_those_of_transformers() -> None:
    olmoe = build("olmoe")  # transformers leaves hooks of its own in it
    with moert.record(olmoe, scores=True) as trace, torch.no_grad():
        router_logits = olmoe(input_ids=PROMPT, output_router_logits=True).router_logits
    (sequence,) = trace
    assert sequence.scores is not None
    for layer, values in enumerate(router_logits):
        expected = torch.softmax(values.float(), dim=-1).numpy()
        assert sequence.scores[:, layer] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_loaded_or_neither_it_is_the_same_trace(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("olmoe", dtype=dtype)
    model.save_pretrained(tmp_path / "olmoe")

    def record(model: Any) -> Trace:
        with moert.record(model) as trace, torch.no_grad():
            model(input_ids=PROMPT)
        return trace

    first = record(model)
    with moert.patch(model, host_memory="50%"):
        patched = record(model)
    with moert.load(tmp_path / "olmoe", host_memory="50%", dtype=dtype) as loaded:
        from_disk = record(loaded)
    for trace in (patched, from_disk):
        assert (trace[0].experts[:, 0] == first[0].experts[:, 0]).all()
        assert trace.header.layers == first.header.layers
        assert trace.header.config_hash == first.header.config_hash != ""
    if dtype == torch.float32:
        assert (patched[0].experts == first[0].experts).all()
    assert from_disk.header.model == "olmoe"
    assert first.header.sampled is False
    assert first[0].phases.tolist() == [Phase.PREFILL] * 7
    assert first[0].token_ids is not None
    assert first[0].token_ids.tolist() == PROMPT[0].tolist()


def test_the_hash_is_of_what_decides_routing(olmoe: Any) -> None:
    config = OlmoeConfig(**olmoe.config.to_dict())
    same = config_hash(olmoe.config)
    config._name_or_path = "elsewhere"
    assert config_hash(config) == same
    config.num_experts_per_tok += 1
    assert config_hash(config) != same
    assert config_hash(None) == ""


def test_generation_is_one_sequence_with_the_tokens_that_were_fed(olmoe: Any) -> None:
    with Spy(olmoe) as spy, moert.record(olmoe) as trace:
        out = olmoe.generate(PROMPT, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0)
    check(trace)
    (sequence,) = trace
    assert sequence.token_ids is not None
    assert sequence.token_ids.tolist() == out[0, :-1].tolist(), "the last token is never fed"
    assert sequence.phases.tolist() == [Phase.PREFILL] * 7 + [Phase.DECODE] * 8
    assert sequence.steps.tolist() == [0] * 7 + list(range(1, 9))
    assert events_of(trace) == spy.events(8)
    assert trace.header.sampled is True


def test_padding_on_either_side_and_text_that_has_ended(olmoe: Any) -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]])
    with moert.record(olmoe) as trace:
        olmoe(input_ids=ids.flip(1), attention_mask=(ids != 0).long().flip(1), use_cache=False)
    assert [sequence.phases.tolist() for sequence in trace] == [[0, 0, 2, 2], [0] * 4, [0] * 4]

    free = olmoe.generate(ids[1:2], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)[0, 4:]
    end = int(free[2])
    before = olmoe.generation_config.eos_token_id, olmoe.generation_config.pad_token_id
    olmoe.generation_config.eos_token_id, olmoe.generation_config.pad_token_id = end, 0
    try:
        with moert.record(olmoe) as trace:
            out = olmoe.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=8, do_sample=False)
    finally:
        olmoe.generation_config.eos_token_id, olmoe.generation_config.pad_token_id = before
    check(trace)
    for row, sequence in enumerate(trace):
        fed = out[row, :-1].tolist()
        ended = next((place for place in range(4, len(fed)) if fed[place] == end), len(fed))
        expected = [Phase.PADDING if token == 0 else Phase.PREFILL for token in ids[row].tolist()]
        expected += [Phase.DECODE if place <= ended else Phase.PADDING for place in range(4, len(fed))]
        assert sequence.phases.tolist() == expected
    assert Phase.PADDING in trace[1].phases[4:], "nothing was tested"


def test_a_cache_that_begins_anew_begins_a_sequence(olmoe: Any) -> None:
    with moert.record(olmoe) as trace, torch.no_grad():
        olmoe.generate(PROMPT, max_new_tokens=3, do_sample=False, pad_token_id=0)
        olmoe.generate(PROMPT[:, :4], max_new_tokens=4, use_cache=False, do_sample=False, pad_token_id=0)
        first = olmoe(input_ids=PROMPT[:, :3])
        second = olmoe(input_ids=PROMPT[:, :2], use_cache=True)
        olmoe(input_ids=PROMPT[:, 3:], past_key_values=first.past_key_values)
        olmoe(input_ids=PROMPT[:, 2:3], past_key_values=second.past_key_values)
    check(trace)
    decoded = [[int(phase == Phase.DECODE) for phase in sequence.phases] for sequence in trace]
    # Without a cache each pass runs all of the text again; the last two go on in turn, the first one with a prompt.
    assert decoded == [[0] * 7 + [1] * 2, [0] * 4, [0] * 5, [0] * 6, [0] * 7, [0] * 7, [0, 0, 1]]
    assert trace[-2].steps.tolist() == [7, 7, 7, 9, 9, 9, 9]
    assert trace[-1].steps.tolist() == [8, 8, 10]


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 3},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(olmoe: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ids = PROMPT.repeat(1, 2)
    with Spy(olmoe) as spy, moert.record(olmoe) as trace:
        out = olmoe.generate(
            ids, **{"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
        )
    check(trace)
    assert events_of(trace) == spy.events(8)
    rows = options.get("num_beams", options.get("num_return_sequences", 1))
    assert len(trace) == rows
    for sequence in trace:
        assert sequence.phases[:14].tolist() == [Phase.PREFILL] * 14
        assert set(sequence.phases[17:].tolist()) == {Phase.DECODE}
    if "prompt_lookup_num_tokens" in options:
        assert len(trace[0].steps) > 14 + 7, "rejected drafts were routed too"
    else:
        assert len(trace[0].steps) == 14 + 7
    if "num_beams" not in options and "prompt_lookup_num_tokens" not in options:
        for row, sequence in enumerate(trace):
            assert sequence.token_ids is not None
            assert sequence.token_ids.tolist() == out[row, :-1].tolist()


def test_left_padding_is_known_with_a_static_cache_too(olmoe: Any) -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    with moert.record(olmoe) as trace, torch.no_grad():
        cache = StaticCache(config=olmoe.config, max_cache_len=32)
        olmoe.generate(
            ids,
            attention_mask=(ids != 0).long(),
            past_key_values=cache,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            disable_compile=True,
        )
    assert trace[0].phases.tolist() == [2, 2, 0, 0, 1, 1]
    assert trace[1].phases.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_layer_that_runs_twice_makes_two_steps() -> None:
    model = build("olmoe")
    model.model.layers[1] = model.model.layers[0]
    with Spy(model) as spy, moert.record(model) as trace, torch.no_grad():
        model(input_ids=PROMPT, use_cache=False)
    check(trace)
    assert trace[0].steps.tolist() == [0] * 7 + [1] * 7
    assert (trace[0].experts[7:, 0] != NO_EXPERT).all()
    assert events_of(trace) == spy.events(8)
    assert trace[0].phases.tolist() == [Phase.PREFILL] * 14


def test_parts_of_a_model_that_run_by_themselves(olmoe: Any) -> None:
    experts = olmoe.model.layers[0].mlp.experts
    hidden = torch.zeros(3, olmoe.config.hidden_size)
    ids = torch.tensor([[1, 2], [3, 8], [2, 2]])
    weights = torch.tensor([[0.5, 0.0], [0.25, 0.5], [0.5, 0.25]])
    with moert.record(olmoe) as trace, torch.no_grad():
        olmoe.model(input_ids=PROMPT)
        experts(hidden, ids, weights)
        experts(hidden[:0], ids[:0], weights[:0])
    check(trace)
    assert len(trace) == 2
    assert trace[1].experts[:, 0, :2].tolist() == [[1, -1], [3, -1], [2, -1]]
    assert trace[1].weights is not None
    assert trace[1].weights[:, 0, :2].tolist() == [[0.5, 0], [0.25, 0], [0.75, 0]]
    assert (trace[1].experts[:, 1:] == NO_EXPERT).all()


def test_recordings_may_be_nested_and_leave_nothing(olmoe: Any) -> None:
    with moert.record(olmoe) as outer:
        olmoe(input_ids=PROMPT)
        with moert.record(olmoe, weights=False) as inner:
            olmoe(input_ids=PROMPT)
    assert (len(outer), len(inner)) == (2, 1)
    assert (outer[1].experts == inner[0].experts).all()
    assert inner[0].weights is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in olmoe.modules())


def test_nothing_recorded_is_an_empty_trace(olmoe: Any) -> None:
    with moert.record(olmoe) as trace:
        pass
    assert len(trace) == 0
    assert trace.header.sampled is None
    assert [layer.top_k for layer in trace.header.layers] == [2] * len(trace.header.layers)


def test_patching_within_a_recording_is_refused() -> None:
    model = build("olmoe")
    with pytest.raises(MoertError, match="patch or unpatch the model before or after"), moert.record(model):
        moert.patch(model)
    with pytest.raises(MoertError, match="patch or unpatch"), moert.record(model):
        model(moert.unpatch(model).dummy_inputs["input_ids"])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_file_is_the_same_trace_and_nothing_is_left_after_an_error(olmoe: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    with moert.record(olmoe) as trace, moert.record(olmoe, path, scores=True) as empty:
        for n in (4, 7):
            olmoe.generate(PROMPT[:, :n], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert not list(tmp_path.iterdir()), "a half-written file has no name"
    assert len(empty) == 0
    with TraceFile(path) as file:
        assert file.header == trace.header == empty.header
        for one, other in zip(file, trace, strict=True):
            assert (one.experts == other.experts).all()
            assert (one.steps == other.steps).all()
            assert (one.weights == other.weights).all()
            assert one.scores is not None
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), moert.record(olmoe, path):
        olmoe(input_ids=torch.full((1, olmoe(input_ids=PROMPT).logits.shape[1] // 0), 1))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="in a folder that exists"), moert.record(olmoe, tmp_path / "no" / "t"):
        pass
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in olmoe.modules())


def test_long_recordings_are_put_in_order_piece_by_piece(olmoe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Trace:
        with moert.record(olmoe, scores=True) as trace:
            for ids in (PROMPT, PROMPT[:, :3].repeat(2, 1)):
                olmoe.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        return trace

    whole = run()
    monkeypatch.setattr("moert.hf.recording.HELD_FORWARDS", 2)
    for one, other in zip(run(), whole, strict=True):
        for name in ("experts", "weights", "scores", "steps", "phases", "token_ids"):
            assert (getattr(one, name) == getattr(other, name)).all(), name


def test_a_dense_model_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="no experts modules"), moert.record(LlamaForCausalLM(config)):
        pass


def test_a_model_that_uses_its_ids_again_cannot_be_recorded() -> None:
    model = OlmoeForCausalLM._from_config(build("olmoe").config)
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_hook(lambda _, args, output: output + 0 * args[1].zero_().sum())
    with pytest.raises(MoertError, match="cannot be recorded"), moert.record(model), torch.no_grad():
        model(input_ids=PROMPT)
    hook.remove()
    # Afterwards it may.
    kept: list[torch.Tensor] = []
    hook = experts.register_forward_pre_hook(lambda _, args: kept.append(args[1]))
    with Spy(model) as spy, moert.record(model) as trace, torch.no_grad():
        model(input_ids=PROMPT)
        kept[0].zero_()
    hook.remove()
    assert events_of(trace) == spy.events(8)


LAYERS = (LayerInfo("a", 4, 2), LayerInfo("b", 4, 2))


def one(ids: Any, weights: Any, **options: Any) -> Sequence:
    batch = Batch(1)
    arrays = (np.array(values)[None] for values in (ids, weights))
    phase = options.pop("phase", Phase.PREFILL)
    batch.add(Block([0, 1], *arrays, None, list(range(len(ids))), phase, **options), LAYERS)
    (sequence,) = batch.finish(3, EndOfText(frozenset({9}), 0))
    return sequence


def test_picks_that_fetch_nothing_are_left_out() -> None:
    sequence = one([[[0, 1, 2], [4, -1, 3]]], [[[0.0, 0.5, 0.25], [0.5, 0.5, 0.125]]])
    assert sequence.experts.tolist() == [[[1, 2, -1], [3, -1, -1]]]
    assert sequence.weights is not None
    assert sequence.weights.tolist() == [[[0.5, 0.25, 0], [0.125, 0, 0]]]


def test_what_follows_the_end_of_a_text_is_padding() -> None:
    ids = np.ones((5, 2, 1), dtype=int)
    token_ids = np.array([[0, 9, 0, 0, 5]])
    phases = one(ids, ids / 2, phase=Phase.DECODE, token_ids=token_ids).phases.tolist()
    assert phases == [Phase.DECODE, Phase.DECODE, Phase.PADDING, Phase.PADDING, Phase.DECODE]
    assert set(one(ids, ids / 2, token_ids=token_ids).phases.tolist()) == {Phase.PREFILL}


def test_passes_end_where_a_layer_comes_again() -> None:
    assert split_passes([0, 1, 2]) == [slice(0, 3)]
    assert split_passes([0, 1, 0, 1, 1]) == [slice(0, 2), slice(2, 4), slice(4, 5)]
