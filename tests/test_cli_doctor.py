"""`moert doctor`: what is there, which path is taken and why, and what a model needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Cli, Ran, checkpoint

import moert
from moert.cli import probes
from moert.cli.paths import choose_paths
from moert.config import OffloadConfig

PARTS = [
    "expert compute",
    "dense layers",
    "torch's threads",
    "disk reads",
    "host memory",
    "device memory",
    "GPU self-check",
    "pinned memory",
    "cache policy",
    "prediction",
]


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cli"


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """The command with short measurements."""
    monkeypatch.setattr(probes, "READ_SECONDS", 0.02)
    monkeypatch.setattr(probes, "SAMPLE_BYTES", 5 << 20)
    monkeypatch.setattr(probes, "ARENA_BYTES", 8 << 20)
    cli = Cli(capfd)
    return lambda *arguments: cli("doctor", *arguments)


def test_document_says_what_is_there(doctor: Callable[..., Ran], tmp_path: Path) -> None:
    ran = doctor("--json", "--cache-dir", tmp_path)
    assert ran.code == 0
    assert ran.err == ""
    document = ran.document
    assert document.keys() == {"versions", "cpu", "memory", "disks", "devices", "torch_threads", "model", "paths"}
    assert document["model"] is None
    assert document["versions"]["moert"] == moert.__version__
    assert document["versions"]["torch"] == torch.__version__
    cpu = document["cpu"]
    assert 1 <= cpu["cores_usable"] <= cpu["cores_machine"]
    assert cpu["features"].keys() >= {"avx2", "neon"}
    memory = document["memory"]
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]
    assert memory["available_bytes"] == min(limit["available_bytes"] for limit in memory["limits"])
    assert memory["read_bytes_per_s"] > 0
    disk = document["disks"]["cache"]
    assert disk["path"] == str(tmp_path)
    assert disk["read_bytes_per_s"] > 0
    assert isinstance(disk["direct"], bool)
    assert [path["part"] for path in document["paths"]] == PARTS
    assert all(path["path"] and path["why"] for path in document["paths"])
    assert not list(tmp_path.iterdir()), "the file that was measured is gone"


def test_people_read_the_same(doctor: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = doctor(checkpoint(root))
    assert ran.code == 0
    for words in (*PARTS, "processor", "file system", "OlmoeForCausalLM", "2 layers of 8, 2 for each token"):
        assert words in ran.out, words
    assert max(map(len, ran.out.splitlines())) <= 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_sizes_are_those_of_the_model(family: str, dtype: torch.dtype, doctor: Callable[..., Ran], root: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(root, family, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)
    parameters = dict(model.named_parameters())
    experts = sum(weight.nbytes for name, weight in parameters.items() if ".experts." in name)
    found = doctor(folder, "--json").document["model"]
    assert found["supported"] is True
    assert found["architecture"] == type(model).__name__
    assert found["dtype"] == str(dtype).removeprefix("torch.")
    assert (found["num_layers"], found["num_experts"], found["top_k"]) == (2, 8, 2)
    assert found["expert_bytes"] == experts
    assert found["bytes_of_one_expert"] == experts // 16
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert found["dense_bytes"] == sum(weight.nbytes for weight in parameters.values()) - experts + buffers
    assert found["default_host_bytes"] == found["host_bytes_for_all"] >= experts


def test_smallest_budget_is_the_smallest_that_works(doctor: Callable[..., Ran], root: Path) -> None:
    least = doctor(checkpoint(root), "--json").document["model"]["smallest_host_bytes"]
    with moert.load(checkpoint(root), host_memory=least) as model:
        assert moert.stats(model).slot_bytes == least
    with pytest.raises(moert.CapacityError, match=str(least)):
        moert.load(checkpoint(root), host_memory=least - 1)


def test_dtype_changes_what_is_needed(doctor: Callable[..., Ran], root: Path) -> None:
    folder = checkpoint(root, "olmoe", torch.bfloat16)
    half, whole = (doctor(folder, "--dtype", dtype, "--json").document["model"] for dtype in ("auto", "float32"))
    assert whole["expert_bytes"] == 2 * half["expert_bytes"]
    assert (half["read_in_place"], whole["read_in_place"]) == (True, False)


def test_checkpoint_disk_is_measured_on_its_own_files(doctor: Callable[..., Ran], root: Path) -> None:
    disks = doctor(checkpoint(root), "--json").document["disks"]
    assert disks["checkpoint"]["path"] == str(checkpoint(root))
    assert disks["checkpoint"]["read_bytes_per_s"] > 0


def damage(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])


def quantize(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(settings))


def remove_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("olmoe", damage, "truncated"),
        ("olmoe", quantize, "fp8"),
        ("olmoe", remove_weights, "finish the download"),
        ("llama", lambda _: None, "dense model"),
    ],
)
def test_model_that_cannot_run_is_explained(
    family: str, change: Callable[[Path], None], reason: str, doctor: Callable[..., Ran], root: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint(root, family), tmp_path / "model"))
    change(folder)
    ran = doctor(folder, "--json")
    assert ran.code == 0
    found = ran.document["model"]
    assert found["supported"] is False
    assert reason in found["reason"]
    assert "supported" in doctor(folder).out


def test_what_is_no_model_is_bad_input(doctor: Callable[..., Ran], tmp_path: Path) -> None:
    assert "is not a folder" in doctor("/nothing/here").error
    assert str(tmp_path) in doctor(tmp_path).error
    assert "no-such-model" in doctor("no-such-model").error


@pytest.mark.parametrize("part", ["cpu", "memory", "folder_disk", "devices", "torch_threads", "versions"])
def test_part_that_cannot_be_probed_says_so(
    part: str, doctor: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise PermissionError("not for you")

    fail.__name__ = part
    monkeypatch.setattr(probes, part, fail)
    ran = doctor("--json")
    assert ran.code == 0
    assert json.dumps({"problem": "PermissionError: not for you"})[1:-1] in json.dumps(ran.document)
    said = doctor()
    assert said.code == 0
    assert "not for you" in said.out


def test_unwritable_cache_folder_is_a_finding_of_the_probe(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = probes.probe(probes.folder_disk, "/proc/self/nothing")
    assert "problem" in found


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    for folder in ("proc/self", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    mounts = (
        "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
    )
    (tmp_path / "proc/self/mountinfo").write_text("\n".join(mounts) + "\n")
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/pod\n2:memory:/pod\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/pod\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_quota_of_processor_time(files: dict[str, str], quota: float | None, machine: Path) -> None:
    write(machine, files)
    assert probes.cpu_quota_cores(machine) == quota


def test_quota_limits_the_usable_cores(machine: Path) -> None:
    write(
        machine,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: A Processor\n",
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "60000 100000",
        },
    )
    found = probes.cpu(machine)
    assert (found["model"], found["cores_quota"], found["cores_usable"]) == ("A Processor", 0.6, 1)


def paths_of(document: dict[str, Any], **options: Any) -> dict[str, tuple[str, str]]:
    found = choose_paths(document, OffloadConfig(**options))
    return {path["part"]: (path["path"], path["why"]) for path in found}


def machine_with(**changes: Any) -> dict[str, Any]:
    return {
        "cpu": {"features": {"avx512_bf16": True, "amx_bf16": False}, "kernel": "avx2"},
        "memory": {"arena_huge_bytes": 8 << 20, "arena_bytes": 8 << 20, "huge_pages": "madvise"},
        "disks": {"cache": {"direct": True, "file_system": "ext4"}},
        "devices": {"devices": [], "why": "this build of torch has no CUDA"},
        "torch_threads": {"count": 2, "spinning_s": 0.0003, "settings": {"GOMP_SPINCOUNT": "10000"}},
        "model": None,
        **changes,
    }


def test_paths_follow_what_was_found() -> None:
    paths = paths_of(machine_with())
    assert "avx2 kernel" in paths["expert compute"][0]
    assert "bfloat16" in paths["expert compute"][0]
    assert "avx512_bf16" in paths["expert compute"][1]
    assert "O_DIRECT, 4 threads" in paths["disk reads"][0]
    assert "2 MiB" in paths["host memory"][0]
    assert paths["device memory"] == ("none", "this build of torch has no CUDA")

    slow = machine_with(
        cpu={"problem": "?"},
        memory={"arena_huge_bytes": 0, "arena_bytes": 8 << 20, "huge_pages": "never"},
        disks={"cache": {"direct": False, "file_system": "overlay"}},
        devices={"devices": [{"name": "H200"}], "why": None},
        model={"dtype": "bfloat16", "default_host_bytes": 1 << 30},
    )
    paths = paths_of(slow, io_depth=2)
    assert "no instructions for bfloat16" in paths["expert compute"][1]
    assert "page cache, 2 threads" in paths["disk reads"][0]
    assert "overlay" in paths["disk reads"][1]
    assert "4 KiB" in paths["host memory"][0]
    assert "switched off" in paths["host memory"][1]
    assert "H200 stays idle" in paths["device memory"][1]
    assert "have not run experts on a GPU" in paths["GPU self-check"][1]
    assert "1.0 GiB by default" in paths["cache policy"][1]
    assert "--no-direct-io" in paths_of(slow, direct_io=False)["disk reads"][1]
    plain = paths_of(machine_with(model={"dtype": "float32", "unfused_reasons": []}))
    assert "avx2 kernels, whole layers" in plain["expert compute"][0]
    assert "full width" in plain["expert compute"][1]
    assert "torch" in plain["dense layers"][0]
    own_gate = paths_of(machine_with(model={"dtype": "bfloat16", "unfused_reasons": ["its gate is odd"]}))
    assert own_gate["expert compute"][0].startswith("expert by expert through the model's own gate")
    assert "its gate is odd" in own_gate["expert compute"][1]
    threads = {"features": {}, "kernel": "neon", "compute_threads": {"count": 3, "why": "MOERT_THREADS is 3"}}
    assert "3 threads: MOERT_THREADS is 3" in paths_of(machine_with(cpu=threads))["expert compute"][1]
    unknown = machine_with(memory={"problem": "?"}, devices={"problem": "?"}, disks={"cache": {"problem": "?"}})
    assert all("could not be probed" in paths_of(unknown)[part][1] for part in ("disk reads", "host memory"))


@pytest.mark.parametrize(
    ("found", "path", "why"),
    [
        ({"count": 2, "spinning_s": 0.0082, "settings": {}}, "spin for 8.2 ms", "set GOMP_SPINCOUNT=10000"),
        ({"count": 2, "spinning_s": 0.0003, "settings": {"GOMP_SPINCOUNT": "10000"}}, "rest 0.3 ms", "imported before"),
        ({"count": 2, "spinning_s": 0.0, "settings": {"OMP_WAIT_POLICY": "passive"}}, "rest 0.0 ms", "have the cores"),
        ({"count": 1, "spinning_s": 0.0, "settings": {}}, "one", "OMP_NUM_THREADS"),
        ({"problem": "?"}, "unknown", "could not be probed"),
    ],
)
def test_what_spins_is_said_with_what_ends_it(found: dict[str, Any], path: str, why: str) -> None:
    said = paths_of(machine_with(torch_threads=found))["torch's threads"]
    assert path in said[0]
    assert why in said[1]
