"""How policies are named, with and without parameters, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from policy_support import ids

from moert.errors import ConfigError
from moert.policies import make_policy, policy_names, split_policies
from moert.policies.ema import EMA
from moert.policies.mrs import MRS
from moert.types import ExpertId


def test_unknown_policy_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"no policy named 'clock'; there are .*lru"):
        make_policy("clock", 4)


def test_policy_from_outside_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policies.py").write_text(
        "from moert.policies.lru import LRU\n"
        "class Mine(LRU):\n"
        "    def __init__(self, capacity, n=3):\n"
        "        super().__init__(capacity)\n"
        "        self.n = n\n"
        "NotOne = dict\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert type(make_policy("my_policies:Mine", 4)).__name__ == "Mine"
    assert vars(make_policy("my_policies:Mine, n=5", 4))["n"] == 5
    with pytest.raises(ConfigError, match="not a subclass"):
        make_policy("my_policies:NotOne", 4)
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_policy("my_policies:Absent", 4)
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_policy("no_such_module:Mine", 4)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("class Mine(LRU", "own:Mine", r"cannot be imported: .*\(own.py, line 2\)"),
        ("1 / 0", "own:Mine", r"ZeroDivisionError: division by zero .*own.py, line 2"),
        ("import sys; sys.exit(3)", "own:Mine", r"SystemExit: 3 .*own.py, line 2"),
        ("import absent_library", "own:Mine", r"No module named 'absent_library'$"),
        ("class Mine(LRU): pass", "own:Mime", r"own.py has no 'Mime'; of .*Policy it has Mine"),
        ("", "own:Mine", r"it has no subclass"),
        ("class Mine(Policy):\n    admit = access = victim = print", "own:Mine", "does not define evict"),
        ("class Mine(LRU):\n    def __init__(self, capacity, k): pass", "own:Mine", r"cannot be made: .*'k'.*defaults"),
        ("class Mine(LRU):\n    def __init__(self, capacity): int('x')", "own:Mine", "cannot be made: ValueError"),
        ("", "absent_file:Mine", "set PYTHONPATH to the folder that absent_file is in"),
        ("", "./own.py:Mine", 'write "my_file:Class"'),
        ("", "own:", 'write "my_file:Class"'),
        ("", ":Mine", 'write "my_file:Class"'),
    ],
)
def test_files_that_cannot_be_used(
    source: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(f"from moert.policies import Policy; from moert.policies.lru import LRU\n{source}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises(ConfigError, match=message):
        make_policy(name, 4)
    sys.modules.pop("own", None)


def test_parameters_by_name() -> None:
    policy = make_policy("ema, alpha=0.25", 4)
    policy.access([ExpertId(0, 1)])
    assert isinstance(policy, EMA)
    assert policy.score(ExpertId(0, 1)) == 0.25
    assert policy.fresh(2).parameters == {"alpha": 0.25, "burst": 0.68, "bonus": 0.05}
    assert isinstance(make_policy("mrs,top_k=3,alpha=0.5", 4), MRS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ema,beta=1", r"'beta=1' is no parameter of ema; its parameters are: alpha=0.03, burst=0.68"),
        ("lru,x=1", r"parameters are: none"),
        ("ema,0.05", r"'0.05' is no parameter"),
        ("ema,alpha=much", r"alpha='much' must be a number"),
        ("random,seed=1.5", r"seed='1.5' must be a whole number"),
        ("lfu,in_cache=maybe", r"in_cache='maybe' must be true or false"),
        ("ema,alpha=0", r"alpha=0.0 must be above 0 and below 1"),
        ("ema,alpha=1", r"alpha=1.0 must be above 0 and below 1"),
        ("ema,alpha=nan", r"alpha=nan must be above 0"),
        ("ema,burst=1", r"burst=1.0 must be at least 0 and below 1"),
        ("lfu,decay=1.5", r"decay=1.5 must be above 0 and at most 1"),
        ("slru,protected=-1", r"protected=-1.0 must be"),
        ("s3fifo,threshold=0", r"threshold=0 must be at least 1"),
        ("static,warm_up_events=-1", r"warm_up_events=-1 must be at least 0"),
        ("activation_matrix,matrices=0", r"matrices=0 must be at least 1"),
        ("_queue", r"no policy named '_queue'"),
        ("base", r"no policy named 'base'"),
    ],
)
def test_parameters_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(text, 4)


@pytest.mark.parametrize("name", ["belady", "min_bypass"])
def test_bounds_do_not_run_live(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' must know every event .* cannot run live; .* lru"):
        make_policy(name, 4)


def test_bounds_refuse_another_trace() -> None:
    policy = make_policy("belady", 2, future=ids([[0], [1, 2]]))
    policy.access([ExpertId(0, 0)])
    with pytest.raises(
        ConfigError, match="event 1 has expert 1 of layer 0, which is not what was foreseen in 2 events"
    ):
        policy.access([ExpertId(0, 1)])
    with pytest.raises(ConfigError, match="event 2 has expert 0"):
        policy.access([ExpertId(0, 0)])


def test_a_list_of_policies() -> None:
    assert split_policies("lru, ema,alpha=0.05,mrs,alpha=.5, top_k=2,a.b:C,x=1") == [
        "lru",
        "ema,alpha=0.05",
        "mrs,alpha=.5,top_k=2",
        "a.b:C,x=1",
    ]
    assert split_policies(",".join(policy_names())) == policy_names()
    for text in ("", "lru,,ema", "alpha=0.05", "lru,"):
        with pytest.raises(ConfigError, match="is no policy"):
            split_policies(text)
