"""Where there is a choice of ways to run: with a device. Without one, what is chosen live is whether to read ahead."""

from __future__ import annotations

import pytest
import torch
from cli_support import checkpoint
from hypothesis import given
from hypothesis import strategies as st

import moert
from moert.hf.model import runtime_of
from moert.runtime.look_ahead import LookAhead
from moert.schedule import Costs, Curve, Item, Place, make_scheduler, makespan, scheduler_names
from moert.schedule._guard import Guard
from moert.trial import Trial
from moert.types import ExpertId

halves = st.integers(1, 8).map(lambda n: n / 2)


@given(
    picks=st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=6),
    cpu=halves,
    read=halves,
    room=st.integers(0, 4),
)
def test_without_a_device_all_schedulers_do_the_same(
    picks: list[tuple[bool, int]], cpu: float, read: float, room: int
) -> None:
    costs = Costs(Curve.proportional(cpu), read_s=read)
    items = [Item(ExpertId(0, n), t, Place.DISK if away else Place.HOST) for n, (away, t) in enumerate(picks)]
    plans = [make_scheduler(name).plan(items, costs) for name in scheduler_names()]
    assert len({(plan.device, plan.fetch, frozenset(plan.cpu), frozenset(plan.read)) for plan in plans}) == 1
    assert {makespan(plan, costs, room) for plan in plans} == {makespan(plans[0], costs, room)}


def test_live_on_a_cpu_no_way_is_chosen_but_reads_ahead_are_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("there is nothing to guard")

    monkeypatch.setattr(Guard, "__init__", never)
    noted: list[float] = []
    note = Trial.note
    monkeypatch.setattr(Trial, "note", lambda self, seconds: (noted.append(seconds), note(self, seconds))[1])
    folder = checkpoint(tmp_path_factory.getbasetemp() / "cli", "olmoe")
    with moert.load(folder, host_memory="50%") as model:
        runtime = runtime_of(model)
        assert runtime.device is None
        assert isinstance(runtime.look_ahead, LookAhead)
        ids = torch.tensor([[1, 2, 3]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert len(noted) >= 5, "tokens are timed, to be compared with and without reads ahead"
