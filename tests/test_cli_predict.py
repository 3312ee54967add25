"""`moert predict`: the numbers are those of the evaluation, and bad input is one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cli_support
import pytest
from cli_support import Cli, checkpoint, rows_of
from report_support import trace, write

from moert.predict import Recording, Study, evaluate, halves
from moert.predictors._choice import predictor_names

cli, path = cli_support.cli, cli_support.path


def test_rows_are_those_of_the_evaluation(cli: Cli, path: Path) -> None:
    rows = rows_of(cli, "predict", path, "--predictor", "joint,speed=0.2,oracle", "--layers", "1,2", "--tokens", "3")
    assert {row["predictor"] for row in rows} == {"joint,speed=0.2", "oracle"}
    one = Recording.of_trace(trace(), "tiny.safetensors")
    first, second = halves(one)
    same = evaluate("joint,speed=0.2", Study(one, second, one, first))
    mine = [row for row in rows if row["predictor"].startswith("joint")]
    assert [(row["ahead_layers"], row["ahead_tokens"]) for row in mine] == [(1, 0), (2, 0), (0, 3)]
    for row in mine[:2]:
        assert row["recall"] == same.row(row["ahead_layers"]).recall
        assert row["calibration_error"] == same.row(row["ahead_layers"]).calibration_error
        assert (row["trained_on"], row["train_tokens"], row["test_tokens"]) == ("its first half", 120, 120)
    assert all(row["recall"]["k"] == 1 for row in rows if row["predictor"] == "oracle")


def test_across_traces_each_trains_for_the_other(cli: Cli, path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", trace(num_sequences=2))
    strange = write(tmp_path / "strange.safetensors", trace(layers=2))
    rows = rows_of(cli, "predict", path, other, strange, "--predictor", "frequency", "--train", "same,other,nothing")
    assert {(row["trace"], row["trained_on"]) for row in rows} == {
        (name, trained)
        for name, others in (
            ("tiny.safetensors", ["other.safetensors"]),
            ("other.safetensors", ["tiny.safetensors"]),
            ("strange.safetensors", []),
        )
        for trained in ("its first half", "nothing", *others)
    }


def test_the_table_has_all_that_can_be_asked_and_the_plot_is_there(cli: Cli, path: Path, tmp_path: Path) -> None:
    ran = cli("predict", path, "--plot", tmp_path / "out.png")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    for name in predictor_names(()):
        assert ran.out.count(f"\n{name} ") == 2, "once for one layer ahead, once by horizon"
    assert "gate_ahead" not in ran.out
    assert max(map(len, ran.out.splitlines())) <= 100


def test_a_model_runs_and_has_hidden_states(cli: Cli, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "olmoe")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def main(path):\nreturn None\n")
    rows = rows_of(
        cli, "predict", folder, "--prompts", prompts, "--max-new-tokens", 6, "--predictor", "gate_ahead,joint,lookup"
    )
    assert {row["predictor"] for row in rows} == {"gate_ahead", "joint", "lookup"}
    (row,) = (row for row in rows if row["predictor"] == "gate_ahead" and row["ahead_layers"] == 1)
    assert row["answered"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictor", "no_such"], "no predictor named 'no_such'"),
        (["--predictor", "joint,"], "'' is no predictor"),
        (["--predictor", "gate_ahead"], "needs hidden states and the weights of the routers, which are not at hand"),
        (["--predictor", "lookup"], "needs token ids, which are not at hand in tiny.safetensors"),
        (
            ["--predictor", "token_table"],
            "needs a file that `moert train-predictor` wrote, which is not at hand in tiny.safetensors; write",
        ),
        (["--layers", "4"], "each must be from 1 to 3"),
        (["--layers", "x"], "--layers='x' must be whole numbers"),
        (["--layers", "", "--tokens", ""], "there is no horizon"),
        (["--train", "other"], "takes two traces"),
        (["--train", "some"], "'some' is none of same, other, nothing"),
        (["--plot", "out.pdf"], "must end in .png"),
        (["--prompts", "p.txt"], "--prompts is for a model"),
    ],
)
def test_bad_input(cli: Cli, path: Path, arguments: list[str], message: str) -> None:
    ran = cli("predict", path, *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_bad_traces(cli: Cli, tmp_path: Path) -> None:
    alone = write(tmp_path / "alone.safetensors", trace(num_sequences=1))
    ran = cli("predict", alone)
    assert (ran.code, "alone.safetensors has 1 sequence (60 tokens)" in ran.err) == (2, True)
    assert cli("predict", alone, "--train", "nothing", "--predictor", "joint").code == 0
    ran = cli("predict", tmp_path / "none.npz")
    assert (ran.code, "does not exist" in ran.err) == (2, True)
    strange = write(tmp_path / "strange.safetensors", trace(layers=2))
    ran = cli("predict", write(tmp_path / "a.safetensors"), strange, "--train", "other")
    assert (ran.code, "no two of" in ran.err) == (2, True)


OWN = """
from moert.predictors.base import Predictor
import numpy as np

class Raises(Predictor):
    def observe(self, layer, experts, weights=None):
        raise KeyError("of its own")

class NotANumber(Predictor):
    def scores(self, layer, tokens=0):
        return np.full(self.model.num_experts[layer], np.nan, np.float32)

class Short(Predictor):
    def scores(self, layer, tokens=0):
        return np.zeros(2, np.float32)

class Demanding(Predictor):
    def __init__(self, model, other):
        super().__init__(model)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Raises", "failed: KeyError: 'of its own' ("),
        ("NotANumber", "scores of layer 1, 1 layer ahead, must be 16 finite numbers, and are [nan nan nan"),
        ("Short", "must be 16 finite numbers, and are [0. 0.]"),
        ("Demanding", "cannot be made: TypeError"),
    ],
)
def test_predictors_of_ones_own_that_fail(
    name: str, message: str, cli: Cli, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_predictors.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    ran = cli("predict", path, "--predictor", f"failing_predictors:{name}")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert message in ran.err


def test_the_predictor_of_the_documentation_works(
    cli: Cli, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "predictors.md").read_text()
    sources = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (source,) = [source for source in sources if "class Last" in source]
    (tmp_path / "documented_predictor.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    own, known = "documented_predictor:Last", "previous_token"
    rows = rows_of(cli, "predict", path, "--predictor", f"{own},{known}", "--train", "nothing")
    recalls = {row["predictor"]: row["recall"]["k"] for row in rows if row["ahead_tokens"] == 1}
    assert recalls[own] == pytest.approx(recalls[known], abs=0.01), "but for the first tokens of sequences"


def test_torch_stays_out_of_traces(path: Path) -> None:
    """`moert predict` of a trace, and asking for help, bring in no torch."""
    import subprocess

    code = (
        "import sys; from moert.cli import main; "
        f"code = main(['predict', {str(path)!r}, '--predictor', 'joint', '--json']); "
        "print(code, 'torch' in sys.modules, file=sys.stderr)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.stderr.splitlines()[-1] == "0 False", child.stderr
