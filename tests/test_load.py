"""What `moert.load` and its relatives promise, beyond the same tokens."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeForCausalLM

import moert
from moert.hf.model import runtime_of

IDS = torch.arange(3, 40).remainder(100)[None]
STATS_KEYS = {"hits", "misses", "hit_rate", "bytes_read", "read_s", "stall_s", "compute_s", "resident_bytes"}


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def plain(tiny_olmoe: Path) -> torch.Tensor:
    """Logits of plain transformers."""
    return logits(OlmoeForCausalLM.from_pretrained(tiny_olmoe, experts_implementation="eager"))


def test_the_hf_way_is_the_same(tiny_olmoe: Path, plain: torch.Tensor) -> None:
    config = moert.OffloadConfig(host_memory="25%")
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe, quantization_config=config)
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-6)
    assert moert.stats(model).misses > 0
    assert not hasattr(model.config, "quantization_config"), "a saved config.json would not load without moert"
    moert.close(model)


def test_other_keywords_go_to_huggingface(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe, host_memory="25%", dtype=torch.bfloat16, attn_implementation="eager") as model:
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"
        assert logits(model).dtype == torch.bfloat16
        assert moert.stats(model).expert_bytes == 2 * 8 * 3 * 64 * 32 * 2
    model, info = moert.load(tiny_olmoe, host_memory="25%", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    moert.close(model)
    with pytest.raises((TypeError, ValueError)):
        moert.load(tiny_olmoe, host_memory="25%", no_such_keyword=1)


def test_cache_dir_is_where_models_of_the_hub_are(tiny_olmoe: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--somebody--olmoe" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_olmoe, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    with moert.load("somebody/olmoe", cache_dir=tmp_path, local_files_only=True, host_memory="25%") as model:
        assert moert.stats(model).expert_bytes > 0


def test_what_is_given_to_the_wrong_one_of_load_and_patch(tiny_olmoe: Path) -> None:
    with pytest.raises(TypeError, match=r"in memory, not 'a/path'; moert\.load takes a folder"):
        moert.patch("a/path", host_memory="25%")
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    with pytest.raises(TypeError, match=r"not a OlmoeForCausalLM; moert\.patch takes a model in memory"):
        moert.load(model, host_memory="25%")


def test_a_misspelt_option_is_named(tiny_olmoe: Path) -> None:
    with pytest.raises(moert.ConfigError, match="'host_memroy'; did you mean 'host_memory'"):
        moert.load(tiny_olmoe, host_memroy="25%")


def test_unpatched_within_the_with_statement(tiny_olmoe: Path) -> None:
    with moert.patch(OlmoeForCausalLM.from_pretrained(tiny_olmoe), host_memory="25%") as model:
        moert.unpatch(model)
    with moert.load(tiny_olmoe, host_memory="25%") as model:
        moert.unpatch(model)
    with pytest.raises(moert.MoertError, match="no offloaded experts"):
        moert.stats(model)


def test_cast_on_load_is_the_cast_of_transformers(tiny_olmoe: Path) -> None:
    """fp32 files, bf16 model: every expert is converted on its way into a slot."""
    plain = OlmoeForCausalLM.from_pretrained(tiny_olmoe, dtype=torch.bfloat16)
    model = moert.unpatch(moert.load(tiny_olmoe, host_memory="25%", dtype=torch.bfloat16))
    for (name, a), (other, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_stats_add_up(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe, host_memory="50%", predictor="none") as model:
        assert moert.stats(model).hit_rate == 0.0
        logits(model)
        logits(model, IDS[:, :1])
        stats = moert.stats(model).as_dict()
        assert stats.keys() >= STATS_KEYS
        assert [layer["name"] for layer in stats["layers"]] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
        for key in ("hits", "misses", "bytes_read", "resident_bytes"):
            assert stats[key] == sum(layer[key] for layer in stats["layers"]), key
        assert all(layer.keys() >= STATS_KEYS for layer in stats["layers"])
        one_expert = 3 * 64 * 32 * 4
        assert stats["resident_bytes"] == 2 * 4 * one_expert
        assert stats["bytes_read"] >= stats["misses"] * one_expert
        assert stats["hit_rate"] == stats["hits"] / (stats["hits"] + stats["misses"])
        moert.reset_stats(model)
        again = moert.stats(model)
        assert (again.hits, again.misses, again.bytes_read, again.read_s) == (0, 0, 0, 0.0)
        assert again.resident_bytes == stats["resident_bytes"]


def test_hits_and_misses_are_those_of_the_routing(tiny_olmoe: Path) -> None:
    """Against a count from transformers' own router logits and a cache written down by hand."""
    with moert.load(tiny_olmoe, host_memory="50%", policy="lru", predictor="none") as model:
        hits = misses = 0
        caches: list[list[int]] = [[], []]
        for start in range(16):
            ids = IDS[:, start * 2 : start * 2 + 2]  # at most 4 experts, which is all the slots
            with torch.no_grad():
                routers = model(ids, output_router_logits=True).router_logits
            for cache, router in zip(caches, routers, strict=True):
                event = sorted(set(router.topk(2, dim=-1).indices.flatten().tolist()))
                hits += sum(expert in cache for expert in event)
                misses += sum(expert not in cache for expert in event)
                for expert in [e for e in event if e in cache]:
                    cache.remove(expert)
                    cache.append(expert)
                missing = [e for e in event if e not in cache]
                while len(cache) + len(missing) > 4:
                    cache.remove(next(e for e in cache if e not in event))
                cache.extend(missing)
        stats = moert.stats(model)
        assert (stats.hits, stats.misses) == (hits, misses)


@pytest.mark.parametrize(("preload", "budget", "resident"), [(None, "100%", 16), (True, "50%", 8), (False, "100%", 0)])
def test_preload_fills_the_slots(preload: bool | None, budget: str, resident: int, tiny_olmoe: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = moert.load(
        tiny_olmoe, host_memory=budget, preload=preload, progress=lambda done, total: calls.append((done, total))
    )
    one_expert = 3 * 64 * 32 * 4
    assert moert.stats(model).resident_bytes == resident * one_expert
    assert calls == [(n * one_expert, resident * one_expert) for n in range(1, resident + 1)]
    moert.close(model)


def test_default_budget_keeps_all_of_a_small_model(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe) as model:
        logits(model)
        stats = moert.stats(model)
        assert stats.misses == 0
        assert stats.resident_bytes == stats.expert_bytes


def test_policy_of_ones_own_runs_live(tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first_out.py").write_text(
        "from moert.policies import Policy\n"
        "class FirstOut(Policy):\n"
        "    def __init__(self, capacity):\n"
        "        super().__init__(capacity)\n"
        "        self.queue = []\n"
        "    def access(self, event): pass\n"
        "    def admit(self, expert): self.queue.append(expert)\n"
        "    def evict(self, expert): self.queue.remove(expert)\n"
        "    def victim(self, locked): return next(e for e in self.queue if e not in locked)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outputs = []
    for policy in ("lru", "first_out:FirstOut"):
        with moert.load(tiny_olmoe, host_memory="25%", policy=policy, debug=True) as model:
            outputs.append(model.generate(IDS, max_new_tokens=12, do_sample=False))
            outputs.append(logits(model))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_two_threads_get_the_right_answers(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe, host_memory="25%") as model:
        inputs = [IDS[:, :7], IDS[:, 5:30]]
        wanted = [logits(model, ids) for ids in inputs]
        right: list[bool] = []

        def work(which: int) -> None:
            right.extend(torch.equal(logits(model, inputs[which]), wanted[which]) for _ in range(8))

        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert right == [True] * 16


def test_copying_and_pickling_are_refused(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe, host_memory="25%") as model:
        with pytest.raises(moert.MoertError, match="cannot be copied"):
            copy.deepcopy(model)
        with pytest.raises(moert.MoertError, match="cannot be pickled"):
            pickle.dumps(model)
        logits(model)


def test_model_looks_like_itself(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe, host_memory="25%") as model:
        assert isinstance(model, OlmoeForCausalLM)
        assert type(model).__name__ == "OlmoeForCausalLM"
        assert "OffloadedExperts" in repr(model)
        assert "OlmoeExperts, 8 experts, layer 1" in repr(model)
        assert not [name for name in model.state_dict() if ".experts." in name]


def test_unpatched_loaded_model_is_the_plain_one(tiny_olmoe: Path, plain: torch.Tensor, tmp_path: Path) -> None:
    model = moert.load(tiny_olmoe, host_memory="25%")
    logits(model)
    moert.unpatch(model)
    assert type(model) is OlmoeForCausalLM
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "saved", experts_implementation="eager")
    assert torch.equal(logits(again), plain)


def test_forked_child_is_told(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe, host_memory="100%") as model:
        logits(model)
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                # Not a forward: torch's thread pool does not survive a fork either, and would hang here.
                runtime_of(model).weights(0, 0)
                os.write(write_end, b"ran")
            except moert.MoertError as error:
                os.write(write_end, str(error).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        assert os.waitpid(child, 0)[1] == 0
        with os.fdopen(read_end) as answer:
            assert "load the model in the process that runs it" in answer.read()
        assert logits(model).isfinite().all()
