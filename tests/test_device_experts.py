"""Patched models whose experts are on a GPU, against the same models as transformers run them.

Without a GPU the whole path runs on the CPU, its kernels under Triton's interpreter.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_support
from families import SUPPORTED_FAMILIES, build, experts_modules, greedy_tokens, inputs_for, logits
from torch.utils._python_dispatch import TorchDispatchMode

import moert
from moert.errors import ConfigError, KernelUnavailableError, MoertError, UnsupportedModelError
from moert.formats import TensorSpec
from moert.hf.device_experts import DeviceExperts, check_layers
from moert.kernels import _launch, grouped_gate_up
from moert.kernels.gate import Gate
from moert.policies import make_policy
from moert.residency import Residency
from moert.runtime import device_layer
from moert.runtime.fused import FfnLayout, FusedExperts
from moert.runtime.layer import LayerSpec

# Biased, interleaved, clamped and transposed; with shared experts; transposed alone; with experts that return their
# input; ungated. Those that are slow are as OLMoE is.
KERNEL_FAMILIES = (
    "olmoe",
    pytest.param("qwen3_moe", marks=pytest.mark.slow),
    pytest.param("mixtral", marks=pytest.mark.slow),
    "gpt_oss",
    "deepseek_v3",
    "aria",
    "longcat_flash",
    "nemotron_h",
)

# Sums are in another order than those of the model's own loop, in fp32 both.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the experts are that the kernels compute."""
    if request.param == "cuda":
        return "cuda"
    if not triton_support.INTERPRETED:
        pytest.skip("triton's interpreter is off: there is a GPU")
    monkeypatch.setattr(device_layer, "DEVICE_TYPES", {"cpu"})
    return "cpu"


@pytest.fixture
def olmoe(device: str) -> Iterator[Any]:
    """A patched OLMoE."""
    model = build("olmoe").to(device)
    moert.patch(model)
    yield model
    moert.close(model)


def moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def prompts(family: str, model: Any, device: str, rows: int, length: int) -> dict[str, Any]:
    inputs = inputs_for(family, model)
    generator = torch.Generator().manual_seed(length)
    inputs["input_ids"] = torch.randint(3, 90, (rows, length), generator=generator)
    return moved(inputs, device)


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same computation a second time. On a GPU transformers adds up in no fixed order."""
    if got.is_cuda:
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    else:
        assert torch.equal(got, wanted)


@torch.no_grad()
def own_experts(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Pick by pick, each by the model's own code with one token; nothing for ids that are no experts."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    one = torch.ones(1, 1, device=hidden.device, dtype=weights.dtype)
    for token, (row, of_row) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(row, of_row, strict=True):
            if 0 <= expert < module.num_experts:
                pick = torch.tensor([[expert]], device=hidden.device)
                out[token] += weight * module(hidden[token : token + 1], pick, one)[0].double().cpu()
    return out


@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_logits_are_those_of_transformers(family: str, device: str) -> None:
    model = build(family).to(device)
    steps = [prompts(family, model, device, rows, length) for rows, length in ((1, 1), (2, 20))]
    wanted = [logits(model, inputs) for inputs in steps]
    modules = dict(experts_modules(model))
    kept = {path: {n: (p, p.data_ptr(), p.clone()) for n, p in m.named_parameters()} for path, m in modules.items()}

    moert.patch(model)
    offloaded = [module for module in model.modules() if isinstance(module, DeviceExperts)]
    assert len(offloaded) == len(modules)
    for inputs, logits_of_own in zip(steps, wanted, strict=True):
        torch.testing.assert_close(logits(model, inputs), logits_of_own, **TOLERANCE)
    stats = moert.stats(model)
    assert stats.device_steps == 2 * len(modules)
    assert all(layer.fallback is None and layer.device_steps == 2 for layer in stats.layers)

    moert.unpatch(model)
    assert dict(experts_modules(model)) == modules
    for path, module in modules.items():
        for name, parameter in module.named_parameters():
            before, address, values = kept[path][name]
            assert parameter is before and parameter.data_ptr() == address and torch.equal(parameter, values)
    same(logits(model, steps[1]), wanted[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_family(family: str, device: str) -> None:
    model = build(family).to(device)
    inputs = moved(inputs_for(family, model), device)
    wanted = logits(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        moert.patch(model)
    torch.testing.assert_close(logits(model, inputs), wanted, **TOLERANCE)
    moert.unpatch(model)
    same(logits(model, inputs), wanted)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_greedy_tokens_are_those_of_transformers(family: str, device: str) -> None:
    model = build(family).to(device)
    inputs = prompts(family, model, device, 1, 7)
    wanted = greedy_tokens(model, inputs, 4)
    with moert.patch(model):
        assert torch.equal(greedy_tokens(model, inputs, 4), wanted)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_in_bf16_the_error_is_no_larger_than_that_of_transformers(family: str, device: str) -> None:
    """Against the same bf16 weights in fp64, one experts module at a time."""
    model = build(family, dtype=torch.bfloat16).to(device)
    path, module = experts_modules(model)[0]
    torch.manual_seed(0)
    hidden = torch.randn(24, next(module.parameters()).shape[-1 if family == "qwen3_moe" else 1], device=device)
    hidden = hidden.bfloat16()
    ids = torch.rand(24, module.num_experts, device=device).topk(2).indices
    weights = torch.rand(24, 2, device=device).softmax(-1)
    with torch.no_grad():
        own = module(hidden, ids, weights.bfloat16())
    copy = build(family).double()
    copy.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    exact = own_experts(copy.get_submodule(path).to(device), hidden.double(), ids, weights.double())
    moert.patch(model)
    replaced = model.get_submodule(path)
    for tokens in (24, 1):
        got = replaced(hidden[:tokens], ids[:tokens], weights[:tokens])
        assert got.dtype == torch.bfloat16
        scale = exact[:tokens].norm()
        error = (got.double().cpu() - exact[:tokens]).norm() / scale
        assert error <= max(2**-8, 1.1 * float((own[:tokens].double().cpu() - exact[:tokens]).norm() / scale))
    moert.close(model)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("tokens", [1, 5, 24])
def test_ids_of_no_expert_add_nothing(family: str, tokens: int, device: str) -> None:
    model = build(family).to(device)
    path, module = experts_modules(model)[0]
    experts = module.num_experts
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 64, device=device)
    ids = torch.rand(tokens, experts, device=device).topk(4).indices
    strange = torch.tensor([experts, -1, 2**40, -(2**40), experts + 1], device=device)
    ids[:, 1] = strange[torch.arange(tokens, device=device) % len(strange)]
    weights = torch.rand(tokens, 4, device=device)
    weights[:, 2] = 0
    wanted = own_experts(module, hidden, ids, weights)
    moert.patch(model)
    replaced = model.get_submodule(path)
    got = replaced(hidden, ids, weights)
    torch.testing.assert_close(got.double().cpu(), wanted, **TOLERANCE)
    # The same from tensors that lie otherwise.
    apart = hidden.t().contiguous().t(), ids.t().contiguous().t(), weights.t().contiguous().t()
    assert torch.equal(replaced(*apart), got)
    for absent in (torch.full_like(ids, experts), torch.full_like(ids, -1)):
        assert torch.equal(replaced(hidden, absent, weights), torch.zeros_like(hidden))
    assert torch.equal(replaced(hidden, ids, torch.zeros_like(weights)), torch.zeros_like(hidden))
    assert replaced(hidden[:0], ids[:0], weights[:0]).shape == (0, 64)
    moert.close(model)


class Waits(TorchDispatchMode):
    """Notes what would have the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["olmoe", "longcat_flash"])
def test_a_step_does_not_wait_for_the_device(family: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family).to(device)
    path, _ = experts_modules(model)[0]
    moert.patch(model)
    module = model.get_submodule(path)
    steps = []
    for tokens in (1, 40):
        hidden, weights = torch.randn(tokens, 64, device=device), torch.rand(tokens, 2, device=device)
        steps.append((hidden, torch.randint(0, 8, (tokens, 2), device=device), weights))
        module(*steps[-1])  # compiled, on a GPU
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    else:
        # The interpreter itself looks at numbers.
        monkeypatch.setattr(_launch.Launch, "run", lambda launch, device: None)
    try:
        with Waits() as waits, torch.no_grad():
            for step in steps:
                module(*step)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert waits.found == []
    moert.close(model)


@pytest.mark.gpu
def test_a_graph_captures_a_step() -> None:
    model = build("olmoe").to("cuda")
    path, _ = experts_modules(model)[0]
    moert.patch(model)
    module = model.get_submodule(path)
    for tokens in (1, 40):
        hidden, weights = torch.randn(tokens, 64, device="cuda"), torch.rand(tokens, 2, device="cuda")
        ids = torch.randint(0, 8, (tokens, 2), device="cuda")
        with torch.no_grad():
            module(hidden, ids, weights)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = module(hidden, ids, weights)
            for _ in range(3):
                hidden.normal_()
                ids.random_(0, 8)
                graph.replay()
                assert torch.equal(out, module(hidden, ids, weights))
    moert.close(model)


@pytest.mark.gpu
def test_experts_of_one_layer_on_two_devices_are_refused() -> None:
    model = build("olmoe").to("cuda")
    _, module = experts_modules(model)[0]
    module.down_proj.data = module.down_proj.data.cpu()
    with pytest.raises(UnsupportedModelError, match=r"gate_up_proj on cuda:0, down_proj on cpu"):
        moert.patch(model)


def test_experts_that_the_kernels_do_not_compute_run_their_own_code(device: str) -> None:
    model = build("dbrx").to(device)
    inputs = moved(inputs_for("dbrx", model), device)
    wanted = logits(model, inputs)
    with pytest.warns(RuntimeWarning, match=r"3 of 3 layers .* more than two products and a gate"):
        moert.patch(model)
    same(logits(model, inputs), wanted)
    moert.reset_stats(model)
    stats = moert.stats(model)
    assert all("more than two products" in str(layer.fallback) for layer in stats.layers)
    assert "more than two products" in stats.as_dict()["layers"][0]["fallback"]
    moert.close(model)
    with pytest.raises(MoertError, match="closed"):
        logits(model, inputs)


def test_a_gate_that_the_kernels_do_not_have(device: str) -> None:
    model = build("olmoe").to(device)
    inputs = moved(inputs_for("olmoe", model), device)
    _, module = experts_modules(model)[1]
    module._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0].erf()
    wanted = logits(model, inputs)
    with pytest.warns(RuntimeWarning, match=r"1 of \d layers .* computes something that moert's kernels do not offer"):
        moert.patch(model)
    fallbacks = [layer.fallback for layer in moert.stats(model).layers]
    assert sum(reason is not None for reason in fallbacks) == 1 and fallbacks[1] is not None
    torch.testing.assert_close(logits(model, inputs), wanted, **TOLERANCE)
    moert.close(model)


def test_a_forward_put_on_the_instance_does_not_go_round_the_kernels(device: str) -> None:
    """As accelerate's hooks put one there."""
    model = build("olmoe").to(device)
    inputs = moved(inputs_for("olmoe", model), device)
    for _, module in experts_modules(model):
        module.forward = module.forward
    moert.patch(model)
    logits(model, inputs)
    assert moert.stats(model).device_steps == len(moert.stats(model).layers)
    moert.close(model)


def test_bad_input(olmoe: Any, device: str) -> None:
    module = next(module for module in olmoe.modules() if isinstance(module, DeviceExperts))
    hidden, ids = torch.randn(3, 64, device=device), torch.zeros(3, 2, dtype=torch.int64, device=device)
    weights = torch.rand(3, 2, device=device)
    with pytest.raises(MoertError, match=r"called with torch.float16"):
        module(hidden.half(), ids, weights)
    with pytest.raises(MoertError, match=r"hidden states on meta; unpatch"):
        module(hidden.to("meta"), ids, weights)
    for wrong, message in (
        ((hidden, ids.float(), weights), "ids must be torch.int32 or torch.int64, not torch.float32"),
        ((hidden, ids, weights.double()), "weights must be .* not torch.float64"),
        ((hidden, ids.to("meta"), weights), "ids is on meta"),
        ((hidden, ids, weights[:, :1]), r"ids are \[3, 2\], the router's weights \[3, 1\]"),
        ((hidden[:2], ids, weights), r"hidden has 2 rows, ids are for 3 tokens"),
        ((hidden[:, :32], ids, weights), r"x is \[3, 32\], the bank takes 64 columns"),
        ((hidden, ids[:, :0], weights[:, :0]), "0 picks a token"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*wrong)
    assert moert.stats(olmoe).device_steps == 0
    assert module(hidden, ids, weights).isfinite().all()


def test_what_cannot_run_is_refused_and_leaves_the_model_as_it_was(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("olmoe").to(device)
    modules = dict(experts_modules(model))

    def refused(error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            moert.patch(model, **options)
        assert dict(experts_modules(model)) == modules

    refused(ConfigError, r"host_memory='50%' is less than .* layers have theirs on a GPU", host_memory="50%")
    with monkeypatch.context() as patched:

        def too_old(device: torch.device) -> int:
            raise KernelUnavailableError("of compute capability 7.5")

        patched.setattr(grouped_gate_up, "runs_on", too_old)
        refused(KernelUnavailableError, "compute capability 7.5")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "moert.kernels.grouped_gate_up", None)
        refused(KernelUnavailableError, r"triton cannot be imported .*moert\[gpu\]")
    spec, there = SimpleNamespace(name="experts", index=0), torch.empty(1, device="cpu")
    owner = SimpleNamespace(names=("a", "b"), stacked={"a": there, "b": there.to("meta")}.__getitem__)
    with pytest.raises(UnsupportedModelError, match="experts has a on cpu, b on meta"):
        check_layers([spec], [owner])  # type: ignore[list-item]  # as much of them as is looked at


def test_a_policy_that_wants_the_routers_scores_is_not_fed(device: str) -> None:
    """Bringing them from a GPU would wait, and nothing is ever evicted there."""
    model = build("olmoe").to(device)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    moert.patch(model, policy="mrs")
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    moert.close(model)


def test_a_layer_that_is_too_large_for_the_kernels_falls_back() -> None:
    """Its numbers are counted in 31 bits; on tensors without memory."""

    hidden, width = 2**16, 2**15
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    tensors = tuple(TensorSpec(name, shape, torch.bfloat16) for name, shape in shapes.items())
    spec = LayerSpec(0, "experts", 2, tensors, fused=FusedExperts(FfnLayout(), Gate(), tensors))
    stacked = {name: torch.empty(2, *shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    layer = device_layer.DeviceLayer(spec, Residency(2, make_policy("fifo", 2)), [{}, {}], stacked)
    assert "31 bits" in str(layer.fallback) and layer.stats.fallback == layer.fallback


def test_a_model_on_the_cpu_brings_in_no_kernel_for_a_gpu() -> None:
    """Triton itself comes with transformers, where it is installed."""
    code = (
        "import sys, torch; from families import build, inputs_for, logits; import moert\n"
        "model = build('olmoe'); moert.patch(model); logits(model, inputs_for('olmoe', model))\n"
        "of_triton = [name for name, module in sys.modules.items() if hasattr(module, 'triton')]\n"
        "print([name for name in of_triton if name.startswith('moert')])"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "[]\n"


def test_the_error_of_an_fp32_sum_is_small(device: str) -> None:
    """Stated beside the tolerance above: against fp64, a layer's output is off by less than 2e-6 of its length."""
    model = build("olmoe").to(device)
    path, module = experts_modules(model)[0]
    torch.manual_seed(3)
    hidden = torch.randn(24, 64, device=device)
    ids = torch.rand(24, module.num_experts, device=device).topk(2).indices
    weights = torch.rand(24, 2, device=device)
    exact = own_experts(build("olmoe").double().get_submodule(path).to(device), hidden.double(), ids, weights.double())
    moert.patch(model)
    got = model.get_submodule(path)(hidden, ids, weights).double().cpu()
    assert 0 < (got - exact).norm() / exact.norm() < 2e-6
    assert math.isfinite(float(got.sum()))
    moert.close(model)
