"""Half an hour of everything at once: the same bits, no more memory, files or threads at the end, and no standstill."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import build, save, transpose_fused_experts
from pack_support import make_pack
from transformers import OlmoeConfig, OlmoeForCausalLM

SOAK_S = float(os.environ.get("MOERT_SOAK_S", "1800"))
SEED = int(os.environ.get("MOERT_SOAK_SEED", random.randrange(1 << 30)))
SLACK_S = 300

RSS_TOLERANCE_BYTES = 12 << 20
"""Of 400 MiB: the allocator's arenas, one for each thread that ever allocated, fill up over minutes. A model that stays
alive after each round, 0.4 MiB of dense weights, would be four times that in half an hour."""
MAPPINGS_TOLERANCE = 20
"""The same arenas, and their parts."""
FDS_TOLERANCE = 4
"""Closing is interrupted as well, in most rounds. A file whose closing was interrupted just before the call stays open:
closing the number again could close another one's file. That may happen a few times in half an hour; a file lost in
each round would be a hundred."""

THREADS_TOLERANCE = 1
"""Python's own `Thread.start` is interrupted too, and may then leave a thread that waits for ever to have started."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of 3 layers, a folder each; some are read where they lie, others converted as they are read."""
    root = tmp_path_factory.mktemp("soak")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    # Shards that a layer is spread over.
    OlmoeForCausalLM(config).save_pretrained(root / "shards", max_shard_size="300KB")
    assert len(list((root / "shards").glob("*.safetensors"))) > 4
    # An expert's gate and up do not lie side by side.
    save(build("mixtral"), root / "pieces")
    save(build("qwen3_vl_moe", dtype=torch.float16), root / "transposed")
    transpose_fused_experts(root / "transposed")
    for name in ("plain", "int8", "int4"):
        make_pack(root / "shards", root / f"pack_{name}", name)
    return root


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 2 * SLACK_S)
def test_soak(checkpoints: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), str(checkpoints), str(SOAK_S), str(SEED)]
    # One thread each: with more, torch's would fight with moert's for the processors and most of the time be lost.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SOAK_S + SLACK_S, env=environment)
    assert done.returncode == 0, f"seed {SEED}: {done.stderr[-20000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    print(f"seed {SEED}, {report['rounds']} rounds, {report['counts']}")
    # The first rounds import and compile what is imported and compiled once.
    kinds = 2 * len(list(checkpoints.iterdir()))
    rounds = len(report["samples"])
    samples = report["samples"][max(min(kinds, rounds // 2), rounds // 10) :]
    quarter = max(1, len(samples) // 4)
    medians = {
        name: [statistics.median(sample[name] for sample in part) for part in (samples[:quarter], samples[-quarter:])]
        for name in samples[0]
    }
    print(f"first and last quarter: {medians}")
    assert medians["fds"][1] <= medians["fds"][0] + FDS_TOLERANCE, medians
    assert medians["threads"][1] <= medians["threads"][0] + THREADS_TOLERANCE, medians
    assert medians["mappings"][1] <= medians["mappings"][0] + MAPPINGS_TOLERANCE, medians
    assert medians["rss_bytes"][1] <= medians["rss_bytes"][0] + RSS_TOLERANCE_BYTES, medians
    seen = report["counts"]
    for folder in checkpoints.iterdir():
        assert seen.get(f"rounds of {folder.name}"), f"{folder.name} had no turn: {seen}"
    for name in ("forward", "generate", "weights", "resize", "prefetch"):
        assert seen.get(f"{name} interrupted"), f"no {name} was interrupted: {seen}"
    assert seen.get("forward failed"), f"no read failed: {seen}"
