"""`moert pack` on the command line, and the other commands on what it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_support import PROMPT, Cli, checkpoint, plain_tokens


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cli"


def test_pack_then_run_and_verify(cli: Cli, root: Path, tmp_path: Path) -> None:
    folder, out = checkpoint(root), tmp_path / "pack"
    made = cli("pack", folder, out, "--json").document
    assert made == {
        "model": str(folder),
        "pack": str(out),
        "format": "plain",
        "dtype": "float32",
        "num_layers": 2,
        "expert_bytes": 2 * 8 * 3 * 64 * 32 * 4,
        "packed_bytes": 2 * 8 * 3 * 64 * 32 * 4,
        "dense_bytes": made["dense_bytes"],
        "files": 3,
        "files_kept": 0,
        "total_s": made["total_s"],
    }
    ran = cli("run", out, PROMPT, "--max-new-tokens", 8, "--host-memory", "25%", "--json").document
    assert ran["token_ids"] == plain_tokens(folder, PROMPT, 8)
    document = cli("verify", out, "--host-memory", "25%", "--max-new-tokens", 8, "--json").document
    assert (document["passed"], document["reference"], document["decoded_compared"]) == (True, "transformers", 0)
    checked = cli("pack", out, "--verify", "--json").document
    assert (checked["passed"], checked["records"], checked["files"]) == (True, 16, 3)
    assert (checked["source"], checked["source_is_the_same"]) == (str(folder), True)


@pytest.mark.parametrize(("stored_as", "tolerance"), [("int4,symmetric=false", 0.05), ("fp8", 2**-6)])
def test_verify_of_a_quantised_pack(stored_as: str, tolerance: float, cli: Cli, root: Path, tmp_path: Path) -> None:
    folder, out = checkpoint(root, "olmoe", torch.bfloat16), tmp_path / "pack"
    assert cli("pack", folder, out, "--format", stored_as).code == 0
    ran = cli("verify", out, "--host-memory", "25%", "--max-new-tokens", 8, "--json")
    document = ran.document
    assert ran.code == 0
    assert document["passed"]
    assert (document["reference"], document["max_abs_logit_error"]) == ("resident", 0)
    assert (document["decoded_compared"], document["decoded_tolerance"]) == (2, tolerance)
    assert 0 < document["max_decoded_error"] <= tolerance
    said = cli("verify", out, "--host-memory", "25%", "--max-new-tokens", 4).out
    assert "from their decoded weights' result" in said
    error = cli("verify", out, "--reference", "transformers").error
    assert stored_as.split(",", maxsplit=1)[0] in error
    model = cli("doctor", out, "--json").document["model"]
    assert model["stored_as"].startswith(stored_as.split(",", maxsplit=1)[0])
    assert model["expert_bytes"] < 0.6 * (2 * 8 * 3 * 64 * 32 * 2)


def test_verify_notices_experts_that_are_not_their_decoded_weights(
    cli: Cli, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moert.runtime.storage import Storage

    right = Storage.decode
    monkeypatch.setattr(Storage, "decode", lambda *args: {name: tensor * 1.1 for name, tensor in right(*args).items()})
    cli("pack", checkpoint(root), tmp_path / "pack", "--format", "int8")
    ran = cli("verify", tmp_path / "pack", "--host-memory", "25%", "--max-new-tokens", 2, "--json")
    assert ran.code == 1
    assert ran.document["identical_tokens"]
    assert not ran.document["decoded_within_tolerance"]


def test_people_read_what_was_made(cli: Cli, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    ran = cli("pack", checkpoint(root), out, "--format", "int8")
    assert ran.code == 0
    for words in (str(out), "int8, computed in float32", "moert run"):
        assert words in ran.out
    assert "sound" in cli("pack", out, "--verify").out
    path = out / "experts-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5000] ^= 1
    path.write_bytes(raw)
    ran = cli("pack", out, "--verify")
    assert ran.code == 1
    assert "expert 7 has the checksum" in ran.out
    assert cli("pack", checkpoint(root, "mixtral"), out, "--verify", "--json").document["source_is_the_same"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "MODEL"], ["OUT is missing"]),
        (["pack", "MODEL", "OUT", "--format", "int5"], ["int5", "int4"]),
        (["pack", "MODEL", "OUT", "--format", "int4,group=128"], ["model.layers.0.mlp.experts", "multiple of 128"]),
        (["pack", "MODEL", "OUT", "--dtype", "int8"], ["--dtype='int8'"]),
        (["pack", "/nothing/here", "OUT"], ["is not a folder"]),
        (["pack", "MODEL", "MODEL"], ["is the model itself"]),
        (["pack", "MODEL", "--verify"], ["it is no pack"]),
        (["pack", "LLAMA", "OUT"], ["dense model"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str], cli: Cli, root: Path, tmp_path: Path) -> None:
    places = {"MODEL": checkpoint(root), "LLAMA": checkpoint(root, "llama"), "OUT": tmp_path / "out"}
    line = cli(*(places.get(word, word) for word in arguments)).error
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir())
