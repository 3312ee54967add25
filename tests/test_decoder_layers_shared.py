"""Blocks of experts in one call a token, with shared experts and all kinds of routers: the bits of their own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import decoder_support
import pytest
import torch
import torch.nn.functional as F
from decoder_support import STEPS, Counted, autocast, both_ways, decode, layers_own_code, training
from families import Zoo

import moert
from moert.hf.block_forward import BlockForward
from moert.hf.decoder_layer import DecoderLayerForward
from moert.hf.dense_compute import count
from moert.kernels.moe_block import BlockOutput, TokenBlock, TokenRouter, pick
from moert.kernels.router_rule import RouterRule

counted = decoder_support.counted

LAYERS = ["qwen2_moe", "glm4_moe", "minimax_m2", "dots1"]
BLOCKS = {
    "deepseek_v2": "softmax in fp32, a factor",
    "deepseek_v3": "sigmoid, correction, groups",
    "gpt_oss": "biases, a limited gate, two outputs",
    "qwen3_next": "a share",
    "mistral4": "a router that rounds each step",
    "lfm2_moe": "that too, and a correction from the block",
    "beam": "experts times a factor",
    "nemotron_h": "a shared expert without a gate, identities",
    "minimax_m3_vl": "a shared expert of one product, limited",
}


class BlocksRun:
    """How many blocks ran as one call, and how many of them with the experts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks = self.complete = 0
        run = TokenBlock.run

        def counting(block: TokenBlock, *args: Any) -> BlockOutput | None:
            found = run(block, *args)
            self.blocks += found is not None
            self.complete += found is not None and found.output is not None
            return found

        monkeypatch.setattr(TokenBlock, "run", counting)

    def take(self) -> tuple[int, int]:
        """Since the last time."""
        counts = self.blocks, self.complete
        self.blocks = self.complete = 0
        return counts


@pytest.fixture
def blocks_run(monkeypatch: pytest.MonkeyPatch) -> BlocksRun:
    return BlocksRun(monkeypatch)


def n_blocks(model: Any) -> int:
    with moert.patch(model, host_memory="100%"):
        return count(model, BlockForward)


def is_exact() -> bool:
    """Whether torch computes exponentials as moert does for routers with weights in fp32."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def assert_alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.isfinite().all()
    if is_exact():
        assert torch.equal(found, wanted)
    else:
        assert (found - wanted).float().norm() <= 2**-7 * wanted.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", LAYERS)
def test_layers_with_shared_experts(
    family: str, dtype: torch.dtype, zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.fresh(family, dtype)
    wanted, found = both_ways(model, monkeypatch)
    # The first layers of some have no experts.
    layers = n_blocks(model)
    assert layers > 1
    # Those that follow the first run ahead of their turn.
    assert counted.ahead == (STEPS - 1) * (layers - 1)
    assert counted.take()[1:] == ((STEPS - 1) * layers, (STEPS - 1) * layers)
    assert_alike(found, wanted)


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks(family: str, zoo: Zoo, blocks_run: BlocksRun, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.fresh(family, torch.bfloat16)
    wanted, found = both_ways(model, monkeypatch)
    steps = STEPS * n_blocks(model)
    assert steps > 0
    assert blocks_run.take() == (steps, steps)
    assert_alike(found, wanted)


@pytest.mark.parametrize("family", ["phimoe", "deepseek_v4", "zaya", "dbrx"])
def test_what_is_no_such_block_is_left_alone(family: str, zoo: Zoo) -> None:
    assert n_blocks(zoo.fresh(family, torch.bfloat16)) == 0


@pytest.mark.parametrize("family", ["qwen2_moe", "beam", "glm4_moe"])
@pytest.mark.parametrize("budget", ["30%", "60%"])
def test_experts_that_are_not_all_there(
    family: str, budget: str, zoo: Zoo, blocks_run: BlocksRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.fresh(family, torch.bfloat16)
    wanted, found = both_ways(model, monkeypatch, budget=budget)
    assert_alike(found, wanted)
    # Of the first token that finds no room in the cache at least.
    blocks, complete = blocks_run.take()
    assert blocks > 0
    assert complete == 0


PATHS = ["mlp", "mlp.gate", "mlp.experts", "mlp.shared_expert", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"]


@pytest.mark.parametrize("path", [*PATHS, "mlp.shared_expert.act_fn"])
def test_hooks_see_what_they_did(path: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(model: Any) -> Any:
        seen: list[Any] = []

        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [*args, *kwargs.values(), *(output if isinstance(output, tuple) else (output,))]
            seen.extend(value.clone() for value in tensors if isinstance(value, torch.Tensor))

        handle = model.model.layers[1].get_submodule(path).register_forward_hook(look, with_kwargs=True)
        logits = decode(model, steps=2)
        handle.remove()
        return [*seen, logits, decode(model, steps=2)]

    wanted, found = both_ways(zoo.fresh("qwen2_moe", torch.bfloat16), monkeypatch, watch)
    assert len(found) == len(wanted) > 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_recording_sees_the_same(family: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(model: Any) -> Any:
        with moert.record(model, scores=True) as trace:
            decode(model)
        (sequence,) = trace
        return [value.tolist() for value in vars(sequence).values() if hasattr(value, "tolist")]

    wanted, found = both_ways(zoo.fresh(family, torch.bfloat16), monkeypatch, record)
    assert len(found) > 3
    assert found == wanted or not is_exact()


def change_shared_weight(block: Any) -> None:
    up = block.shared_experts.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach() * 2, requires_grad=False)


def change_shared_data(block: Any) -> None:
    block.shared_experts.down_proj.weight.data.mul_(2)


def change_activation(block: Any) -> None:
    block.shared_experts.act_fn = torch.nn.ReLU()


def change_correction(block: Any) -> None:
    block.gate.e_score_correction_bias.copy_(torch.linspace(-1, 1, len(block.gate.e_score_correction_bias)))


def replace_correction(block: Any) -> None:
    correction = block.gate.e_score_correction_bias
    block.gate.e_score_correction_bias = torch.linspace(-1, 1, len(correction))


def change_factor(block: Any) -> None:
    block.gate.routed_scaling_factor = 3.25


def change_groups(block: Any) -> None:
    block.gate.topk_group = block.gate.num_group


def change_children(block: Any) -> None:
    block.shared_experts = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    torch.nn.init.constant_(block.shared_experts.weight, 2**-7)


CHANGES = [
    change_shared_weight,
    change_shared_data,
    change_activation,
    change_correction,
    replace_correction,
    change_factor,
    change_children,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_blocks_that_change(
    change: Callable[[Any], None], family: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(model: Any) -> torch.Tensor:
        before = decode(model)
        change(model.model.layers[-1].mlp)
        return torch.stack([before, decode(model)])

    with layers_own_code(monkeypatch), moert.patch(zoo.fresh(family, torch.bfloat16), host_memory="100%") as model:
        wanted = changed(model)
    with moert.patch(zoo.fresh(family, torch.bfloat16), host_memory="100%") as model:
        found = changed(model)
    assert_alike(found, wanted)
    assert not torch.equal(wanted[0], wanted[1])


def _with_gradients(model: Any) -> torch.Tensor:
    model.requires_grad_(True)
    try:
        return decode(model, grad=True)
    finally:
        model.requires_grad_(False)


def _two(model: Any) -> torch.Tensor:
    return decode(model, torch.cat([decoder_support.PROMPT, decoder_support.PROMPT.flip(1)]))


@pytest.mark.parametrize("run", [training, autocast, _with_gradients, _two])
def test_what_the_kernels_are_not_for(
    run: Callable[[Any], torch.Tensor], zoo: Zoo, blocks_run: BlocksRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, found = both_ways(zoo.fresh("deepseek_v3", torch.bfloat16), monkeypatch, run)
    assert torch.equal(found, wanted)
    assert blocks_run.take() == (0, 0)


def test_a_layer_knows_its_block(zoo: Zoo) -> None:
    with moert.patch(zoo.fresh("glm4_moe", torch.bfloat16), host_memory="100%") as model:
        forwards = [vars(layer)["forward"] for layer in model.model.layers]
        assert all(isinstance(forward, DecoderLayerForward) for forward in forwards)
        assert [forward._whole is not None for forward in forwards] == [False, True, True]
        assert [forward.chain is not None for forward in forwards] == [False, True, True]


def test_softmax_of_many_sizes_is_torchs() -> None:
    torch.manual_seed(0)
    for experts in (3, 8, 20, 60, 64, 160, 300):
        for scores, wanted in (("softmax", F.softmax), ("sigmoid", lambda x, dim: x.sigmoid())):
            router = TokenRouter(torch.zeros(experts, 1), None, RouterRule(experts, scores), torch.float32)
            logits = torch.randn(50, experts) * 5
            for row in logits:
                ids, weights = pick(router, row)
                exact = wanted(row[None], dim=-1)[0][ids]
                torch.testing.assert_close(weights, exact, rtol=2**-20, atol=0)
                assert not is_exact() or torch.equal(weights, exact)
