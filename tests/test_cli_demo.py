"""`moert demo`: the same tokens as plain transformers, shown in a terminal's width, loudly wrong if they are not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import PROMPT, Cli, Ran, checkpoint, plain_tokens
from rich.console import Console

import moert.cli.demo as demo_module
from moert.cli.output import heat
from moert.runtime.compute import Fused
from moert.runtime.routing import Group


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "80")
    return Cli(capfd)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.getbasetemp() / "cli", "demo")


def demo(cli: Cli, folder: Path, *options: object) -> Ran:
    return cli("demo", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 8, *options)


def test_document_has_the_tokens_of_both(cli: Cli, folder: Path) -> None:
    ran = demo(cli, folder, "--json")
    assert ran.code == 0
    assert ran.err == ""
    document = ran.document
    assert document["identical_tokens"] is True
    expected = plain_tokens(folder, PROMPT, 8, repetition_penalty=1.2)
    assert document["token_ids"] == document["transformers_token_ids"] == expected
    # One of 64 experts may be on its way.
    assert 63 / 64 <= 4 * document["resident_bytes"] / document["expert_bytes"] <= 1
    assert (document["num_layers"], document["num_experts"], document["top_k"]) == (8, 32, 4)
    assert document["hits"] + document["misses"] == sum(layer["hits"] + layer["misses"] for layer in document["layers"])
    assert document["misses"] > 0
    assert document["tokens_per_s"] > 0
    assert document["dtype"] == "float32"


def test_another_budget(cli: Cli, folder: Path) -> None:
    document = demo(cli, folder, "--json", "--host-memory", "100%").document
    assert document["identical_tokens"]
    assert document["hit_rate"] == 1


def test_terminal_shows_it_all(cli: Cli, folder: Path) -> None:
    ran = demo(cli, folder)
    assert ran.code == 0
    assert ran.err == ""
    shown, _, rest = ran.out.partition("tokens ")
    assert PROMPT in shown
    assert "all 8 identical to plain transformers" in rest
    # Of 64 experts, one may still be on its way when the last token is there: somebody expected it.
    assert re.search(r"\((25\.0|24\.6) %\)", rest)
    assert rest.count("█") > 8
    for command, _ in demo_module.TRY_NEXT:
        assert command in rest
    assert max(map(len, rest.splitlines())) <= 80


def test_difference_is_loud(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Fused.add

    def wrong(self: Fused, groups: Sequence[Group], hidden: torch.Tensor, out: torch.Tensor) -> None:
        part = torch.zeros_like(out)
        right(self, groups, hidden, part)
        out -= 3 * part

    monkeypatch.setattr(Fused, "add", wrong)
    ran = demo(cli, folder)
    assert ran.code == 1
    assert "DIFFERENT from plain transformers" in ran.out
    assert "Try next" not in ran.out
    assert demo(cli, folder, "--json").code == 1


def test_bad_budget_is_one_line(cli: Cli, folder: Path) -> None:
    assert "1 of 32 experts" in demo(cli, folder, "--host-memory", "5%").error


def test_missing_weights_are_one_line(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moert

    monkeypatch.setattr(moert, "__file__", str(tmp_path / "__init__.py"))
    assert "not installed" in cli("demo").error
    assert "not installed" in cli("run", "demo", "x").error


@pytest.mark.parametrize(("share", "filled"), [(0.0, 0), (0.5, 5), (0.93, 9), (1.0, 10)])
def test_heat_is_read_without_colour(share: float, filled: int) -> None:
    text = heat(share, 10)
    assert text.plain == "█" * filled + "░" * (10 - filled)
    assert "\x1b" not in render(text)


def render(text: Any) -> str:
    console = Console(no_color=True, width=20, file=None)
    with console.capture() as capture:
        console.print(text)
    return capture.get()
