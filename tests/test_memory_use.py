"""How much memory a run takes: the dense weights, the budget, and a fixed allowance."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# One process writes the checkpoint.
pytestmark = pytest.mark.xdist_group("memory")

ROOT = Path(__file__).parent.parent
ALLOWANCE_BYTES = 300 << 20

RUN = """
    import json, sys, torch, moert
    from transformers import OlmoeForCausalLM
    from moert.tiers.memory import peak_rss_bytes
    folder, tiny, budget = sys.argv[1:]
    ids = torch.arange(3, 35)[None]
    # The libraries and the code paths of a run are in memory from here on.
    OlmoeForCausalLM.from_pretrained(tiny).generate(ids, max_new_tokens=4, do_sample=False)
    before = peak_rss_bytes()
    model = moert.load(folder, host_memory=budget)
    model.generate(ids, max_new_tokens=16, do_sample=False)
    stats = moert.stats(model)
    dense = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    print(json.dumps(dict(
        grown=peak_rss_bytes() - before, dense=dense, experts=stats.expert_bytes, slots=stats.slot_bytes,
        misses=stats.misses, hits=stats.hits,
    )))
"""


@pytest.fixture(scope="module")
def half_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLMoE, 8 layers of 32 experts, 0.8 GB of experts in bf16."""
    folder = tmp_path_factory.mktemp("memory") / "olmoe"
    command = [sys.executable, "bench/make_checkpoint.py", "olmoe-bench", str(folder), "--experts", "32"]
    subprocess.run([*command, "--set", "vocab_size=512"], cwd=ROOT, check=True, capture_output=True, timeout=200)
    return folder


@pytest.mark.parametrize("budget", ["25%", "210MB"])
def test_peak_memory_is_dense_weights_plus_budget(budget: str, half_gigabyte: Path, tiny_olmoe: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN), str(half_gigabyte), str(tiny_olmoe), budget],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = json.loads(done.stdout.strip().splitlines()[-1])
    bound = run["dense"] + run["slots"] + ALLOWANCE_BYTES
    assert run["grown"] < bound
    assert run["slots"] <= (210_000_000 if budget == "210MB" else 1.01 * 0.25 * run["experts"])
    assert run["dense"] + run["experts"] > bound, "the whole model would have fitted: this test shows nothing"
    assert run["misses"] > 0
