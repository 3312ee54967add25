"""`moert policies` lists what is there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from cli_support import Cli

from moert.policies import make_policy, policy_names


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


def test_every_file_is_listed_as_it_describes_itself(cli: Cli) -> None:
    listed = {policy["name"]: policy for policy in cli("policies", "--json").document["policies"]}
    folder = Path(importlib.import_module("moert.policies").__path__[0])
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {"base"}
    assert listed.keys() == files == set(policy_names())
    for name, policy in listed.items():
        assert policy["live"] == (name in policy_names(live_only=True))
        # The first sentence of the file, over as many lines as it takes.
        source = " ".join((folder / f"{name}.py").read_text().split())
        assert source.startswith(f'"""{policy["about"]}')
        assert policy["about"].endswith(".")
        assert policy["rule"]
        words = [f"{key}={str(value).lower()}" for key, value in policy["parameters"].items()]
        assert make_policy(",".join([name, *words]), 4, future=()).parameters == policy["parameters"]
    assert listed["ema"]["parameters"] == {"alpha": 0.03, "burst": 0.68, "bonus": 0.05}


def test_the_list_is_for_people(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ran = cli("policies")
    assert ran.code == 0
    lines = {line.split()[0]: line for line in ran.out.splitlines() if line.strip()}
    assert "alpha=0.03" in lines["ema"] and " live " in lines["ema"]
    assert " bound " in lines["belady"]
    assert "package.module:Class" in ran.out
