"""Several threads that call one model whose single tokens a device runs by itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import planned_support
import pytest
import torch
import triton_support
from planned_support import LAYERS, make, tier_of
from transformers import StaticCache

import moert
from moert.hf import loading
from moert.hf.model import runtime_of
from moert.runtime.device_ways import PLANNED

pytestmark = [
    pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU"),
    pytest.mark.timeout(300),
]

PROMPT = torch.tensor([[5, 9, 7, 2]])
TOKENS = {1: range(20, 24), 2: range(31, 35)}


def decode(model: Any, tokens: Any) -> list[torch.Tensor]:
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.inference_mode():
        found = [model(PROMPT, past_key_values=cache).logits[:, -1:]]
        return found + [model(torch.tensor([[token]]), past_key_values=cache).logits for token in tokens]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(folder: Path) -> Iterator[Callable[..., Any]]:
    models = []

    def load(**options: Any) -> Any:
        config, device, rest = planned_support.settings(**options)
        models.append(loading.load(folder, config, None, device=device, device_options=rest))
        return models[-1]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield load
    sys.setswitchinterval(before)
    for model in models:
        moert.close(model)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[int, list[torch.Tensor]]:
    """By a thread alone, as the host decides."""
    config, device, rest = planned_support.settings(host_memory="50%", planned=False)
    model = loading.load(folder, config, None, device=device, device_options=rest)
    found = {thread: decode(model, tokens) for thread, tokens in TOKENS.items()}
    moert.close(model)
    return found


def at_once(*works: Callable[[], object]) -> None:
    """Raises what any of them raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("host_memory", ["50%", "100%"])
def test_each_gets_its_own_tokens(host_memory: str, wanted: Any, loaded: Callable[..., Any]) -> None:
    """Passes that may be void, and prompts in between, beside another's that are not to be noticed."""
    model, found = loaded(host_memory=host_memory), {}

    def work(thread: int) -> Callable[[], object]:
        return lambda: found.setdefault(thread, decode(model, TOKENS[thread]))

    at_once(*map(work, TOKENS))
    for thread, right in wanted.items():
        for place, (got, expected) in enumerate(zip(found[thread], right, strict=True)):
            assert torch.equal(got, expected), f"token {place} of thread {thread}"
    tier = tier_of(model)
    assert tier.counts.ways[PLANNED] == LAYERS * sum(map(len, TOKENS.values()))
    if host_memory == "50%":
        assert moert.stats(model).decoding.repeated
    tier.settle()
    tier.check_integrity()


def test_one_pass_at_a_time(loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From its beginning to the question whether it was void."""
    model = loaded(host_memory="50%")
    runtime, within, most = runtime_of(model), [0], [0]
    begin, is_void = runtime.begin_planned, runtime.is_void

    def begins(*given: Any) -> bool:
        within[0] += 1
        most[0] = max(most[0], within[0])
        return begin(*given)

    def ends() -> bool:
        within[0] -= 1
        return is_void()

    monkeypatch.setattr(runtime, "begin_planned", begins)
    monkeypatch.setattr(runtime, "is_void", ends)
    at_once(*(lambda tokens=tokens: decode(model, tokens) for tokens in TOKENS.values()))
    assert most == [1]


def test_host_memory_that_another_thread_changes_before_a_replay(
    wanted: Any, loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph would read from where experts have been."""
    model = loaded(host_memory="100%")
    for layer in range(LAYERS):
        for expert in range(planned_support.EXPERTS):
            runtime_of(model).weights(layer, expert)
    forward, tier = vars(model)["forward"], tier_of(model)
    cache = StaticCache(config=model.config, max_cache_len=24)
    found = []
    begin = runtime_of(model).begin_planned
    changes = []

    def begins(*given: Any) -> bool:
        is_planned = begin(*given)
        if forward._pass is not None and not changes:
            changes.append(forward.replayed)
            at_once(lambda: moert.resize(model, host_memory="75%"))
            assert not tier.is_planning
        return is_planned

    monkeypatch.setattr(runtime_of(model), "begin_planned", begins)
    replay = runtime_of(model).replay
    is_replayed: list[bool] = []

    def replays(graph: Any) -> bool:
        is_replayed.append(replay(graph))
        return is_replayed[-1]

    monkeypatch.setattr(runtime_of(model), "replay", replays)
    with torch.inference_mode():
        found = [model(PROMPT, past_key_values=cache).logits[:, -1:]]
        found += [model(torch.tensor([[token]]), past_key_values=cache).logits for token in TOKENS[1]]
    assert changes == [1] and is_replayed[:2] == [True, False]
    assert all(torch.equal(got, right) for got, right in zip(found, wanted[1], strict=True))
    tier.settle()
    tier.check_integrity()
