"""A cache put back to what it held before a pass that did not get to its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from moert.hf import cache_mark
from moert.hf.cache_mark import CacheMark

LAYERS, WINDOW, LENGTH = 3, 6, 32

KINDS: dict[str, Callable[[], Any]] = {
    "growing": DynamicLayer,
    "growing window": lambda: DynamicSlidingWindowLayer(sliding_window=WINDOW),
    "fixed": lambda: StaticLayer(max_cache_len=LENGTH),
    "fixed window": lambda: StaticSlidingWindowLayer(max_cache_len=LENGTH, sliding_window=WINDOW),
}


def caches(kind: str) -> Cache:
    cache = object.__new__(StaticCache if "fixed" in kind else DynamicCache)
    Cache.__init__(cache, layers=[KINDS[kind]() for _ in range(LAYERS)])
    return cache


def run(cache: Cache, tokens: int, seed: int, until: int = LAYERS, *, torn: bool = False) -> list[torch.Tensor]:
    """What attention of each layer sees in a pass, which ends before layer `until` or in the middle of it."""
    numbers = torch.Generator().manual_seed(seed)
    seen: list[torch.Tensor] = []
    for layer in cache.layers[: until + torn]:
        keys, values = torch.rand(2, 2, 3, tokens, 4, generator=numbers)
        if torn and len(seen) == 2 * until:
            tear(layer, keys, values)
        else:
            seen += [tensor.clone() for tensor in layer.update(keys, values)]
    return seen


def tear(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Keys come, values do not."""
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
        if isinstance(layer, DynamicLayer):
            layer.keys = keys
    else:
        with pytest.raises(RuntimeError):
            layer.update(keys, values[..., :3])


def held(cache: Cache) -> list[Any]:
    return [(layer.keys, layer.values, int(layer.get_seq_length())) for layer in cache.layers]


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize("before", [0, 1, 3, WINDOW - 1, WINDOW, WINDOW + 2])
@pytest.mark.parametrize("tokens", [1, 2, WINDOW + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_run_again_sees_and_leaves_the_same(kind: str, tokens: int, before: int, torn: bool) -> None:
    for until in range(LAYERS + 1 - torn):
        cache, right = caches(kind), caches(kind)
        for one in (cache, right):
            for seed in range(before):
                run(one, 1, seed)
        mark = CacheMark(cache, tokens)
        for _ in range(2):
            run(cache, tokens, 100, until, torn=torn)
            assert mark.can_return
            mark.go_back()
        for seed in (101, 102):
            for got, wanted in zip(run(cache, tokens, seed), run(right, tokens, seed), strict=True):
                assert torch.equal(got, wanted)
        for got_layer, wanted_layer in zip(held(cache), held(right), strict=True):
            assert got_layer[2] == wanted_layer[2]
            assert torch.equal(got_layer[0], wanted_layer[0])
            assert torch.equal(got_layer[1], wanted_layer[1])


def test_how_many_tokens_come_is_not_known() -> None:
    cache, right = caches("fixed window"), caches("fixed window")
    for one in (cache, right):
        run(one, 4, 0)
    mark = CacheMark(cache, None)
    run(cache, 5, 1)
    mark.go_back()
    for got, wanted in zip(run(cache, 5, 2), run(right, 5, 2), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["growing window", "fixed window"])
def test_large_windows_are_not_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = caches(kind)
    run(cache, WINDOW, 0)
    nbytes = sum(one.untyped_storage().nbytes() for layer in cache.layers for one in (layer.keys, layer.values))
    monkeypatch.setattr(cache_mark, "MOST_WINDOW_BYTES", nbytes)
    assert CacheMark(cache, 1).can_return
    monkeypatch.setattr(cache_mark, "MOST_WINDOW_BYTES", nbytes - 1)
    assert not CacheMark(cache, 1).can_return


def test_layers_that_nobody_knows_and_those_that_others_put_there() -> None:
    class Layer(StaticLayer):
        pass

    cache = caches("fixed")
    mark = CacheMark(cache, 1)
    assert mark.can_return
    cache.layers[1] = StaticLayer(max_cache_len=LENGTH)
    assert not mark.can_return
    cache.layers[1] = Layer(max_cache_len=LENGTH)
    assert not CacheMark(cache, 1).can_return


def test_a_window_whose_gradient_is_wanted_is_not_put_back() -> None:
    cache = caches("fixed window")
    run(cache, 2, 0)
    cache.layers[0].keys = cache.layers[0].keys.clone().requires_grad_()
    assert not CacheMark(cache, WINDOW).can_return
