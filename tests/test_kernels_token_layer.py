"""One token through an attention, a router and a whole layer: the bits of the parts one by one, and torch's picks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert import _C
from moert.kernels.attention import attend
from moert.kernels.cpu import linear
from moert.kernels.cpu_ffn import ExpertFfn
from moert.kernels.cpu_matrix import Matrix
from moert.kernels.gate import Gate
from moert.kernels.moe_block import ExpertTable, TokenBlock, TokenRouter
from moert.kernels.moe_block import pick as pick_by
from moert.kernels.norm import SCALES, Norm, rms_norm
from moert.kernels.reference_grouped import router_topk
from moert.kernels.rotary import rotate
from moert.kernels.router_rule import RouterRule
from moert.kernels.self_attention import Projections, SelfAttention
from moert.kernels.token_layer import TokenLayer

HALVES = [torch.bfloat16, torch.float16]


@dataclass
class Shape:
    """D hidden, H query heads that share G, of W numbers, R turned; T tokens before; norms of heads or of all."""

    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    turned: int = 16
    tokens: int = 5
    bias: bool = False
    norms: str = "heads"


class Parts:
    """Random parts of an attention between two norms, and what they give one after the other."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        torch.manual_seed(0)
        q_rows, kv_rows = shape.heads * shape.width, shape.kv_heads * shape.width
        sizes = [(q_rows, shape.hidden), (kv_rows, shape.hidden), (kv_rows, shape.hidden), (shape.hidden, q_rows)]
        self.projections = Projections(*(self.projection(*size) for size in sizes))
        self.q_norm = self.k_norm = None
        if shape.norms != "none":
            self.q_norm = self.norm(q_rows if shape.norms == "all" else shape.width, "after_rounding")
            self.k_norm = self.norm(kv_rows if shape.norms == "all" else shape.width, "before_rounding")
        self.before, self.after = self.norm(shape.hidden, "one_plus"), self.norm(shape.hidden, "after_rounding")
        self.x = self.normal(1, 1, shape.hidden)
        self.cos, self.sin = self.normal(1, 1, shape.turned), self.normal(1, 1, shape.turned)
        room = (1, shape.kv_heads, shape.tokens + 3, shape.width)
        self.keys, self.values = self.normal(*room), self.normal(*room)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape).to(self.dtype)

    def projection(self, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (torch.randn(n, k) / k**0.5).to(self.dtype), self.normal(n) if self.shape.bias else None

    def norm(self, width: int, scale: str) -> Norm:
        assert scale in SCALES
        return Norm(torch.rand(width).to(self.dtype), 1e-6, scale)

    def kernel(self, *, between: bool = True) -> SelfAttention:
        attention = SelfAttention(self.projections, self.shape.width, 0.3, self.q_norm, self.k_norm)
        return attention.between(self.before, self.after) if between else attention

    def one_by_one(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the attention gives for x, and all keys and values."""
        shape, tokens = self.shape, self.shape.tokens
        heads = []
        for projection, norm in zip(self.projections[:3], (self.q_norm, self.k_norm, None), strict=True):
            y = linear(x, *projection)
            if norm is not None and len(norm.weight) == y.shape[-1]:
                y = known(rms_norm(y, *norm))
            y = y.view(1, 1, -1, shape.width)
            if norm is not None and len(norm.weight) == shape.width:
                y = known(rms_norm(y, *norm))
            heads.append(y.transpose(1, 2))
        q, k = (known(rotate(head, self.cos, self.sin, False)) for head in heads[:2])
        keys, values = self.keys.clone(), self.values.clone()
        keys[:, :, tokens : tokens + 1], values[:, :, tokens : tokens + 1] = k, heads[2]
        attended = known(attend(q, keys[:, :, : tokens + 1], values[:, :, : tokens + 1], None, 0.3))
        return linear(attended.reshape(1, 1, -1), *self.projections.o), keys, values


def known(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


SHAPES = [
    Shape(),
    Shape(heads=4, kv_heads=4, turned=8, norms="all", tokens=0),
    Shape(hidden=32, heads=6, kv_heads=1, width=32, bias=True, norms="none", tokens=700),
    Shape(hidden=256, heads=8, kv_heads=4, width=64, turned=64, norms="all", tokens=300),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_attention_gives_the_bits_of_its_parts(shape: Shape, dtype: torch.dtype) -> None:
    parts = Parts(shape, dtype)
    wanted, keys, values = parts.one_by_one(parts.x)
    y, normed = known_pair(
        parts.kernel(between=False).run(parts.x, parts.cos, parts.sin, parts.keys, parts.values, shape.tokens)
    )
    assert normed is None
    assert torch.equal(y, wanted)
    # Nothing else is written to.
    assert torch.equal(parts.keys, keys)
    assert torch.equal(parts.values, values)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_and_between_two_norms(shape: Shape, dtype: torch.dtype) -> None:
    parts = Parts(shape, dtype)
    wanted = parts.x + parts.one_by_one(known(rms_norm(parts.x, *parts.before)))[0]
    hidden, normed = known_pair(
        parts.kernel().run(parts.x, parts.cos, parts.sin, parts.keys, parts.values, shape.tokens)
    )
    assert torch.equal(hidden, wanted)
    assert torch.equal(known(normed), known(rms_norm(wanted, *parts.after)))


def known_pair(pair: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert pair is not None
    return pair  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: {"x": parts.x.float()},
        lambda parts: {"x": parts.normal(1, 1, parts.shape.hidden + 1)},
        lambda parts: {"x": parts.normal(1, 2, parts.shape.hidden)},
        lambda parts: {"x": parts.normal(1, 1, 2 * parts.shape.hidden)[..., ::2]},
        lambda parts: {"cos": parts.normal(1, 1, 6)},
        lambda parts: {"cos": parts.normal(1, 1, 32), "sin": parts.normal(1, 1, 32)},
        lambda parts: {"cos": parts.normal(1, 1, 3), "sin": parts.normal(1, 1, 3)},
        lambda parts: {"cos": parts.cos.float(), "sin": parts.sin.float()},
        lambda parts: {"keys": parts.normal(1, 3, 8, 16)},
        lambda parts: {"keys": parts.normal(2, 2, 8, 16)},
        lambda parts: {"values": parts.normal(1, 2, 5, 16)},
        lambda parts: {"values": parts.values.transpose(2, 3).contiguous().transpose(2, 3)},
        lambda parts: {"tokens": 8},
    ],
)
def test_tensors_that_do_not_fit_are_left_alone(change: Callable[[Parts], dict[str, Any]]) -> None:
    parts = Parts(Shape(), torch.bfloat16)
    given_ = {"x": parts.x, "cos": parts.cos, "sin": parts.sin, "keys": parts.keys, "values": parts.values, "tokens": 5}
    given_ |= change(parts)
    before = given_["keys"].clone()
    assert parts.kernel().run(**given_) is None
    assert torch.equal(given_["keys"], before)


def test_parts_that_do_not_fit_are_refused() -> None:
    parts = Parts(Shape(), torch.bfloat16)
    q, k, v, o = parts.projections
    with pytest.raises(ValueError, match=r"v is \[48, 48\], and not an unquantised \[32, 48\]"):
        SelfAttention(Projections(q, k, (parts.normal(48, 48), None), o), 16, 0.3)
    with pytest.raises(ValueError, match=r"contiguous torch.bfloat16"):
        SelfAttention(Projections(q, (k[0].float(), None), v, o), 16, 0.3)
    with pytest.raises(ValueError, match=r"a bias \[3\] does not fit a weight \[32, 48\]"):
        SelfAttention(Projections(q, (k[0], parts.normal(3)), v, o), 16, 0.3)
    with pytest.raises(ValueError, match="the norm of q is of 5 numbers"):
        SelfAttention(parts.projections, 16, 0.3, parts.norm(5, "one_plus"))
    with pytest.raises(ValueError, match="a norm of 16 of 48 hidden numbers"):
        parts.kernel().between(parts.before, parts.norm(16, "one_plus"))
    with pytest.raises(ValueError, match="cannot share"):
        SelfAttention(Projections(q, (parts.normal(48, 48), None), (parts.normal(48, 48), None), o), 16, 0.3)


def pick(rule: RouterRule, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return pick_by(TokenRouter(logits[:, None], None, rule, dtype), logits)


RULES = [
    RouterRule(4),
    RouterRule(4, normalise=True),
    RouterRule(1, "logits", "sigmoid"),
    RouterRule(4, "logits", "softmax"),
    RouterRule(6, "sigmoid", normalise=True, epsilon=1e-20, scale=2.5),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("experts", [8, 64, 300])
def test_picks_are_those_of_the_rule(rule: RouterRule, experts: int) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        logits = torch.randperm(experts).float() / experts * 4 + torch.randn(1)
        ids, weights = pick(rule, logits, torch.float32)
        wanted_ids, wanted = router_topk(logits[None], rule)
        assert torch.equal(ids, wanted_ids[0])
        torch.testing.assert_close(weights.double(), wanted[0], rtol=2e-6, atol=0)
        rounded = pick(rule, logits, torch.bfloat16)[1]
        assert torch.equal(rounded, weights.bfloat16().float())


def test_groups_are_those_of_the_rule() -> None:
    torch.manual_seed(0)
    for score in ("max", "top2"):
        rule = RouterRule(4, "sigmoid", groups=4, kept_groups=2, group_score=score)
        for _ in range(50):
            logits = torch.randn(32)
            assert torch.equal(pick(rule, logits, torch.float32)[0], router_topk(logits[None], rule)[0][0])


@settings(max_examples=200)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, float("nan")]), min_size=2, max_size=400), st.data())
def test_of_equal_experts_those_are_picked_that_torch_picks(values: list[float], data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, min(len(values), 16)))
    logits = torch.tensor(values)
    found = pick(RouterRule(top_k, "logits", "softmax"), logits, torch.float32)[0]
    assert torch.equal(found, logits[None].topk(top_k, dim=-1)[1][0])


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k"):
        pick(RouterRule(5), torch.zeros(4), torch.float32)
    with pytest.raises(ValueError, match="8 of 8 experts cannot be picked from 1 of 2 groups"):
        pick(RouterRule(8, groups=2, kept_groups=1), torch.zeros(8), torch.float32)


class Layer:
    """A layer of random parts, and what they give one after the other."""

    def __init__(self, dtype: torch.dtype, experts: int = 8) -> None:
        self.parts = parts = Parts(Shape(), dtype)
        hidden, width = parts.shape.hidden, 24
        self.router = TokenRouter(parts.normal(experts, hidden), parts.normal(experts), RouterRule(3), dtype)
        self.ffn = ExpertFfn(Gate(), hidden, width, dtype)
        self.experts = [
            self.ffn.expert(
                Matrix("plain", parts.normal(2 * width, hidden)), Matrix("plain", parts.normal(hidden, width))
            )
            for _ in range(experts)
        ]
        self.kernel = TokenLayer(parts.kernel(), TokenBlock(self.router, self.ffn))

    def run(self, experts: ExpertTable | None) -> Any:
        parts = self.parts
        arguments = (parts.x, parts.cos, parts.sin, parts.keys, parts.values, parts.shape.tokens)
        return self.kernel.run(*arguments, experts)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_layer_gives_the_bits_of_its_parts(dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    parts = layer.parts
    found = layer.run(ExpertTable(layer.ffn, layer.experts))
    wanted = parts.kernel().run(parts.x, parts.cos, parts.sin, parts.keys, parts.values, parts.shape.tokens)
    hidden, normed = known_pair(wanted)
    assert torch.equal(found.hidden, hidden)
    assert torch.equal(found.normed, known(normed))
    logits = linear(known(normed)[0], layer.router.weight, layer.router.bias)
    assert torch.equal(found.logits, logits)
    ids, weights = pick(layer.router.rule, logits[0].float(), dtype)
    assert torch.equal(found.ids[0], ids)
    assert torch.equal(found.weights[0], weights)
    places = ids.argsort().tolist()
    chosen = [layer.experts[ids[place]] for place in places]
    given_ = layer.ffn.run_token(known(normed)[0], chosen, places, weights[None].contiguous())
    assert torch.equal(found.output, hidden + given_)
    assert found.experts_s > 0


def test_experts_that_are_not_there_are_left_to_others() -> None:
    layer = Layer(torch.bfloat16)
    whole = layer.run(ExpertTable(layer.ffn, layer.experts))
    absent = layer.run(None)
    first = int(whole.ids.max())
    beyond = layer.run(ExpertTable(layer.ffn, layer.experts[:first]))
    for found in (absent, beyond):
        assert found.output is None
        assert torch.equal(found.ids, whole.ids)
        assert torch.equal(found.normed, whole.normed)
    assert layer.run(ExpertTable(layer.ffn, layer.experts[: first + 1])).output is not None


def test_picks_without_weight_are_left_to_others() -> None:
    layer = Layer(torch.bfloat16)
    rule = RouterRule(3, scale=0.0)
    layer.kernel = TokenLayer(layer.parts.kernel(), TokenBlock(layer.router._replace(rule=rule), layer.ffn))
    assert layer.run(ExpertTable(layer.ffn, layer.experts)).output is None


def test_layers_of_parts_that_do_not_fit_are_refused() -> None:
    layer = Layer(torch.bfloat16)
    with pytest.raises(ValueError, match=r"a router \[8, 48\] in bf16 does not give logits in bf16 for 32 numbers"):
        TokenBlock(layer.router, ExpertFfn(Gate(), 32, 24, torch.bfloat16))
    with pytest.raises(ValueError, match="a norm after it"):
        TokenLayer(layer.parts.kernel(between=False), layer.kernel.block)
    with pytest.raises(ValueError, match="an attention of 48 numbers in bf16 and a block of 48 in fp16"):
        TokenLayer(layer.parts.kernel(), Layer(torch.float16).kernel.block)
    other = ExpertFfn(Gate(), 48, 8, torch.bfloat16)
    expert = other.expert(Matrix("plain", layer.parts.normal(16, 48)), Matrix("plain", layer.parts.normal(48, 8)))
    with pytest.raises(ValueError, match="an expert of up"):
        ExpertTable(layer.ffn, [expert])
    with pytest.raises(ValueError, match="experts of 48 and 8 numbers in a layer of 48 and 24"):
        layer.run(ExpertTable(other, [expert]))


def test_what_dictionaries_hold() -> None:
    value = object()
    held = {"a": value, "b": None}
    assert _C.holds([])
    assert _C.holds([held, "a", value, held, "b", None, held, "c", held, held, None, 2, {}, None, 0])
    assert not _C.holds([held, "a", object()])
    assert not _C.holds([held, "a", held])
    assert not _C.holds([held, "c", None])
    assert not _C.holds([held, "a", value, held, None, 1])
    for wrong in ((held, "a", value), [held, "a"], [held, "a", value, held]):
        with pytest.raises(TypeError, match="a list of dicts, keys and values is wanted"):
            _C.holds(wrong)  # type: ignore[arg-type]
    for other in ("a", 0, None):
        with pytest.raises(TypeError, match="a dict is wanted"):
            _C.holds([held, "a", value, other, "b", "c"])
    with pytest.raises(TypeError):
        _C.holds([held, None, "many"])
    with pytest.raises(TypeError, match="unhashable"):
        _C.holds([held, [], value])
