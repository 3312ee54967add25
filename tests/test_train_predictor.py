"""`moert train-predictor`: traces or a model in, the file of a trained predictor out, and nothing where it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import Cli, checkpoint
from trace_support import real_trace
from training_support import learnable, make_trace
from transformers import AutoModelForCausalLM

import moert
from moert.errors import MoertError, UnsupportedModelError
from moert.hf.recorded_hidden import record_hidden
from moert.predictors._trained import read_trained
from moert.predictors.pre_attention import scale
from moert.trace import Trace, TraceFile, TraceWriter

LINES = [" ".join(f"w{256 + (line * 31 + word * word) % 250}" for word in range(40)) for line in range(48)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More would wait for one another wherever something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "100")
    return Cli(capfd)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.getbasetemp() / "cli")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


def write(path: Path, trace: Trace) -> Path:
    with TraceWriter(path, trace.header) as writer:
        for sequence in trace:
            writer.add(sequence)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A trace of 30 sequences that follow from their tokens."""
    return write(tmp_path / "trace.safetensors", learnable(30, 40))


def left(folder: Path, *known: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir() if one not in known)


def test_a_trace_becomes_a_predictor(cli: Cli, path: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "table.safetensors", tmp_path / "curve.png"
    ran = cli("train-predictor", path, "-o", out, "--predictor", "token_table,kept=3", "--plot", plot, "--json")
    document = ran.document
    found = read_trained(out).about
    assert (document["predictor"], found.predictor) == ("token_table", "token_table")
    assert found.options == document["options"] == {"vocabulary": 8192, "kept": 3.0}
    assert found.trace_hash == document["trace_hash"]
    assert (found.model, found.config_hash, found.num_experts) == ("learnable", "77", (8, 8))
    assert found.moert_version == moert.__version__
    assert found.metrics["recall"] == document["test"]["recall"]["1k"]
    assert sum(document["tokens"].values()) == 1200
    assert document["sequences"] == {"train": 22, "validation": 2, "test": 6}
    assert document["curve"][-1]["n_tokens"] == 22 * 40
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert ran.err == ""
    read = cli("train-predictor", path, "-o", out, "--predictor", "token_table", "--overwrite")
    assert read.code == 0
    assert "set_transition" in read.out
    assert f"--predictor token_table,file={out}" in read.out


def test_shares_and_seed_decide_the_split(cli: Cli, path: Path, tmp_path: Path) -> None:
    made = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(made)}.safetensors"
        options = ("--seed", seed, "--test", 0.5, "--predictor", "token_table", "--json")
        document = cli("train-predictor", path, "-o", out, *options).document
        assert document["sequences"]["test"] == 15
        made.append((document["test"], out.read_bytes()))
    assert made[0] == made[1] != made[2]


def test_several_traces_of_one_model_are_one_set(cli: Cli, path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", learnable(10, 40, seed=1))
    options = ("-o", tmp_path / "out.safetensors", "--predictor", "token_table", "--json")
    assert sum(cli("train-predictor", path, other, *options).document["sequences"].values()) == 40


@pytest.mark.parametrize("generated", [0, 3])
def test_a_model_is_run_for_it(generated: int, cli: Cli, folder: Path, texts: Path, tmp_path: Path) -> None:
    out, keep = tmp_path / "map.safetensors", tmp_path / "kept"
    options = ("--predictor", "pre_attention,batch=64", "--epochs", 2, "--json")
    new = ("--max-new-tokens", generated, "--max-tokens", 35)
    document = cli("train-predictor", folder, "--prompts", texts, *new, *options, "-o", out, "--keep", keep).document
    tokens = 48 * (35 + max(0, generated - 1))
    assert sum(document["tokens"].values()) == tokens
    assert len(document["curve"]) == 3
    assert document["test"]["recall"]["1k"] > document["baselines"]["popularity"]["recall"]["1k"] + 0.1
    assert left(tmp_path, texts, out, keep) == []
    assert left(keep) == ["hidden.safetensors", "trace.safetensors"]
    with TraceFile(keep / "trace.safetensors") as trace:
        assert trace.n_tokens == tokens
        assert read_trained(out).about.config_hash == trace.header.config_hash
    again = tmp_path / "again.safetensors"
    kept = (keep / "trace.safetensors", "--hidden", keep / "hidden.safetensors")
    assert cli("train-predictor", *kept, *options, "-o", again).document["test"] == document["test"]
    loaded = moert.load(folder, host_memory="50%", predictor=f"pre_attention,file={again}")
    with loaded, torch.no_grad():
        loaded(torch.arange(9)[None])


def test_hidden_states_are_those_of_the_model(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(40, 62)[None]
    with torch.no_grad():
        known = plain(ids, output_hidden_states=True).hidden_states[:-1]
    expected = torch.stack([scale(one[0]) for one in known], dim=1).numpy()
    with record_hidden(plain) as recording, torch.no_grad():
        plain(ids)
        np.testing.assert_allclose(recording.take(), expected, atol=2e-3)
        cache = plain(ids[:, :20]).past_key_values
        for place in (20, 21):
            plain(ids[:, place : place + 1], past_key_values=cache)
        np.testing.assert_allclose(recording.take(), expected, atol=4e-3)
        with pytest.raises(MoertError, match="different hidden states"):
            recording.take()
    assert not any(layer._forward_pre_hooks for layer in plain.model.layers), "hooks are left"
    with moert.load(folder, host_memory="50%") as loaded, record_hidden(loaded) as recording, torch.no_grad():
        loaded(ids)
        np.testing.assert_allclose(recording.take(), expected, atol=2e-3)


def test_a_model_without_blocks_is_refused() -> None:
    from families import build

    model = build("qwen3_moe")
    model.model.layers = torch.nn.ModuleDict({str(n): layer for n, layer in enumerate(model.model.layers)})
    with pytest.raises(UnsupportedModelError, match=r"what comes before the attention of .* is not known"):
        record_hidden(model).__enter__()


def refused(cli: Cli, *arguments: object) -> str:
    return cli("train-predictor", *arguments).error


def test_bad_input_is_one_line_and_leaves_nothing(
    cli: Cli, path: Path, folder: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    table = ("--predictor", "token_table", "-o", out)
    flow = ("--predictor", "expertflow", "-o", out)
    mapped = ("--predictor", "pre_attention", "-o", out)
    short = write(tmp_path / "short.safetensors", learnable(2, 40))
    few = write(tmp_path / "few.safetensors", learnable(10, 4))
    silent = write(tmp_path / "silent.safetensors", make_trace([300] * 5, ids=False))
    other = write(tmp_path / "other.safetensors", make_trace([300] * 5, model="other", config_hash="88"))
    before = left(tmp_path)
    assert "short.safetensors: too short to train on: 2 different sequences of 80 tokens" in refused(cli, short, *table)
    assert "10 sequences of 40 tokens in all, and the split leaves" in refused(cli, few, *table)
    assert "takes at least 2,000" in refused(cli, path, *flow)
    assert "learns from token ids, and 5 sequences of silent.safetensors have none" in refused(cli, silent, *flow)
    assert "hidden states, which a trace does not have" in refused(cli, path, *mapped)
    message = refused(cli, path, other, *table)
    assert (
        "trace.safetensors and other.safetensors are traces of different models: learnable (configuration 77" in message
    )
    assert "other (configuration 88" in message
    assert "is a model: give it texts to run with --prompts" in refused(cli, folder, *table)
    assert "--prompts is for a model" in refused(cli, path, *table, "--prompts", texts)
    assert "--hidden is for a trace" in refused(cli, folder, *mapped, "--prompts", texts, "--hidden", path)
    assert "give one model alone" in refused(cli, path, folder, *table)
    assert "does not exist; give a trace" in refused(cli, tmp_path / "no.safetensors", *table)
    assert "holds no hidden states" in refused(cli, path, *mapped, "--hidden", path)
    assert "no predictor named 'deep'" in refused(cli, path, "--predictor", "deep", "-o", out)
    assert "has no epochs" in refused(cli, path, *table, "--epochs", 3)
    assert "must be between 0 and 1" in refused(cli, path, *table, "--test", 1)
    assert "device 'moon' cannot be used" in refused(cli, texts_of_ids(tmp_path), *flow, "--device", "moon")
    assert left(tmp_path) == sorted([*before, "ids.safetensors"])


def texts_of_ids(folder: Path) -> Path:
    return write(folder / "ids.safetensors", learnable(60, 50))


def test_where_nothing_can_be_written_nothing_is_done(cli: Cli, path: Path, tmp_path: Path) -> None:
    table = ("--predictor", "token_table", "-o")
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    assert "is there already; give another name, or --overwrite" in refused(cli, path, *table, there)
    assert there.read_text() == "mine"
    assert "must end in .safetensors" in refused(cli, path, *table, tmp_path / "out.bin")
    assert "cannot write there" in refused(cli, path, *table, tmp_path / "no" / "out.safetensors")
    assert "must end in .png" in refused(cli, path, *table, tmp_path / "o.safetensors", "--plot", tmp_path / "c.gif")
    assert left(tmp_path) == ["there.safetensors", "trace.safetensors"]


INTERRUPTED = """
import os, signal, sys
import moert.training.loop as loop
step = loop._share
loop._share = lambda done, total: (os.kill(os.getpid(), signal.SIGINT) if done == 9 else None, step(done, total))[1]
from moert.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupt_leaves_nothing(folder: Path, texts: Path, tmp_path: Path) -> None:
    arguments = ["train-predictor", folder, "--prompts", texts, "--predictor", "pre_attention,batch=16", "-o"]
    out = tmp_path / "out.safetensors"
    child = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, arguments), str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode in (130, -signal.SIGINT), child.stderr
    assert "Traceback" not in child.stderr
    assert left(tmp_path) == ["texts.txt"]


def test_the_command_is_there_without_torch() -> None:
    code = "import sys\nfrom moert.cli import main\nmain(['train-predictor', '--help'])\nprint('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "expertflow, expertflow_routing, pre_attention, token_table" in " ".join(
        child.stdout.replace("│", " ").split()
    )
    assert child.stdout.splitlines()[-1] == "False"


def test_published_traces_have_no_token_ids(cli: Cli, tmp_path: Path) -> None:
    trace = real_trace("deepseek-v2-lite", "deepseek_v2_lite_summary.npz")
    options = ("--experts", 64, "--predictor", "expertflow", "-o", tmp_path / "out.safetensors")
    assert "have none; record the trace with" in refused(cli, trace, *options)
    assert left(tmp_path) == []


def test_json_is_one_document(cli: Cli, path: Path, tmp_path: Path) -> None:
    ran: Any = cli("train-predictor", path, "-o", tmp_path / "o.safetensors", "--predictor", "token_table", "--json")
    assert json.loads(ran.out)["best_epoch"] == 0
