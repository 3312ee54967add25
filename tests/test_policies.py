"""The contract of every policy there is, and the order of each."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moert.errors import ConfigError
from moert.policies import Policy, make_policy, policy_names
from moert.residency import Residency
from moert.types import ExpertId

Event = Sequence[int]

events = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True).map(sorted), max_size=12)


def replay(policy: Policy, capacity: int, trace: Sequence[Event]) -> list[int]:
    """Misses of each event."""
    residency = Residency(capacity, policy)
    misses = []
    for event in trace:
        experts = [ExpertId(0, expert) for expert in event]
        split = residency.begin(experts)
        misses.append(len(split.misses))
        for expert in split.misses:
            admission = residency.admit(expert)
            residency.arrive(expert)
            assert admission is not None
            assert admission.victim not in experts
        for expert in experts:
            residency.release(expert)
        residency.end()
        residency.check_integrity()
    return misses


def fewest_misses(trace: Sequence[Event], capacity: int) -> int:
    """The least number of misses of any policy that admits every miss, by trying all of them."""

    @cache
    def best(step: int, resident: frozenset[int]) -> int:
        if step == len(trace):
            return 0
        event = frozenset(trace[step])
        missing = event - resident
        others = sorted(resident - event)
        room = capacity - len(event | resident)
        n_evicted = max(0, -room)
        return len(missing) + min(
            best(step + 1, (resident | event) - frozenset(evicted))
            for evicted in itertools.combinations(others, n_evicted)
        )

    return best(0, frozenset())


def test_every_file_is_a_policy() -> None:
    files = {path.stem for path in (Path(__file__).parent.parent / "moert" / "policies").glob("*.py")}
    assert set(policy_names()) == files - {"__init__", "base"}
    assert "lru" in policy_names()


@pytest.mark.parametrize("name", policy_names())
@given(trace=events, capacity=st.integers(3, 6))
def test_policy_keeps_the_contract_and_never_beats_the_bound(name: str, trace: list[Event], capacity: int) -> None:
    misses = replay(make_policy(name, capacity), capacity, trace)
    assert sum(misses) >= fewest_misses(tuple(map(tuple, trace)), capacity)
    assert len(misses) == len(trace)


@pytest.mark.parametrize("name", policy_names())
@given(trace=events)
def test_policy_misses_each_expert_once_where_all_fit(name: str, trace: list[Event]) -> None:
    distinct = {expert for event in trace for expert in event}
    assert sum(replay(make_policy(name, 7), 7, trace)) == len(distinct)


@pytest.mark.parametrize("name", policy_names())
def test_victim_is_no_locked_one_and_asking_changes_nothing(name: str) -> None:
    policy = make_policy(name, 3)
    experts = [ExpertId(0, expert) for expert in range(3)]
    for expert in experts:
        policy.access([expert])
        policy.admit(expert)
    for locked in itertools.chain.from_iterable(itertools.combinations(experts, n) for n in range(3)):
        first = policy.victim(set(locked))
        assert first in experts
        assert first not in locked
        assert policy.victim(set(locked)) == first


@given(trace=events, capacity=st.integers(3, 6))
def test_lru_is_an_ordered_dictionary(trace: list[Event], capacity: int) -> None:
    order: OrderedDict[int, None] = OrderedDict()
    expected = []
    for event in trace:
        expected.append(sum(expert not in order for expert in event))
        for expert in event:
            if expert in order:
                order.move_to_end(expert)
        for expert in event:
            if expert not in order:
                while len(order) >= capacity:
                    del order[next(old for old in order if old not in event)]
                order[expert] = None
    assert replay(make_policy("lru", capacity), capacity, trace) == expected


def test_unknown_policy_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"no policy named 'clock'; there are .*lru"):
        make_policy("clock", 4)


def test_policy_from_outside_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policies.py").write_text(
        "from moert.policies.lru import LRU\nclass Mine(LRU):\n    pass\nNotOne = dict\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert type(make_policy("my_policies:Mine", 4)).__name__ == "Mine"
    with pytest.raises(ConfigError, match="not a subclass"):
        make_policy("my_policies:NotOne", 4)
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_policy("my_policies:Absent", 4)
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_policy("no_such_module:Mine", 4)
