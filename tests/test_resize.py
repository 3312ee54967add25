"""`moert.resize`: another amount of host memory while the model lives, and not another bit in what it computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import resident_bytes
from resize_support import IDS, check, logits
from transformers import LogitsProcessorList, OlmoeConfig, OlmoeForCausalLM

import moert
from moert.hf.model import runtime_of
from moert.runtime import runtime as runtime_module
from moert.runtime.sizing import HostSizing

MIB = 1 << 20
ONE_EXPERT = 3 * 64 * 32 * 4


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLMoE with 96 MiB of experts in 32 experts of 3 MiB."""
    folder = tmp_path_factory.mktemp("medium")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=128,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("debug", [False, True])
def test_generation_goes_on_as_if_nothing_had_happened(offloaded: Callable[..., Any], debug: bool) -> None:
    model = offloaded(host_memory="99%", debug=debug)

    def generate(sizes: dict[int, str]) -> Any:
        step = 0

        def change(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            nonlocal step
            step += 1
            if step in sizes:
                moert.resize(model, sizes[step])
                check(model)
            return scores

        return model.generate(
            IDS,
            max_new_tokens=200,
            min_new_tokens=200,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([change]),
        )

    want = generate({})
    misses = moert.stats(model).misses
    got = generate({40: "25%", 80: "60%", 90: "99%", 120: "30%", 150: "99%"})
    assert want.sequences.shape == (1, IDS.shape[1] + 200)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    assert moert.stats(model).misses > 2 * misses, "the small budgets would have shown"


def test_what_it_returns_is_what_there_is(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe, host_memory="100%") as model:
        full = moert.stats(model).slot_bytes
        resized = moert.resize(model, "25%")
        assert resized.slots == (2, 2)
        assert resized.slots_before == (8, 8)
        assert resized.slot_bytes == moert.stats(model).slot_bytes == full // 4
        assert resized.slot_bytes_before == full
        assert resized.evicted == 12
        assert moert.stats(model).resident_bytes == 4 * ONE_EXPERT
        check(model)
        assert moert.resize(model, full // 2).slots == (4, 4)
        assert moert.resize(model, full // 2).slots_before == (4, 4)
        check(model)
        resized = moert.resize(model)
        assert resized.slots == (8, 8), "by default as much as load would take: all of it"
        assert (resized.evicted, resized.moved) == (0, 0)
        assert moert.stats(model).resident_bytes == 4 * ONE_EXPERT, "new slots are filled as they are needed"
        assert moert.stats(model).shrinks == 0, "those are counted that nobody asked for"


def test_who_stays_is_the_policys_choice_and_is_not_read_again(tiny_olmoe: Path) -> None:
    plain = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    with moert.load(tiny_olmoe, host_memory="100%", debug=True) as model:
        runtime = runtime_of(model)
        for expert in (6, 1, 7):
            for layer in range(2):
                runtime.weights(layer, expert)
        resized = moert.resize(model, "40%")
        assert resized.slots == (3, 3)
        assert resized.moved == 4, "6 and 7 were in the slots of their numbers"
        read = moert.stats(model).bytes_read
        for layer in range(2):
            assert [e.expert for e in runtime.layers[layer].residency.residents] == [1, 6, 7]
            experts = plain.model.layers[layer].mlp.experts
            for expert in (1, 6, 7):
                for name, tensor in runtime.weights(layer, expert).items():
                    assert torch.equal(tensor, getattr(experts, name)[expert]), (layer, expert, name)
        assert moert.stats(model).bytes_read == read
        moert.resize(model, "90%")
        assert torch.equal(runtime.weights(1, 0)["down_proj"], plain.model.layers[1].mlp.experts.down_proj[0])


@pytest.mark.parametrize("family", ["gpt_oss", "dbrx", "qwen3_moe"])
def test_other_ways_to_compute(family: str, load: Callable[..., Any]) -> None:
    model = load(family, host_memory="100%", debug=True)
    ids = IDS[:, :12].remainder(50)
    want = logits(model, ids)
    for size in ("50%", "100%", "60%"):
        moert.resize(model, size)
        assert torch.equal(logits(model, ids), want)
        check(model)


def test_memory_falls_and_comes_back(medium: Path) -> None:
    with moert.load(medium, host_memory="100%") as model:
        want = logits(model)
        full = resident_bytes()
        assert moert.stats(model).slot_bytes >= 96 * MIB
        moert.resize(model, "25%")
        assert full - resident_bytes() > 64 * MIB
        check(model)
        assert torch.equal(logits(model), want)
        moert.resize(model, "100%")
        assert abs(resident_bytes() - full) < 16 * MIB
        check(model)
        assert torch.equal(logits(model), want)
        moert.resize(model, "12.5%")
        arena = runtime_of(model)._tier.arena  # type: ignore[union-attr]
    assert arena.closed
    assert full - resident_bytes() > 80 * MIB


def test_unpatch_after_resize_gives_the_same_model(tiny_olmoe: Path) -> None:
    plain = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    with moert.patch(model, host_memory="50%"):
        logits(model)
        moert.resize(model, "25%")
        logits(model)
        moert.resize(model, "75%")
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_while_another_thread_generates(tiny_olmoe: Path) -> None:
    sizes = ["25%", "100%", "37.5%", "50%", "99%", "26%", "75%"]
    with moert.load(tiny_olmoe, host_memory="50%", debug=True) as model:
        want = model.generate(IDS, max_new_tokens=60, do_sample=False)
        done, results, errors = threading.Event(), [], []

        def generate() -> None:
            try:
                while not done.is_set() or not results:
                    results.append(model.generate(IDS, max_new_tokens=60, do_sample=False))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=generate)
        thread.start()
        try:
            for turn in range(150):
                moert.resize(model, sizes[turn % len(sizes)])
        finally:
            done.set()
            thread.join()
        assert not errors, errors
        assert all(torch.equal(result, want) for result in results)
        check(model)


def test_resize_waits_for_the_step(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moert.load(tiny_olmoe, host_memory="100%") as model:
        in_step, go_on, order = threading.Event(), threading.Event(), []
        run_step = runtime_module.run_step

        def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
            in_step.set()
            assert go_on.wait(10)
            order.append("step")
            return run_step(*args, **kwargs)

        resize = HostSizing._resize

        def noted(*args: Any) -> Any:
            order.append("resize")
            return resize(*args)

        monkeypatch.setattr(runtime_module, "run_step", slow)
        monkeypatch.setattr(HostSizing, "_resize", noted)
        threads = [threading.Thread(target=logits, args=(model,))]
        threads[0].start()
        assert in_step.wait(10)
        threads.append(threading.Thread(target=moert.resize, args=(model, "25%")))
        threads[1].start()
        threads[1].join(0.2)
        assert threads[1].is_alive()
        assert order == []
        go_on.set()
        for thread in threads:
            thread.join()
        assert order[0] == "step"
        assert "resize" in order


def test_debug_fills_a_slot_with_nan_before_it_is_used_again(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that came with a resize: its zeros would not be noticed."""
    with moert.load(tiny_olmoe, host_memory="25%", debug=True) as model:
        logits(model)
        moert.resize(model, "100%")
        layer: Any = runtime_of(model).layers[0]
        poisoned: list[int] = []
        poison = layer._bank.poison
        monkeypatch.setattr(layer._bank, "poison", lambda slot: (poisoned.append(slot), poison(slot)))
        logits(model)
        assert set(poisoned) >= {2, 3}
