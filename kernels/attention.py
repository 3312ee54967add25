"""Attention of one query token on the CPU: what decoding does between the projections."""

from __future__ import annotations

import torch

from moert import _C
from moert.kernels.cpu import HALVES, NUMBERS

MOST_WIDTH = 512
"""Numbers of a head that the kernel is made for."""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor | None:
    """softmax(q k^T * scale + mask) v for one query token of each sequence. New memory. Blocks.

    Scores, weights and sums are in fp32 and the result is rounded once, so it is nearer to the exact one than torch's,
    which rounds the weights to the dtype too. It depends neither on addresses nor on the number of threads. The method
    is that of flash decoding (Dao et al. 2023): chunks of tokens are summed apart, of a fixed size here.

    Args:
        q: [B, H, 1, D].
        k, v: [B, G, T, D] and [B, G, T, V], H a multiple of G: query head h uses head h * G // H.
        mask: [B or 1, H or 1, 1, T], bool (False leaves a token out) or in the dtype of `q`, added; None: all count.
            A query of which no token is left gets 0.

    Returns:
        [B, 1, H, V], contiguous; None where the kernel is not for these tensors: other than bf16 or fp16, all of one
        dtype, plain and on the CPU, heads of more than 512 numbers or whose numbers do not follow one another, and
        shapes that are not these.
    """
    dtype = q.dtype
    if (
        dtype not in HALVES
        or k.dtype is not dtype
        or v.dtype is not dtype
        or not (q.is_cpu and k.is_cpu and v.is_cpu)
        or not (q.layout is k.layout is v.layout is torch.strided)
        or not q.dim() == k.dim() == v.dim() == 4
    ):
        return None
    batch, heads, queries, width = q.shape
    kv_batch, kv_heads, tokens, k_width = k.shape
    value_width = v.shape[3]
    q_steps, k_steps, v_steps = q.stride(), k.stride(), v.stride()
    if (
        queries != 1
        or kv_batch != batch
        or k_width != width
        or v.shape[:3] != k.shape[:3]
        or not (batch and kv_heads and tokens and width and value_width)
        or heads % kv_heads
        or not heads
        or max(width, value_width) > MOST_WIDTH
        or not q_steps[3] == k_steps[3] == v_steps[3] == 1
    ):
        return None
    kind, mask_at, mask_steps = "none", None, (0, 0, 0)
    if mask is not None:
        kind = "chosen" if mask.dtype is torch.bool else "added"
        if (
            mask.dim() != 4
            or not (kind == "chosen" or mask.dtype is dtype)
            or not mask.is_cpu
            or mask.layout is not torch.strided
            or mask.shape[0] not in (1, batch)
            or mask.shape[1] not in (1, heads)
            or mask.shape[2:] != (1, tokens)
        ):
            return None
        steps = mask.stride()
        mask_at = mask.data_ptr()
        mask_steps = (steps[0] if mask.shape[0] > 1 else 0, steps[1] if mask.shape[1] > 1 else 0, steps[3])
    y = torch.empty((batch, 1, heads, value_width), dtype=dtype)
    _C.attend(
        NUMBERS[dtype],
        (batch, heads, kv_heads, tokens, width, value_width),
        scale,
        q.data_ptr(),
        q_steps[:2],
        k.data_ptr(),
        k_steps[:3],
        v.data_ptr(),
        v_steps[:3],
        kind,
        mask_at,
        mask_steps,
        y.data_ptr(),
    )
    return y
