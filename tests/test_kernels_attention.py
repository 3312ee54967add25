"""Attention of one token on the CPU: exact to one rounding, for every layout, mask and instruction set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moert import _C
from moert.kernels import cpu
from moert.kernels.attention import attend

HALVES = [torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention in double precision, [B, 1, H, V], and the same sum of the values' sizes."""
    times = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(times, 1), v.double().repeat_interleave(times, 1)
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.double()
    weights = scores.softmax(-1).nan_to_num(0)
    return (weights @ v).transpose(1, 2), (weights @ v.abs()).transpose(1, 2)


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    found = attend(q, k, v, mask, scale)
    assert found is not None
    assert found.is_contiguous()
    assert found.dtype is q.dtype
    want, sizes = exact(q, k, v, mask, scale)
    assert found.shape == want.shape
    # One rounding to the dtype, and fp32: of scores (up to some tens, so their error is one of the weights), and of the
    # sum over tokens.
    bound = torch.finfo(q.dtype).eps / 2 * want.abs() + 2e-5 * sizes + torch.finfo(q.dtype).tiny
    assert ((found.double() - want).abs() <= bound).all()
    return found


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "tokens", "width", "value_width"),
    [
        (1, 1, 1, 1, 1, 1),
        (1, 16, 16, 150, 64, 64),
        (2, 8, 2, 257, 128, 128),
        (1, 12, 1, 600, 80, 24),
        (3, 9, 9, 33, 192, 128),
        (1, 40, 4, 1030, 17, 130),
        (1, 2, 2, 512, 512, 512),
    ],
)
def test_is_the_attention(
    batch: int, heads: int, kv_heads: int, tokens: int, width: int, value_width: int, dtype: torch.dtype, isa: str
) -> None:
    q = 3 * normal(batch, heads, 1, width, dtype=dtype)
    k = normal(batch, kv_heads, tokens, width, dtype=dtype, seed=1)
    v = normal(batch, kv_heads, tokens, value_width, dtype=dtype, seed=2)
    check(q, k, v)


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 11),
    tokens=st.integers(1, 300),
    width=st.integers(1, 70),
    value_width=st.integers(1, 140),
    mask=st.sampled_from(["none", "chosen", "added"]),
    shared=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_any_sizes_and_masks(
    batch: int,
    kv_heads: int,
    group: int,
    tokens: int,
    width: int,
    value_width: int,
    mask: str,
    shared: tuple[bool, bool],
    seed: int,
) -> None:
    heads = kv_heads * group
    q = normal(batch, heads, 1, width, seed=seed)
    k, v = normal(batch, kv_heads, tokens, width, seed=seed + 1), normal(batch, kv_heads, tokens, value_width)
    given_mask = None
    if mask != "none":
        shape = (1 if shared[0] else batch, 1 if shared[1] else heads, 1, tokens)
        given_mask = normal(*shape, seed=seed + 2)
        if mask == "chosen":
            given_mask = given_mask > 0.5
    check(q, k, v, given_mask)


def test_layouts_of_projections_and_of_a_cache_with_room() -> None:
    q = normal(2, 1, 8 * 3, 16)[..., 4:].view(2, 1, 24, 12).transpose(1, 2)[:, ::3]
    room_k, room_v = normal(2, 4, 90, 12, seed=1), normal(2, 4, 70, 33, seed=2)
    k, v = room_k[:, :, 3:53], room_v[:, :, :50, 1:]
    mask = normal(2, 1, 1, 100, seed=3)[..., ::2]
    assert torch.equal(check(q, k, v, mask), check(*(t.contiguous() for t in (q, k, v, mask))))
    tokens_first = normal(2, 50, 4, 12, seed=4).transpose(1, 2)
    check(q, tokens_first, v)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_tokens_that_do_not_count_do_not(dtype: torch.dtype, isa: str) -> None:
    q, k, v = normal(1, 4, 1, 32, dtype=dtype), normal(1, 2, 300, 32, dtype=dtype), normal(1, 2, 300, 32, dtype=dtype)
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool)
    mask[..., 270:] = True
    cut = check(q, k[:, :, 270:], v[:, :, 270:])
    torch.testing.assert_close(check(q, k, v, mask), cut, rtol=torch.finfo(dtype).eps, atol=0)
    # As transformers says it without bools.
    least = torch.where(mask, 0, torch.finfo(dtype).min).to(dtype)
    torch.testing.assert_close(check(q, k, v, least), cut, rtol=torch.finfo(dtype).eps, atol=0)
    assert not check(q, k, v, torch.zeros_like(mask)).any()


def test_far_scores_and_special_values(isa: str) -> None:
    q, k, v = normal(1, 2, 1, 32), normal(1, 2, 600, 32, seed=1), normal(1, 2, 600, 32, seed=2)
    # Scores of thousands, and the highest one in another chunk for each head.
    k[:, 0, 580], k[:, 1, 5] = 100 * q[0, 0, 0], 100 * q[0, 1, 0]
    found = check(q, k, v)
    assert torch.equal(found[0, 0, 0], v[0, 0, 580])
    assert torch.equal(found[0, 0, 1], v[0, 1, 5])
    k[0, 0, 300, 3] = torch.nan
    v[0, 1, 5, 7] = torch.inf
    found = attend(q, k, v, None, 1.0)
    assert found is not None
    assert found[0, 0, 0].isnan().all()
    assert found[0, 0, 1, 7] == torch.inf
    assert found[0, 0, 1, :7].isfinite().all()


def test_threads_and_addresses_change_no_bit() -> None:
    q, k, v = normal(1, 16, 1, 64), normal(1, 8, 1500, 64, seed=1), normal(1, 8, 1500, 64, seed=2)
    before, found = cpu.threads(), []
    try:
        for count in (1, 2, 5):
            cpu.set_threads(count)
            room = torch.empty(k.numel() + count, dtype=k.dtype)
            moved = room[count:].view(k.shape).copy_(k)
            found.append(attend(q, moved, v, None, 0.125))
    finally:
        cpu.set_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


A, B = normal(2, 4, 1, 8), normal(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "mask"),
    [
        (A.float(), B.float(), B.float(), None),
        (A, B.half(), B, None),
        (A, B, B.half(), None),
        (normal(2, 4, 2, 8), B, B, None),
        (normal(2, 3, 1, 8), B, B, None),
        (normal(1, 4, 1, 8), B, B, None),
        (normal(2, 4, 1, 7), B, B, None),
        (A, B, normal(2, 2, 6, 8), None),
        (A, B[:, :, :0], B[:, :, :0], None),
        (A[0], B[0], B[0], None),
        (A, normal(2, 2, 8, 5).transpose(2, 3), B, None),
        (normal(2, 4, 1, 516), normal(2, 2, 5, 516), B, None),
        (A, B, B, torch.ones(2, 1, 1, 6, dtype=torch.bool)),
        (A, B, B, torch.ones(2, 1, 5, dtype=torch.bool)),
        (A, B, B, torch.ones(2, 2, 1, 5, dtype=torch.bool)),
        (A, B, B, torch.zeros(2, 1, 1, 5)),
        (A, B, B, torch.zeros(2, 1, 1, 5, dtype=torch.int64)),
        (A.to("meta"), B.to("meta"), B.to("meta"), None),
    ],
)
def test_other_operands_are_not_for_the_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> None:
    assert attend(q, k, v, mask, 1.0) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"number": "int8"}, "number type 'int8' is unknown"),
        ({"mask_kind": "some"}, "mask 'some' is unknown"),
        ({"sizes": (1, 3, 2, 5, 8, 8)}, "3 query heads cannot share 2"),
        ({"sizes": (1, 4, 2, 0, 8, 8)}, "0 is no size"),
        ({"sizes": (1, 4, 2, 5, 513, 8)}, "heads of 513 and 8 numbers: at most 512"),
        ({"k_steps": (1, -8, 8)}, "-8 numbers apart"),
        ({"q": 0}, "q"),
        ({"mask_kind": "added", "mask": 1}, "mask"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    y = torch.empty(1, 1, 4, 8, dtype=torch.bfloat16)
    arguments: dict[str, Any] = {
        "number": "bf16",
        "sizes": (1, 4, 2, 5, 8, 8),
        "scale": 1.0,
        "q": A.data_ptr(),
        "q_steps": (32, 8),
        "k": B.data_ptr(),
        "k_steps": (80, 40, 8),
        "v": B.data_ptr(),
        "v_steps": (80, 40, 8),
        "mask_kind": "none",
        "mask": None,
        "mask_steps": (0, 0, 0),
        "y": y.data_ptr(),
    }
    with pytest.raises(ValueError, match=message):
        _C.attend(*(arguments | changed).values())
