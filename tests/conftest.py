"""Settings and tiny checkpoints that many tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from families import Zoo

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Models as small as these gain nothing by more, and where several processes test, torch's threads spend most of their
# time waiting for one another. Read when torch is imported, and by what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else MKL, on AMD's processors, gives other bits where a tensor lies elsewhere, and torch is compared with itself to
# the bit: a model with what has been saved and read again.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
# Where lines break is no matter of the terminal in which the tests run.
os.environ["COLUMNS"] = "80"

import pytest
import torch
from hypothesis import HealthCheck, settings

from moert import _C

# Triton's kernels are made for its interpreter or for a GPU when triton is imported, which nothing has done yet.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says more of the machine than of the test.
settings.register_profile("moert", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moert")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    # Tests that look at what is left behind collect garbage, and need not go through all that was imported each time.
    gc.collect()
    gc.freeze()


@pytest.fixture
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' modules can be imported by their names, as their scripts do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))


@pytest.fixture(params=_C.isa_names(False).split())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set this build has kernels for, in use while the test runs; skipped where it cannot be."""
    before = _C.isa()
    if request.param not in _C.isa_names(True).split():
        pytest.skip(f"this processor has no {request.param}")
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


@pytest.fixture(scope="session")
def tiny_olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OLMoE of 2 layers, 8 experts, top-2, D = 64, F = 32 in fp32, in several shards with an index. Read only."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "olmoe"
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    OlmoeForCausalLM(config).save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Tiny models of every family, built and saved when first asked for. Read only."""
    from families import zoo_at

    return zoo_at(tmp_path_factory.getbasetemp() / "families")


@pytest.fixture
def load(zoo: Zoo) -> Iterator[Callable[..., Any]]:
    """`load(family_or_path, **options)`: the checkpoint loaded by moert, closed when the test ends."""
    import moert

    loaded = []

    def _load(family: str | Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
        dtype = dtype or torch.float32
        path = zoo.specimen(family, dtype).path if isinstance(family, str) else family
        loaded.append(moert.load(path, dtype=dtype, **{"host_memory": "25%", **options}))
        return loaded[-1]

    yield _load
    for model in loaded:
        moert.close(model)


@pytest.fixture(params=["load", "patch"])
def offloaded(request: pytest.FixtureRequest, tiny_olmoe: Path) -> Iterator[Callable[..., Any]]:
    """`offloaded(**options)`: the tiny model, loaded by moert or patched, closed when the test ends."""
    from transformers import OlmoeForCausalLM

    import moert

    models = []

    def make(**options: Any) -> Any:
        if request.param == "load":
            models.append(moert.load(tiny_olmoe, **options))
        else:
            models.append(moert.patch(OlmoeForCausalLM.from_pretrained(tiny_olmoe), **options))
        return models[-1]

    yield make
    for model in models:
        moert.close(model)
