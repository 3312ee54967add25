"""Patched models whose experts are on a GPU, against the same models as transformers run them.

Without a GPU the whole path runs on the CPU, its kernels under Triton's interpreter.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from typing import Any

import device_experts_support
import pytest
import torch
from device_experts_support import TOLERANCE, moved, own_experts, prompts, same
from families import SUPPORTED_FAMILIES, build, experts_modules, greedy_tokens, inputs_for, logits
from torch.utils._python_dispatch import TorchDispatchMode

import moert
from moert.hf.device_experts import DeviceExperts
from moert.kernels import _launch

device = device_experts_support.device

# Biased, interleaved, clamped and transposed; with shared experts; transposed alone; with experts that return their
# input; ungated. Those that are slow are as OLMoE is.
KERNEL_FAMILIES = (
    "olmoe",
    pytest.param("qwen3_moe", marks=pytest.mark.slow),
    pytest.param("mixtral", marks=pytest.mark.slow),
    "gpt_oss",
    "deepseek_v3",
    pytest.param("aria", marks=pytest.mark.skipif("aria" not in SUPPORTED_FAMILIES, reason="another experts class")),
    "longcat_flash",
    "nemotron_h",
)


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


def test_the_error_of_an_fp32_sum_is_small(device: str) -> None:
    """Stated beside `TOLERANCE`: against fp64, a layer's output is off by less than 2e-6 of its length."""
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


def test_a_policy_that_wants_the_routers_scores_is_not_fed(device: str) -> None:
    """Bringing them from a GPU would wait, and nothing is ever evicted there."""
    model = build("olmoe").to(device)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    moert.patch(model, policy="mrs")
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    moert.close(model)


def test_a_model_on_the_cpu_brings_in_no_kernel_for_a_gpu() -> None:
    """Triton itself comes with transformers, where it is installed."""
    code = (
        "import sys, torch; from families import build, inputs_for, logits; import moert\n"
        "model = build('olmoe'); moert.patch(model); logits(model, inputs_for('olmoe', model))\n"
        "of_moert = [name for name in sys.modules if name.startswith('moert')]\n"
        "print([name for name in of_moert if hasattr(sys.modules[name], 'triton')])"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "[]\n"
