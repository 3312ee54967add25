"""Sizes that cannot be, memory that is not there, and a resize at a bad moment: the model is as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resize_support import check, logits
from transformers import OlmoeForCausalLM

import moert
from moert import _C
from moert.hf.model import runtime_of
from moert.runtime import host_tier
from moert.runtime import sizing as sizing_module
from moert.tiers import arena as arena_module
from moert.tiers.memory import MemoryLimit, MemoryReport

MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        ("lots", moert.ConfigError, "host_memory='lots' is not a size"),
        (0, moert.ConfigError, "host_memory=0 must be a positive"),
        ("10%", moert.CapacityError, 'keeps 0 of 8 experts .* one token needs 2; give at least "25%"'),
        ("90KB", moert.CapacityError, r"host_memory is 87\.9 KiB .* (128|96)\.0 KiB"),
    ],
)
def test_a_budget_that_cannot_be_changes_nothing(
    size: int | str, error: type[Exception], message: str, offloaded: Callable[..., Any]
) -> None:
    model = offloaded(host_memory="50%")
    want = logits(model)
    before = moert.stats(model)
    with pytest.raises(error, match=message):
        moert.resize(model, size)
    after = moert.stats(model)
    assert (after.slot_bytes, after.resident_bytes) == (before.slot_bytes, before.resident_bytes)
    check(model)
    assert torch.equal(logits(model), want)


def test_growth_that_would_be_taken_away_again_is_refused(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moert.load(tiny_olmoe, host_memory="50%") as model:
        slots = moert.stats(model).slot_bytes
        # The floor of 64 MiB and 3 slots are free, and 4 slots more are asked for.
        spare = 64 * MIB + 3 * slots // 8
        scarce = MemoryReport((MemoryLimit("a test's limit", 1 << 30, (1 << 30) - spare, 0),))
        monkeypatch.setattr(sizing_module, "memory_report", lambda: scarce)
        with pytest.raises(moert.CapacityError, match=r"64\.0 MiB .* a test's limit .* at most 352\.0 KiB"):
            moert.resize(model, "75%")
        check(model)
        assert moert.resize(model, 352 << 10).slot_bytes == 352 << 10
        assert moert.resize(model, "25%").slots == (2, 2), "less is always possible"
        check(model)


def test_growth_beyond_the_machine_is_refused_also_without_the_watch(
    tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moert.load(tiny_olmoe, host_memory="50%", shrink_on_pressure=False) as model:
        scarce = MemoryReport((MemoryLimit("a test's limit", 1 << 30, (1 << 30) - 1000, 0),))
        for module in (arena_module, sizing_module):
            monkeypatch.setattr(module, "memory_report", lambda: scarce)
        with pytest.raises(moert.CapacityError, match=r"more than there is .*lower host_memory"):
            moert.resize(model, "100%")
        check(model)


def test_a_kernel_that_refuses_the_pages_changes_nothing(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moert.load(tiny_olmoe, host_memory="50%") as model:
        want = logits(model)
        calls: list[int] = []

        class Native:
            fill = staticmethod(_C.fill)

            @staticmethod
            def prefault(address: int, nbytes: int, threads: int) -> bool:
                calls.append(nbytes)
                if len(calls) == 2:
                    raise OSError(12, "Cannot allocate memory")
                return _C.prefault(address, nbytes, threads)

        with monkeypatch.context() as patch:
            patch.setattr(arena_module, "_C", Native)
            with pytest.raises(moert.CapacityError, match="the kernel refused"):
                moert.resize(model, "100%")
        assert len(calls) == 2
        check(model)
        assert torch.equal(logits(model), want)
        assert moert.resize(model, "100%").slots == (8, 8)


def test_where_address_space_is_limited_it_grows_back_to_where_it_began(
    tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_tier, "why_no_reservation", lambda: "a test limits it")
    with moert.load(tiny_olmoe, host_memory="50%") as model:
        want = logits(model)
        assert moert.resize(model, "25%").slots == (2, 2)
        check(model)
        assert moert.resize(model, "50%").slots == (4, 4)
        with pytest.raises(moert.CapacityError, match=r"512\.0 KiB .* 256\.0 KiB .* because a test limits it; give"):
            moert.resize(model, "100%")
        check(model)
        assert torch.equal(logits(model), want)


def test_under_a_real_limit_of_address_space_there_is_no_more_than_the_budget() -> None:
    code = """
        import resource
        from moert.errors import CapacityError
        from moert.plan import LayerNeed
        from moert.runtime.host_tier import HostTier
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        needs = [LayerNeed(f"layer {i}", 1024, 4 << 20, 4 << 20, 2) for i in range(4)]
        tier = HostTier(needs, [4, 4, 4, 4], 2, 4096)
        print(tier.arena.nbytes - 2 * 4096 == 4 * 4 * (4 << 20), tier.arena.committed_bytes == tier.arena.nbytes)
        tier.shrink(1, 2)
        tier.grow([4, 4, 4, 4])
        try:
            tier.grow([5, 4, 4, 4])
        except CapacityError as error:
            print(error)
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    fits, message = child.stdout.splitlines()
    assert fits == "True True"
    assert "limited to 1.0 GiB (ulimit -v)" in message


def test_experts_in_the_models_own_parameters_have_no_size(tiny_olmoe: Path) -> None:
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    with pytest.raises(moert.MoertError, match="no offloaded experts"):
        moert.resize(model, "50%")
    with moert.patch(model), pytest.raises(moert.MoertError, match=r"own parameters.*patch it with a smaller host_mem"):
        moert.resize(model, "50%")
    with pytest.raises(moert.MoertError, match="no offloaded experts"):
        moert.resize(model, "50%")


def test_a_closed_model_and_a_fork_are_not_resized(tiny_olmoe: Path) -> None:
    model = moert.load(tiny_olmoe, host_memory="50%")
    moert.resize(model, "25%")
    child = os.fork()
    if child == 0:
        try:
            moert.resize(model, "50%")
        except moert.MoertError as error:
            os._exit(0 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    moert.resize(model, "75%")
    check(model)
    moert.close(model)
    with pytest.raises(moert.MoertError, match="were closed"):
        moert.resize(model, "50%")
    with pytest.raises(moert.MoertError, match="were closed"):
        logits(model)


def test_an_interrupted_resize_loses_no_more_than_residents(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moert.load(tiny_olmoe, host_memory="100%") as model:
        want = logits(model)
        runtime = runtime_of(model)
        for expert in (4, 5, 6, 7):
            runtime.weights(0, expert)
        source = runtime._source
        assert source is not None
        record, asked = source.record, []

        def interrupted(layer: int, expert: int) -> Any:
            asked.append(expert)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return record(layer, expert)

        with monkeypatch.context() as patch:
            patch.setattr(source, "record", interrupted)
            with pytest.raises(KeyboardInterrupt):
                moert.resize(model, "50%")
        assert len(runtime.layers[0].residency) == 2, "of 4 that had to move, 2 had"
        for layer in runtime.layers:
            layer.residency.check_integrity()
        assert torch.equal(logits(model), want)
        for size in ("100%", "50%", "100%"):
            moert.resize(model, size)
            check(model)
            assert torch.equal(logits(model), want)
