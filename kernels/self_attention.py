"""One token through a whole attention on the CPU, in one call: what decoding does between two layers of experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moert import _C
from moert.kernels.cpu_matrix import NUMBERS
from moert.kernels.norm import Norm
from moert.kernels.projection import Projection, check_plain, projection_arguments


class Projections(NamedTuple):
    """Weights [N, K] and biases [N] of an attention: [H * W, D], [G * W, D] twice, and [D, H * W]."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection


Angles = tuple[int, int, int]
"""Addresses of cosines and sines, and how many there are of either."""


class SelfAttention:
    """An attention of H query heads that share G heads of keys and values, W numbers each.

    A token through it gives the very bits that `linear`, `rms_norm`, `rotate` and `attend` give one after the other.
    Weights are read where they are, and kept alive.
    """

    def __init__(
        self,
        projections: Projections,
        width: int,
        scale: float,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        *,
        before: Norm | None = None,
        after: Norm | None = None,
    ) -> None:
        """`before` is applied to what comes in; `after` to that (as it was) plus what the attention gives.

        Args:
            width: W.
            scale: what scores are multiplied with.
            q_norm, k_norm: of each head, or of all of a token's heads together, before the rotary embedding.

        Raises:
            ValueError: tensors that are not of one 16-bit type, contiguous and on the CPU, or shapes that do not fit.
        """
        (q, _), (k, _) = projections[:2]
        norms = [q_norm, k_norm, before, after]
        self.dtype = q.dtype
        self.hidden = q.shape[-1]
        self.kv_heads, self.width = k.shape[0] // width, width
        check_plain("an attention", (tensor for projection in projections for tensor in projection), self.dtype)
        check_plain("an attention", (norm.weight for norm in norms if norm is not None), self.dtype)
        self._given = (projections, width, scale, q_norm, k_norm)
        self._kept = (before, after)
        # The matrices are copied; what they point to is kept.
        self.capsule = _C.self_attention(
            NUMBERS[self.dtype],
            (self.hidden, q.shape[0] // width, self.kv_heads, width),
            scale,
            tuple(map(projection_arguments, projections)),
            tuple(None if norm is None else _arguments(norm) for norm in norms),
        )
        self._is_followed = after is not None

    def between(self, before: Norm, after: Norm) -> SelfAttention:
        """The same attention with norms before and after it.

        Raises:
            ValueError: they are not of its type and size.
        """
        return SelfAttention(*self._given, before=before, after=after)

    def run(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """One token of one sequence. Its key and value are written behind those of the `tokens` before it. Blocks.

        Args:
            x: [..., D] of D numbers.
            cos, sin: [..., R] of R numbers each, R even and at most W: the first R of each head are turned.
            keys, values: [1, G, T, W] with T > `tokens`.

        Returns:
            Like `x`: what the attention gives, and None; with a norm `after`, the sum of that and `x`, and its norm.
            None, and nothing is written, where the kernel is not for these tensors: other than plain, on the CPU and
            in the weights' dtype, numbers that do not follow one another, and shapes that are not these.
        """
        if not self.takes(x):
            return None
        y = torch.empty_like(x)
        normed = torch.empty_like(x) if self._is_followed else None
        normed_at = None if normed is None else normed.data_ptr()
        angles = self.angles(cos, sin)
        arguments = angles and self.arguments(x.data_ptr(), angles, keys, values, tokens, y.data_ptr(), normed_at)
        if arguments is None:
            return None
        _C.attend_token(self.capsule, arguments)
        return y, normed

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `x` is a token that the kernel is for."""
        hidden = self.hidden
        return (
            x.dtype is self.dtype and x.shape[-1] == hidden and x.numel() == hidden and x.is_contiguous() and x.is_cpu
        )

    def angles(self, cos: torch.Tensor, sin: torch.Tensor) -> Angles | None:
        """Where they are, and how many, if the kernel is for them."""
        dtype, turned = self.dtype, cos.numel()
        if (
            not (cos.dtype is sin.dtype is dtype)
            or not (cos.is_contiguous() and sin.is_contiguous() and cos.is_cpu and sin.is_cpu)
            or not turned == cos.shape[-1] == sin.shape[-1] == sin.numel()
            or turned % 2
            or not turned
        ):
            return None
        return cos.data_ptr(), sin.data_ptr(), turned

    def arguments(
        self,
        x: int,
        angles: Angles,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: int,
        y: int,
        normed: int | None,
    ) -> tuple[Any, ...] | None:
        """What the extension takes of a token: see `run`; None where the kernel is not for these tensors.

        `angles` are of an attention of the same dtype; `x`, `y` and `normed` are addresses of memory like a token that
        it `takes`.
        """
        if angles[2] > self.width or not (self._has_room(keys, tokens) and self._has_room(values, tokens)):
            return None
        k_steps, v_steps = keys.stride(), values.stride()
        return (
            x,
            *angles,
            (keys.data_ptr(), k_steps[1], k_steps[2]),
            (values.data_ptr(), v_steps[1], v_steps[2]),
            tokens,
            y,
            normed,
        )

    def _has_room(self, room: torch.Tensor, tokens: int) -> bool:
        shape = room.shape
        return (
            room.dtype is self.dtype
            and room.is_cpu
            and len(shape) == 4
            and shape[0] == 1
            and shape[1] == self.kv_heads
            and shape[2] > tokens
            and shape[3] == self.width
            and room.stride(3) == 1
        )


def _arguments(norm: Norm) -> tuple[str, float, int, int]:
    return norm.scale, norm.eps, norm.weight.shape[0], norm.weight.data_ptr()
