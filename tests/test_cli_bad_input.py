"""Bad input: exit code 2, one line on standard error with the names and numbers, nothing on standard output."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import PROMPT, Cli, checkpoint, tokenizer
from families import build, save

Change = Callable[[Path], object]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cli"


@pytest.fixture(params=["run", "verify"])
def attempt(request: pytest.FixtureRequest, cli: Cli) -> Callable[..., str]:
    """Tries both commands that open a model; returns the line they print."""

    def attempt_(folder: object, *options: object) -> str:
        prompt = [PROMPT] if request.param == "run" else ["--prompt", PROMPT]
        line = cli(request.param, folder, *prompt, *options).error
        left = [thread for thread in threading.enumerate() if thread.name.startswith("moert")]
        assert not left
        return line

    return attempt_


def settings(**changes: object) -> Change:
    """Changes config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def truncate(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100_000])


def remove(pattern: str) -> Change:
    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return change


def garble(folder: Path) -> None:
    (folder / "config.json").write_text("{ this is no JSON")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host-memory", "lots"], ["host_memory='lots'", "4GiB"]),
        (["--host-memory", "0"], ["host_memory='0'"]),
        (["--host-memory", "120%"], ["120%", "100%"]),
        (["--host-memory", "1KiB"], ["1.0 KiB", "1024 bytes", "2 experts", "raise host_memory"]),
        (["--host-memory", "13%"], ["1 of 8 experts", "one token needs 2", "25%"]),
        (["--policy", "belladonna"], ["belladonna", "lru"]),
        (["--policy", "no.such.module:Class"], ["no.such.module"]),
        (["--io-depth", "0"], ["io_depth=0", "1 to 64"]),
        (["--dtype", "float8"], ["float8", "bfloat16"]),
    ],
)
def test_options(options: list[str], words: list[str], attempt: Callable[..., str], root: Path) -> None:
    line = attempt(checkpoint(root), *options)
    for word in words:
        assert word in line


def test_device_memory_without_a_device(
    attempt: Callable[..., str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = attempt(checkpoint(root), "--device-memory", "8GiB")
    assert "device_memory='8GiB'" in line
    assert "CUDA" in line


def test_cache_folder_that_cannot_be_written(attempt: Callable[..., str], root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "cache", "/proc/self/cache"):
        line = attempt(checkpoint(root), "--cache-dir", folder)
        assert str(folder) in line
        assert "cannot write" in line


def test_cache_folder_that_is_not_there_yet_is_fine(cli: Cli, root: Path, tmp_path: Path) -> None:
    ran = cli("run", checkpoint(root), PROMPT, "--max-new-tokens", 1, "--cache-dir", tmp_path / "new" / "cache")
    assert ran.code == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["/nothing/here", "./nothing", "~/nothing/here/either"])
def test_missing_folder(name: str, attempt: Callable[..., str]) -> None:
    line = attempt(name)
    assert name in line
    assert "is not a folder" in line


def test_unknown_model_of_the_hub(attempt: Callable[..., str]) -> None:
    assert "'nobody/nothing'" in attempt("nobody/nothing")
    assert "no such folder here" in attempt("nobody/nothing"), "a path may have been meant"


def test_file_in_place_of_a_folder(attempt: Callable[..., str], root: Path) -> None:
    (file,) = checkpoint(root).glob("*.safetensors")
    assert f"{str(file)!r} is not a folder" in attempt(file)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", lambda _: None, ["LlamaForCausalLM", "dense model"]),
        ("olmoe", truncate, ["model.safetensors", "truncated"]),
        ("olmoe", remove("*.safetensors"), ["no weights"]),
        ("olmoe", remove("config.json"), ["config.json"]),
        ("olmoe", remove("tokenizer*"), ["tokenizer"]),
        ("olmoe", garble, ["config.json", "JSON"]),
        ("olmoe", settings(model_type="nonesuch", architectures=["NonesuchForCausalLM"]), ["nonesuch"]),
        ("olmoe", settings(hidden_size="wide"), ["hidden_size"]),
        ("olmoe", settings(hidden_size=128), ["64", "128"]),
        ("olmoe", settings(num_experts=16), ["16 experts", "8 tensors"]),
        ("olmoe", settings(quantization_config={"quant_method": "fp8"}), ["fp8", "quantised"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_checkpoints(
    family: str, change: Change, words: list[str], attempt: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint(root, family), tmp_path / "model"))
    change(folder)
    line = attempt(folder)
    for word in words:
        assert word in line


def test_unsupported_architecture(attempt: Callable[..., str], tmp_path: Path) -> None:
    save(build("jetmoe"), tmp_path)
    tokenizer().save_pretrained(tmp_path)
    line = attempt(tmp_path)
    assert "JetMoeForCausalLM" in line
    assert "JetMoeParallelExperts" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "MODEL", ""], ["prompt ''"]),
        (["run", "MODEL", "x", "--chat"], ["--chat", "no chat template"]),
        (["run", "MODEL", "x", "--top-p", "1.5"], ["--top-p=1.5"]),
        (["run", "MODEL", "x", "--temperature", "-1"], ["--temperature"]),
        (["verify", "MODEL", "--reference", "llama.cpp"], ["llama.cpp", "transformers, resident"]),
        (["verify", "MODEL", "--prompt", ""], ["prompt ''"]),
    ],
)
def test_arguments_of_one_command(arguments: list[str], words: list[str], cli: Cli, root: Path) -> None:
    line = cli(*(checkpoint(root) if word == "MODEL" else word for word in arguments)).error
    for word in words:
        assert word in line


def test_machine_readable_runs_say_errors_the_same_way(cli: Cli) -> None:
    for command in (["run", "/nothing", "x"], ["verify", "/nothing"], ["doctor", "/nothing"]):
        assert "is not a folder" in cli(*command, "--json").error


def test_what_cannot_be_kept_is_not_measured(cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setattr("moert.hf.calibrating.calibrate", lambda *_, **__: pytest.fail("measured for nothing"))
    assert (
        "cannot make the folder: '/dev/null/cache/moert/calibration'"
        in cli("doctor", checkpoint(root), "--calibrate").error
    )
