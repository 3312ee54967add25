"""`moert trace info` and `moert trace import`, and next-token reuse."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Cli
from hypothesis import given
from hypothesis import strategies as st
from trace_support import make_header, random_sequence, real_trace

from moert.trace import NO_EXPERT, LayerInfo, Phase, Sequence, TraceFile, TraceHeader, TraceWriter
from moert.trace.reuse import Reuse

HEADER = TraceHeader(
    layers=(LayerInfo("model.layers.0.mlp", 8, 2, 4, 1024), LayerInfo("model.layers.1.mlp", 6, 1, 1, 2048)),
    model="org/model",
    config_hash="abc",
    sampled=True,
)
WASTE = '{"tok": 0, "layers": [[0, 1], [2, 3]]}\n{"tok": 1, "layers": [[1, 2], [4, 5]]}\n'


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "trace.safetensors"
    with TraceWriter(path, HEADER) as writer:
        writer.add(random_sequence(HEADER, 5, rng, num_prompt=3, optional=["weights", "token_ids"]))
        writer.add(random_sequence(HEADER, 4, rng, num_prompt=0, optional=["weights"], first_step=1))
    return path


def brute_force(experts: Any, kept: list[bool]) -> list[float | None]:
    """Reuse of each layer of ids [T, L, K], from sets."""
    shares: list[float | None] = []
    for layer in range(experts.shape[1]):
        sets = [set(row[layer].tolist()) - {NO_EXPERT} for row in experts]
        pairs = [
            (before, after)
            for (before, a), (after, b) in itertools.pairwise(zip(sets, kept, strict=True))
            if before and after and a and b
        ]
        picks = sum(len(after) for _, after in pairs)
        shares.append(sum(len(before & after) for before, after in pairs) / picks if picks else None)
    return shares


@given(st.integers(0, 2**32), st.integers(1, 600), st.booleans())
def test_reuse_is_what_sets_say(seed: int, num_tokens: int, gaps: bool) -> None:
    header = make_header((5, 3), (9, 2))
    rng = np.random.default_rng(seed)
    sequence = random_sequence(header, min(num_tokens, 40), rng, gaps=gaps)
    repeats = rng.integers(0, len(sequence.steps), num_tokens)
    phases = rng.integers(0, 3, num_tokens).astype(np.uint8)
    sequence = Sequence(sequence.experts[repeats], np.arange(num_tokens), phases)
    reuse = Reuse(2)
    reuse.add(sequence)
    assert reuse.per_layer == brute_force(sequence.experts, (phases != Phase.PADDING).tolist())


@pytest.mark.parametrize(
    ("name", "experts", "published"), [("trace_olmoe_299", 64, 43.5), ("trace_kimi_300", 256, 33.6)]
)
def test_reuse_of_real_traces_is_as_published(
    cli: Cli, tmp_path: Path, name: str, experts: int, published: float
) -> None:
    source, path = real_trace("waste", f"{name}.jsonl"), tmp_path / "trace.safetensors"
    assert cli("trace", "import", source, "-o", path, "--experts", experts, "--json").code == 0
    (found,) = cli("trace", "info", path, "--json").document["traces"]
    assert 100 * found["next_token_reuse"] == pytest.approx(published, abs=0.05)
    rows = [json.loads(line)["layers"] for line in source.read_text().splitlines() if line]
    shares = [
        len(set(a) & set(b)) / len(b)
        for before, after in itertools.pairwise(rows)
        for a, b in zip(before, after, strict=True)
    ]
    assert found["next_token_reuse"] == pytest.approx(sum(shares) / len(shares), abs=1e-12)


def test_info_as_json(cli: Cli, trace: Path) -> None:
    ran = cli("trace", "info", trace, trace, "--json")
    assert ran.code == 0
    found, again = ran.document["traces"]
    assert found == again
    with TraceFile(trace) as file:
        expected = [brute_force(sequence.experts, [True] * len(sequence.steps)) for sequence in file]
    assert found["model"] == "org/model"
    assert (found["sequences"], found["tokens"], found["steps"]) == (2, 9, 5)
    assert found["tokens_by_phase"] == {"prefill": 3, "decode": 6, "padding": 0}
    assert found["sequences_with"] == {"weights": 2, "scores": 0, "token_ids": 1}
    assert (found["sampled"], found["reduced"], found["top_k"]) == (True, True, 2)
    assert found["bytes"] == trace.stat().st_size
    first = found["layers"][0]
    assert {**first, "next_token_reuse": None} == {
        "name": "model.layers.0.mlp",
        "num_experts": 8,
        "top_k": 2,
        "native_top_k": 4,
        "expert_bytes": 1024,
        "next_token_reuse": None,
    }
    weighted = (4 * (expected[0][0] or 0) + 3 * (expected[1][0] or 0)) / 7
    assert first["next_token_reuse"] == pytest.approx(weighted)


def test_info_as_text(cli: Cli, trace: Path) -> None:
    ran = cli("trace", "info", trace)
    assert ran.code == 0
    for text in (
        "org/model",
        "2, 6 to 8 experts each",
        "fewer than the model was trained with",
        "1.0 KiB to 2.0 KiB",
        "3 prefill, 6 decode",
        "chosen by the model",
        "experts, weights, token ids of 1",
        "next-token reuse",
    ):
        assert text in " ".join(ran.out.split()), text


def test_info_without_reading_the_experts(cli: Cli, trace: Path) -> None:
    data = bytearray(trace.read_bytes())
    data[-1] = 77  # an id that no layer has
    trace.write_bytes(data)
    assert cli("trace", "info", trace, "--quick").code == 0
    line = cli("trace", "info", trace).error
    assert f"{trace}: tensor 'experts.1': token 3, layer 1" in line


def test_import_reports_what_it_made(cli: Cli, tmp_path: Path) -> None:
    source, out = tmp_path / "x.jsonl", tmp_path / "out.safetensors"
    source.write_text(WASTE)
    ran = cli("trace", "import", source, "-o", out, "--experts", 8, "--model", "m", "--native-top-k", 2)
    assert ran.code == 0
    assert "1, 2 tokens" in " ".join(ran.out.split())
    found = cli("trace", "import", source, source, "-o", out, "--experts", 8, "--format", "waste", "--json").document
    assert found == {
        "trace": str(out),
        "formats": ["waste", "waste"],
        "model": "",
        "num_layers": 2,
        "top_k": 2,
        "sequences": 2,
        "tokens": 4,
        "bytes": out.stat().st_size,
    }


def test_import_options_reach_the_importer(cli: Cli, tmp_path: Path) -> None:
    source, out = tmp_path / "x.npz", tmp_path / "out.safetensors"
    header = make_header((8, 2))
    rng = np.random.default_rng(0)
    sequences = [random_sequence(header, 3, rng, optional=["weights"]) for _ in range(2)]
    np.savez(
        source,
        meta_json=np.array('[{"repetition": true}, {"repetition": false}]'),
        **{f"experts_{index}": sequence.experts for index, sequence in enumerate(sequences)},
        **{f"weights_{index}": sequence.weights for index, sequence in enumerate(sequences)},  # type: ignore[arg-type]
    )
    options = ("--experts", 8, "--no-repetition", "--phase", "prefill", "--without", "weights, scores")
    assert cli("trace", "import", source, "-o", out, *options).code == 0
    with TraceFile(out) as trace:
        (sequence,) = trace
    np.testing.assert_array_equal(sequence.experts, sequences[1].experts)
    assert sequence.weights is None
    assert sequence.steps.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "x.jsonl"), "Missing option '--out' / '-o'"),
        (("import", "-o", "out"), "Missing argument 'FILE...'"),
        (("import", "x.jsonl", "-o", "out"), "x.jsonl does not say the model's number of experts a layer"),
        (("import", "x.jsonl", "-o", "out", "--experts", "0"), "--experts=0 must be at least 1"),
        (("import", "x.jsonl", "-o", "out", "--experts", "-5"), "--experts=-5 must be at least 1"),
        (("import", "x.jsonl", "-o", "out", "--experts", "1e9"), "Invalid value for '--experts'"),
        (("import", "x.jsonl", "-o", "out", "--experts", "99999999"), "99999999 experts; a layer has 1 to 65535"),
        (("import", "x.jsonl", "-o", "out", "--native-top-k", "0"), "--native-top-k=0 must be"),
        (("import", "x.jsonl", "-o", "out", "--phase", "both"), "--phase='both' must be one of decode, prefill"),
        (("import", "x.jsonl", "-o", "out", "--without", "ids"), "'ids' is none of token_ids, weights, scores"),
        (("import", "x.jsonl", "-o", "out", "--format", "no"), "no importer named 'no'"),
        (("import", "x.jsonl", "-o", "out", "--format", "npz", "--experts", "8"), "x.jsonl: archive: cannot be read"),
        (("import", "missing", "-o", "out"), "missing does not exist"),
        (("import", "bad.jsonl", "-o", "out", "--experts", "8"), "bad.jsonl: line 2: layer 1: id 8"),
        (("import", "x.jsonl", "-o", "nowhere/out", "--experts", "8"), "No such file or directory"),
        (("info",), "Missing argument 'FILE...'"),
        (("info", "x.jsonl"), "no trace of moert's; traces of other programs are read by `moert trace import`"),
        (("info", "missing"), "No such file"),
        (("info", "empty"), "0 bytes are too few"),
        ((), "Missing command"),
        (("nothing",), "No such command 'nothing'"),
    ],
)
def test_bad_input(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text(WASTE)
    Path("bad.jsonl").write_text(WASTE.replace("5]", "8]"))
    Path("empty").touch()
    before = sorted(os.listdir())
    assert message in cli("trace", *arguments).error
    assert sorted(os.listdir()) == before


def test_help_needs_no_numpy() -> None:
    code = (
        "import sys, moert.trace; from moert.cli import main; main(['trace', 'import', '--help']); "
        "print(sorted({'torch', 'transformers', 'numpy', 'numba'} & set(sys.modules)), file=sys.stderr)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert child.stderr.strip() == "[]"
    assert "waste" in child.stdout


GROWTH = """
import os, sys
import numpy as np
from moert.trace import LayerInfo, Sequence, TraceFile, TraceHeader, TraceWriter
from moert.trace.reuse import Reuse

path, count, tokens = sys.argv[1], int(sys.argv[2]), 256
header = TraceHeader(tuple(LayerInfo(str(layer), 128, 8) for layer in range(48)))
experts = np.arange(tokens * 48 * 8, dtype=np.int32).reshape(tokens, 48, 8) % 128

def work(count):
    with TraceWriter(path, header) as writer:
        for index in range(count):
            writer.add(Sequence(experts, np.arange(tokens) + index * tokens, np.ones(tokens, np.uint8)))
    reuse = Reuse(48)
    with TraceFile(path) as trace:
        assert trace.n_tokens == count * tokens
        for sequence in trace:
            reuse.add(sequence)

def peak():
    # Not ru_maxrss: a child begins with its parent's.
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

work(3)
before = peak()
work(count)
print(peak() - before, os.path.getsize(path))
"""


@pytest.mark.parametrize(
    "sequences", [pytest.param(300, id="30 MB"), pytest.param(2000, id="200 MB", marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_trace(tmp_path: Path, sequences: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "trace"), str(sequences)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    growth, nbytes = map(int, child.stdout.split())
    assert nbytes > sequences * 256 * 48 * 8
    assert growth < 6 << 20, f"memory grew by {growth} bytes for a trace of {nbytes}"


def test_an_importer_of_ones_own(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_traces.py").write_text(
        "import numpy as np\n"
        "from moert.trace import LayerInfo, Sequence, TraceHeader\n"
        "from moert.trace.importers.base import Importer, checked, tokens_of\n"
        "class Mine(Importer):\n"
        "    def recognises(self, path):\n"
        "        return path.suffix == '.mine'\n"
        "    def read(self, path, options):\n"
        "        header = TraceHeader((LayerInfo('only', options.need('experts', path), 1),), source='mine')\n"
        "        ids = np.array([int(word) for word in path.read_text().split()], dtype=np.int32).reshape(-1, 1, 1)\n"
        "        phases, steps = tokens_of(options.phase, len(ids), 0)\n"
        "        return header, iter([checked(Sequence(ids, steps, phases), header, path, 'line 1')])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "x.mine").write_text("1 2 2")
    arguments = ("trace", "import", tmp_path / "x.mine", "-o", tmp_path / "out", "--format", "my_traces:Mine")
    assert cli(*arguments, "--experts", 3).code == 0
    (found,) = cli("trace", "info", tmp_path / "out", "--json").document["traces"]
    assert (found["source"], found["tokens"], found["next_token_reuse"]) == ("mine", 3, 0.5)
    assert "token 1, layer 0: id 2" in cli(*arguments, "--experts", 2).error


def test_padding_is_no_token_of_the_text() -> None:
    header = make_header((4, 1))
    sequence = random_sequence(header, 3, np.random.default_rng(0))
    sequence = replace(sequence, phases=np.array([2, 1, 1], dtype=np.uint8), experts=np.zeros((3, 1, 1), np.int32))
    reuse = Reuse(1)
    reuse.add(sequence)
    assert (reuse.picks.tolist(), reuse.mean) == ([1], 1.0)
