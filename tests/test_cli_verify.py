"""`moert verify`: says identical when it is, and notices when it is not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import PROMPT, Cli, checkpoint, plain_tokens
from families import build, inputs_for, logits, zoo_at

import moert
from moert.cli.comparison import EXACT, FLOAT32, SIXTEEN_BIT, Reference, Trace, compare
from moert.hf import reference as hf_reference
from moert.hf.reference import Products, RoutingRecorder, round_as_moert
from moert.kernels.cpu_ffn import ExpertFfn
from moert.runtime.compute import Fused
from moert.runtime.routing import Group

KEYS = {"identical_tokens", "identical_routing", "max_abs_logit_error", "tolerance", "reference", "tokens_compared"}
KEYS |= {"hit_rate", "max_abs_logit", "first_difference"}


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cli"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes what moert's experts add, and nothing of transformers or the reference, wrong by a factor."""
    right = Fused.add

    def break_(factor: float) -> None:
        def wrong(self: Fused, groups: Sequence[Group], hidden: torch.Tensor, out: torch.Tensor) -> None:
            part = torch.zeros_like(out)
            right(self, groups, hidden, part)
            out += part * factor

        monkeypatch.setattr(Fused, "add", wrong)

    return break_


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_offloaded_is_what_transformers_computes(family: str, dtype: torch.dtype, cli: Cli, root: Path) -> None:
    folder = checkpoint(root, family, dtype)
    ran = cli("verify", folder, "--host-memory", "25%", "--prompt", PROMPT, "--max-new-tokens", 8, "--json")
    assert ran.code == 0, ran
    assert ran.err == ""
    document = ran.document
    assert document.keys() >= KEYS
    assert document["passed"]
    assert document["reference"] == "transformers"
    assert document["tokens_compared"] == 8
    assert document["identical_tokens"] is True
    assert document["identical_routing"] is True
    assert document["first_difference"] is None
    assert 0 < document["hit_rate"] < 1
    # Two layers, two picks, for each token of the prompt and each that was fed back.
    assert document["picks_compared"] == 2 * 2 * (len(PROMPT) + 7)
    assert document["tolerance"] == (1e-5 if dtype == torch.float32 else 2**-6)
    assert document["max_abs_logit_error"] <= document["tolerance"] * document["max_abs_logit"]


def test_fp32_of_a_bf16_checkpoint(cli: Cli, root: Path) -> None:
    folder = checkpoint(root, "olmoe", torch.bfloat16)
    document = cli("verify", folder, "--host-memory", "25%", "--dtype", "float32", "--json").document
    assert (document["dtype"], document["tolerance"], document["passed"]) == ("float32", 1e-5, True)


def test_resident_reference_must_agree_to_the_last_bit(cli: Cli, root: Path) -> None:
    folder = checkpoint(root, "olmoe", torch.bfloat16)
    document = cli("verify", folder, "--host-memory", "25%", "--reference", "resident", "--json").document
    assert document["passed"]
    assert (document["reference"], document["tolerance"], document["max_abs_logit_error"]) == ("resident", 0, 0)


def test_wrong_experts_are_noticed(cli: Cli, root: Path, broken: Callable[[float], None]) -> None:
    broken(-3.0)
    folder = checkpoint(root)
    ran = cli("verify", folder, "--host-memory", "25%", "--prompt", PROMPT, "--max-new-tokens", 8, "--json")
    document = ran.document
    assert ran.code == 1
    assert not document["passed"]
    assert not document["within_tolerance"]
    first = document["first_difference"]
    expected = plain_tokens(folder, PROMPT, 8)
    assert first["reference_token"] == expected[first["step"]] != first["token"]
    assert first["reference_margin"] >= 0
    said = cli("verify", folder, "--host-memory", "25%", "--prompt", PROMPT, "--max-new-tokens", 8)
    assert said.code == 1
    assert "DIFFERENT" in said.out


def test_error_above_the_tolerance_is_noticed_though_the_tokens_agree(
    cli: Cli, root: Path, broken: Callable[[float], None]
) -> None:
    broken(1.0005)
    ran = cli("verify", checkpoint(root), "--host-memory", "25%", "--max-new-tokens", 2, "--json")
    assert ran.code == 1
    assert ran.document["identical_tokens"]
    assert not ran.document["within_tolerance"]
    assert ran.document["max_abs_logit_error"] > 1e-5 * ran.document["max_abs_logit"]


def test_wrong_products_are_noticed_though_both_sides_use_them(
    cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ExpertFfn.run

    def wrong(self: ExpertFfn, *args: Any, **kwargs: Any) -> None:
        *given, out = args
        part = torch.zeros_like(out)
        right(self, *given, part, **kwargs)
        out += part * 1.03

    monkeypatch.setattr(ExpertFfn, "run", wrong)
    folder = checkpoint(root, "olmoe", torch.bfloat16)
    ran = cli("verify", folder, "--host-memory", "25%", "--prompt", PROMPT, "--max-new-tokens", 4, "--json")
    document = ran.document
    assert document["within_tolerance"]
    assert document["products_compared"] > 0
    assert document["max_product_error_ulps"] > 1
    assert (ran.code, document["products_within_tolerance"], document["passed"]) == (1, False, False)


def test_products_are_compared_in_units_of_their_largest_number() -> None:
    products = Products()
    products.note(torch.tensor([4.0, 0.0]).bfloat16(), torch.tensor([4.0, 2**-6]).bfloat16())
    assert (products.compared, products.largest_error_ulps) == (1, 2**-6 / (4 * 2**-7))
    products.note(torch.ones(2), torch.ones(2))
    assert (products.compared, products.largest_error_ulps) == (2, 0.5)
    products.note(torch.tensor([float("nan")]), torch.ones(1))
    products.note(torch.ones(1), torch.ones(1))
    assert not products.largest_error_ulps <= 1


def test_model_that_does_not_fit_is_held_against_moert_at_another_budget(
    cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moert.cli.verify.available_bytes", lambda: 1000)
    ran = cli("verify", checkpoint(root), "--host-memory", "50%", "--max-new-tokens", 4, "--json")
    assert ran.code == 0
    assert ran.document["reference"] == "moert"
    assert "25 % of the experts" in ran.document["reference_description"]
    assert ran.err.startswith("moert: warning: transformers needs ")
    assert ran.err.count("\n") == 1
    other = cli("verify", checkpoint(root), "--host-memory", "25%", "--max-new-tokens", 4, "--json").document
    assert "50 % of the experts" in other["reference_description"], "never the very same budget"
    error = cli("verify", checkpoint(root), "--reference", "transformers").error
    assert "transformers needs" in error
    assert "--reference resident" in error


def test_the_two_models_never_stand_side_by_side(cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, load_plain = moert.load, hf_reference.load_plain
    offloaded: list[weakref.ref[Any]] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        offloaded.append(weakref.ref(model))
        return model

    def check(*args: Any, **kwargs: Any) -> Any:
        assert [model() for model in offloaded] == [None]
        return load_plain(*args, **kwargs)

    monkeypatch.setattr(moert, "load", note)
    monkeypatch.setattr(hf_reference, "load_plain", check)
    assert cli("verify", checkpoint(root), "--host-memory", "25%", "--max-new-tokens", 2).code == 0
    assert len(offloaded) == 1


def test_people_read_the_same(cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    # Without predictions, for an expert that is on its way when the tokens are done is not counted as in memory.
    options = ("--host-memory", "25%", "--predictor", "none", "--max-new-tokens", 4)
    ran = cli("verify", checkpoint(root, "olmoe", torch.bfloat16), *options)
    assert ran.code == 0
    for words in (
        "25.0 % of the experts",
        "bfloat16",
        "transformers",
        "4 of 4 identical",
        "offloading changed nothing",
    ):
        assert words in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


class Words:
    """Stands for a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


def trace(tokens: list[int], scores: torch.Tensor | None = None, picks: list[list[int]] | None = None) -> Trace:
    if scores is None:
        scores = torch.nn.functional.one_hot(torch.tensor(tokens), 8).float()
    calls = picks if picks is not None else [[0, 1]] * len(tokens)
    return Trace(tokens, scores, {"layer": [torch.tensor([call]) for call in calls]})


def compared(mine: Trace, theirs: Trace, tolerance: Any = FLOAT32) -> dict[str, Any]:
    return compare(mine, theirs, Reference("transformers", "", tolerance), Words())


def test_runs_are_compared_up_to_the_first_token_that_differs() -> None:
    later = torch.nn.functional.one_hot(torch.tensor([1, 2, 3, 7]), 8).float()
    later[3] *= 100
    mine = trace([1, 2, 4, 5], picks=[[0, 1], [0, 1], [0, 1], [6, 7]])
    found = compared(mine, trace([1, 2, 3, 7], later))
    assert not found["identical_tokens"]
    assert found["first_difference"] == {
        "step": 2,
        "token": 4,
        "text": "<4>",
        "reference_token": 3,
        "reference_text": "<3>",
        "reference_margin": 1.0,
    }
    assert found["max_abs_logit_error"] == 1, "of the step that chose the token, not of those after it"
    assert found["picks_compared"] == 6
    assert found["identical_routing"]


def test_a_run_that_ends_early_differs() -> None:
    found = compared(trace([1, 2]), trace([1, 2, 3]))
    assert not found["identical_tokens"]
    assert not found["passed"]
    assert found["first_difference"]["token"] is None
    assert found["first_difference"]["reference_token"] == 3


def test_routing_alone_fails_it() -> None:
    found = compared(trace([1, 2]), trace([1, 2], picks=[[0, 1], [0, 2]]))
    assert found["identical_tokens"]
    assert found["within_tolerance"]
    assert (found["picks_differing"], found["first_layer_differing"], found["passed"]) == (1, "layer", False)


@pytest.mark.parametrize(("tolerance", "passes"), [(EXACT, False), (FLOAT32, False), (SIXTEEN_BIT, True)])
def test_tolerance_is_a_share_of_the_largest_logit(tolerance: Any, passes: bool) -> None:
    theirs = torch.nn.functional.one_hot(torch.tensor([1, 2]), 8).float() * 50
    mine = theirs.clone()
    mine[1, 5] += 50 * 2**-7
    found = compared(trace([1, 2], mine), trace([1, 2], theirs), tolerance)
    assert found["passed"] is passes
    mine[0, 0] = float("nan")
    assert not compared(trace([1, 2], mine), trace([1, 2], theirs), tolerance)["passed"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gemma4", "nemotron_h"])
def test_experts_one_at_a_time_are_the_eager_ones(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = build(family)
    inputs = inputs_for(family, model)
    expected = logits(model, inputs)
    products = round_as_moert(model)
    assert products is not None
    found = logits(model, inputs)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 5e-6  # moert adds in another order


def test_experts_with_a_call_of_their_own_are_left_alone() -> None:
    assert round_as_moert(build("dbrx")) is None


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_routing_recorded_is_what_the_experts_were_called_with(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    zoo = zoo_at(tmp_path_factory.getbasetemp() / "families")
    specimen = zoo.specimen(family)
    with moert.load(specimen.path, host_memory="25%", dtype=torch.float32) as model:
        with RoutingRecorder(model) as offloaded:
            logits(model, specimen.inputs)
        logits(model, specimen.inputs)
    with RoutingRecorder(specimen.model) as plain:
        logits(specimen.model, specimen.inputs)
    assert offloaded.picks.keys() == plain.picks.keys()
    assert offloaded.picks
    for path, calls in plain.picks.items():
        assert len(calls) == len(offloaded.picks[path]) == 1
        assert torch.equal(calls[0], offloaded.picks[path][0])
        assert calls[0].shape == (24, 2)
