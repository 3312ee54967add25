"""Policies of one's own that break the contract: the error says where and how, and no model is lost for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Cli
from families import build
from policy_support import ids
from report_support import trace, write
from wrong_policies import Absent, FailsLater, FailsToAdmit, Locked, Nobody, Number, Raises

import moert
from moert.errors import PolicyError
from moert.policies import Policy, make_policy
from moert.policies._guard import guarded
from moert.policies.lru import LRU
from moert.simulate import simulate
from moert.turnover import turn_over
from moert.types import ExpertId

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")


class Asks(LRU):
    """Right, and calls itself."""

    def admit(self, expert: ExpertId) -> None:
        super().admit(expert)
        super().evict(expert)
        self.put_back(expert)

    def put_back(self, expert: ExpertId) -> None:
        super().admit(expert)


WRONG = (
    (Nobody, "at event 2 of its cache, victim named None, which is not among the 2 residents"),
    (Absent, "victim named expert 77 of layer 0, which is not among the 2 residents"),
    (Locked, "at event 2 of its cache, victim named expert 3 of layer 0, which is one of the 1 locked of 2 residents"),
    (Number, "victim named 0, which is not among"),
    (Raises, r"at event 1 of its cache, access raised KeyError: 'the key' \(wrong_policies.py, line \d+\)"),
    (FailsToAdmit, "admit raised ValueError: no"),
)


@pytest.fixture(autouse=True)
def trusted() -> None:
    """A class that has failed is remembered; the next test begins anew."""
    guarded.cache_clear()


def name_of(cls: type[Policy]) -> str:
    return f"{cls.__module__}:{cls.__name__}"


def run(policy: Policy, events: Sequence[Sequence[ExpertId]]) -> None:
    residents: set[ExpertId] = set()
    for event in events:
        policy.access(event)
        turn_over(policy, residents, event, [expert for expert in event if expert not in residents], 2)


@pytest.mark.parametrize(("cls", "message"), WRONG)
def test_what_is_wrong_is_said(cls: type[Policy], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        run(make_policy(name_of(cls), 2), ids([[0, 3], [3, 4], [5, 6]]))


@pytest.mark.parametrize("cls", [cls for cls, _ in WRONG])
def test_a_replay_ends_in_one_line(cls: type[Policy], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.safetensors", trace())
    policies = f"lru,{name_of(cls)}"
    for options in (["--jobs", 2], ["--scope", "global"], ["--machine", "24gb-pcie4"]):
        ran = Cli(capfd)("simulate", path, "--policy", policies, "--capacity", "25%", *options)
        assert ran.code == 2
        assert name_of(cls) in ran.err
        assert ran.err.strip().count("\n") == 0
        # What was replayed before it is kept.
        assert "\nlru " in ran.out
        assert name_of(cls) not in ran.out
    assert name_of(cls) in Cli(capfd)("suit", path, "--policy", name_of(cls)).error


def test_a_policy_that_calls_itself_is_let_alone() -> None:
    made = trace()
    found = simulate(made, name_of(Asks), "25%")
    assert found.hits == simulate(made, "lru", "25%").hits


def test_only_what_a_class_overrides_is_watched() -> None:
    kind = type(make_policy(name_of(Asks), 2))
    assert kind.observe_scores is Policy.observe_scores
    assert kind.begin_sequence is Policy.begin_sequence
    assert (kind.__name__, kind.__module__) == ("Asks", "test_policies_guard")


def tokens(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.generate(torch.arange(3, 9)[None], max_new_tokens=12, do_sample=False)
    return found


@pytest.mark.parametrize("predictor", ["none", "gate_ahead_corrected"])
@pytest.mark.parametrize("cls", [Nobody, Absent, Locked, FailsToAdmit, FailsLater])
@pytest.mark.filterwarnings("ignore:policy .* has failed:RuntimeWarning")
def test_a_patched_model_gets_its_weights_back(cls: type[Policy], predictor: str) -> None:
    model = build("olmoe")
    expected = tokens(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        pytest.raises(PolicyError),
        moert.patch(model, host_memory="50%", policy=name_of(cls), predictor=predictor, debug=True),
    ):
        tokens(model)
    with pytest.raises(moert.MoertError, match="nothing to unpatch"):
        moert.unpatch(model)
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    assert torch.equal(tokens(model), expected)


def test_a_model_goes_on_with_lru_and_says_so() -> None:
    model = build("olmoe")
    with moert.patch(model, host_memory="50%", policy="lru"):
        expected = tokens(model)
    with moert.patch(model, host_memory="50%", policy=name_of(FailsLater), debug=True):
        with pytest.raises(PolicyError):
            tokens(model)
        with pytest.warns(RuntimeWarning, match="FailsLater has failed, so lru decides"):
            assert torch.equal(tokens(model), expected)
