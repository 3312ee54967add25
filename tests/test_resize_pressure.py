"""A host tier that gives memory back when memory runs short, rather than be killed for it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moert
from moert.hf.model import runtime_of
from moert.runtime import watch as watch_module
from moert.runtime.watch import MemoryWatch
from moert.tiers.memory import MemoryLimit, MemoryReport

IDS = torch.arange(3, 40).remainder(100)[None]
GIB, MIB = 1 << 30, 1 << 20


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


class FakeMemory:
    """What a reading finds, and how often there was one."""

    def __init__(self) -> None:
        self.available_bytes = GIB
        self.stalled: float | None = None
        self.readings = 0

    def report(self) -> MemoryReport:
        self.readings += 1
        return MemoryReport((MemoryLimit("a test's limit", GIB, GIB - self.available_bytes, 0, self.stalled),))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> FakeMemory:
    """Every step reads this memory."""
    fake = FakeMemory()
    monkeypatch.setattr(watch_module, "memory_report", fake.report)
    monkeypatch.setattr(watch_module, "READ_EVERY_S", 0.0)
    return fake


@pytest.fixture(params=["default", "explicit"])
def model(request: pytest.FixtureRequest, tiny_olmoe: Path) -> Iterator[Any]:
    """All experts resident, by default or because that was asked for."""
    with moert.load(tiny_olmoe, host_memory={"default": None, "explicit": "100%"}[request.param], debug=True) as model:
        yield model


def slots(model: Any) -> list[int]:
    return [layer.residency.capacity for layer in runtime_of(model).layers]


def test_it_shrinks_to_the_least_and_computes_the_same(model: Any, memory: FakeMemory) -> None:
    want = logits(model)
    assert slots(model) == [8, 8]
    memory.available_bytes = 10 * MIB
    with pytest.warns(RuntimeWarning, match=r"memory runs short: 10\.0 MiB available: a test's limit.*moert\.resize"):
        got = logits(model)
    assert slots(model) == [2, 2], "all of this tier is less than what is missing"
    assert torch.equal(got, want)
    stats = moert.stats(model)
    assert stats.shrinks == 1
    assert stats.slot_bytes == 4 * 32768
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(model), want)
    assert moert.stats(model).shrinks == 1
    memory.available_bytes = GIB
    logits(model)
    assert slots(model) == [2, 2], "it does not grow by itself"
    moert.resize(model, "100%")
    assert torch.equal(logits(model), want)
    assert slots(model) == [8, 8]
    moert.reset_stats(model)
    assert moert.stats(model).shrinks == 0


def test_stalls_take_a_step_and_then_a_while(model: Any, memory: FakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moert.pressure.floor_bytes", lambda limit_bytes: 4096)
    want = logits(model)
    memory.available_bytes, memory.stalled = 2 * 4096, 0.3
    with pytest.warns(RuntimeWarning, match="tasks wait for it 30% of the time"):
        assert torch.equal(logits(model), want)
    assert slots(model) == [7, 7], "an eighth of 16 slots"
    logits(model)
    assert slots(model) == [7, 7]
    assert moert.stats(model).shrinks == 1


def test_step_by_step_it_warns_once(model: Any, memory: FakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moert.pressure.floor_bytes", lambda limit_bytes: 4096)
    want = logits(model)
    memory.available_bytes = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # of two layers each, so there are four readings
            assert torch.equal(logits(model), want)
    assert slots(model) == [4, 4]
    assert moert.stats(model).shrinks == 4
    assert len([warning for warning in caught if "runs short" in str(warning.message)]) == 1


def test_with_nothing_left_to_give_it_says_so_once(tiny_olmoe: Path, memory: FakeMemory) -> None:
    with moert.load(tiny_olmoe, host_memory="25%") as model:
        memory.available_bytes = 0
        with pytest.warns(RuntimeWarning, match=r"at its least already, 128\.0 KiB") as caught:
            list(map(logits, [model] * 3))
        assert len([warning for warning in caught if "runs short" in str(warning.message)]) == 1
        assert moert.stats(model).shrinks == 0


def test_a_warning_that_is_an_error_leaves_the_model_sound(model: Any, memory: FakeMemory) -> None:
    want = logits(model)
    memory.available_bytes = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="runs short"):
            logits(model)
        assert torch.equal(logits(model), want)
    assert slots(model) == [2, 2]


def test_the_option_turns_it_off(tiny_olmoe: Path, memory: FakeMemory) -> None:
    with moert.load(tiny_olmoe, shrink_on_pressure=False) as model:
        memory.available_bytes = 0
        logits(model)
        assert slots(model) == [8, 8]
        assert memory.readings == 0
    with pytest.raises(moert.ConfigError, match="shrink_on_pressure=1 must be True or False"):
        moert.OffloadConfig(shrink_on_pressure=1)  # type: ignore[arg-type]


def test_experts_in_their_own_parameters_are_left_alone(tiny_olmoe: Path, memory: FakeMemory) -> None:
    memory.available_bytes = 0
    with moert.patch(OlmoeForCausalLM.from_pretrained(tiny_olmoe)) as model:
        logits(model)
    assert memory.readings == 0


def test_the_files_are_read_only_when_a_reading_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, clock = FakeMemory(), itertools.count(start=100.0, step=0.1)
    monkeypatch.setattr(watch_module, "memory_report", fake.report)
    monkeypatch.setattr(watch_module, "monotonic", lambda: next(clock))
    watch = MemoryWatch()
    for _ in range(101):  # 10 s
        watch.look(GIB, MIB)
    assert 17 <= fake.readings <= 21


GROWING = """
    import json, sys, torch, warnings, moert
    from transformers import logging
    from moert.hf.model import runtime_of
    from moert.runtime import watch
    from moert.tiers.memory import memory_report
    logging.disable_progress_bar()
    MIB = 1 << 20
    folder, shrinking = sys.argv[1], sys.argv[2] == "shrinking"
    watch.READ_EVERY_S = 0.0  # the steps of so small a model are over long before a reading is due
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as caught:
        model = moert.load(folder, host_memory="100%", shrink_on_pressure=shrinking)
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            want = model(ids).logits
            slots = [moert.stats(model).slot_bytes]
            # A neighbour in the same group that wants half of what the slots hold.
            taken, goal = [], memory_report().available_bytes + slots[0] // 2
            while sum(map(len, taken)) < goal:
                taken.append(bytearray(b"x") * (8 * MIB))
                same = torch.equal(model(ids).logits, want)
                assert same
        slots.append(moert.stats(model).slot_bytes)
        words = [str(w.message) for w in caught if "runs short" in str(w.message)]
    for layer in runtime_of(model).layers:
        layer.residency.check_integrity()
    print(json.dumps(dict(slots=slots, words=words, shrinks=moert.stats(model).shrinks, goal=goal)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLMoE with 384 MiB of experts in 128 experts of 3 MiB."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=128,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def in_a_group(bench_on_path: None, large: Path) -> Callable[[str], tuple[subprocess.CompletedProcess[str], int]]:
    """`in_a_group(how)`: `GROWING` under a hard limit of 1 GiB, and how many processes the kernel killed for it."""
    import cgroup

    def run(how: str) -> tuple[subprocess.CompletedProcess[str], int]:
        try:
            with cgroup.memory_group(GIB) as group:
                command = group.command([sys.executable, "-c", textwrap.dedent(GROWING), str(large), how])
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
                return done, group.oom_kills
        except moert.CapacityError as error:
            pytest.skip(str(error))

    return run


def test_at_its_limit_it_shrinks_and_lives(
    in_a_group: Callable[[str], tuple[subprocess.CompletedProcess[str], int]],
) -> None:
    done, kills = in_a_group("shrinking")
    assert kills == 0
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    before, after = result["slots"]
    assert before >= 384 * MIB
    assert before // 8 < before - after, "less than the neighbour needed"
    assert after > before // 5, "far more than it needed"
    assert result["shrinks"] >= 1
    assert len(result["words"]) == 1
    assert "allows 1.0 GiB" in result["words"][0]


@pytest.mark.slow  # with the one before, it is what shows that the limit was a real one
def test_at_its_limit_it_would_have_been_killed(
    in_a_group: Callable[[str], tuple[subprocess.CompletedProcess[str], int]],
) -> None:
    done, kills = in_a_group("stubborn")
    assert kills == 1
    assert done.returncode != 0
