"""What the quantised formats have in common: matrices become codes and scales, everything else passes through."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from moert.errors import UnsupportedModelError
from moert.formats.base import Format, TensorSpec

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS_AT_ONCE = 1 << 18
"""Matrices are worked on some rows at a time: what comes in between then stays in the caches."""

ROWS_TOGETHER = 128
LARGEST_HALF = 65504.0


class QuantisedFormat(Format):
    """A format in which a matrix `name` [N, K] is stored as `name`, its codes, `name_scales` and perhaps `name_zeros`.

    Biases and other tensors of fewer than two dimensions are stored as they are. Decoding gives fp32 matrices.
    A number is (code - zero) * scale, so a matrix that holds NaN or an infinity is refused.
    """

    multiple = 1
    """Numbers that a row must be a multiple of."""

    @abstractmethod
    def matrix_specs(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Suffix -> shape and dtype of what is stored for a matrix; the suffix of the codes is empty."""

    @abstractmethod
    def encode_rows(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Some rows in fp32, as many as a multiple of 128 or the last ones, by suffix.

        Raises:
            ValueError: a number that the format cannot hold.
        """

    @abstractmethod
    def decode_matrix(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The parts of a matrix, by suffix -> the matrix in fp32."""

    def stored(self, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        out = []
        taken = {spec.name for spec in specs}
        for spec in specs:
            if len(spec.shape) < 2:
                out.append(spec)
                continue
            self._check(spec)
            for suffix, (shape, dtype) in self.matrix_specs(*spec.shape).items():
                if suffix and spec.name + suffix in taken:
                    raise UnsupportedModelError(
                        f"the expert has tensors {spec.name} and {spec.name + suffix}; the latter is the name of the "
                        f"former's {suffix[1:]} in a quantised record"
                    )
                out.append(TensorSpec(spec.name + suffix, shape, dtype))
        return tuple(out)

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.stored([TensorSpec(name, tuple(value.shape), value.dtype) for name, value in tensors.items()])
        out = {}
        for name, value in tensors.items():
            if value.dim() < 2:
                out[name] = value
                continue
            for suffix, part in self._encode_matrix(name, value).items():
                out[name + suffix] = part
        return out

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        owners = {name for name in tensors if f"{name}_scales" in tensors}
        parts = {name + suffix for name in owners for suffix in ("_scales", "_zeros")}
        out = {}
        for name, value in tensors.items():
            if name in owners:
                suffixes = [suffix for suffix in ("", "_scales", "_zeros") if name + suffix in tensors]
                out[name] = self.decode_matrix({suffix: tensors[name + suffix] for suffix in suffixes})
            elif name not in parts:
                out[name] = value
        return out

    def _check(self, spec: TensorSpec) -> None:
        kind = type(self).__name__.lower()
        if len(spec.shape) != 2 or spec.dtype not in WEIGHT_DTYPES:
            raise UnsupportedModelError(
                f"{kind} holds matrices [N, K] in fp32, bf16 or fp16; {spec.name} is {list(spec.shape)} in {spec.dtype}"
            )
        if spec.shape[1] % self.multiple:
            raise UnsupportedModelError(
                f"{kind} needs rows of a multiple of {self.multiple} numbers; {spec.name} is {list(spec.shape)}, whose "
                f"rows leave {spec.shape[1] % self.multiple} over: use a format with smaller groups, or fp8 or plain"
            )

    def _encode_matrix(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        step = max(1, NUMBERS_AT_ONCE // max(1, weight.shape[1]) // ROWS_TOGETHER) * ROWS_TOGETHER
        try:
            pieces = [self.encode_rows(rows.float()) for rows in weight.split(step)]
        except ValueError as error:
            raise UnsupportedModelError(f"{name} cannot be stored as {type(self).__name__.lower()}: {error}") from error
        return {suffix: torch.cat([piece[suffix] for piece in pieces]) for suffix in pieces[0]}


def largest(groups: torch.Tensor, dim: int | tuple[int, ...] = -1) -> torch.Tensor:
    """The largest magnitude along `dim`, kept as a dimension of 1.

    Raises:
        ValueError: it is not finite.
    """
    amax = groups.abs().amax(dim, keepdim=True)
    if not amax.isfinite().all():
        raise ValueError("it holds NaN or an infinity; a model whose weights are broken cannot be quantised")
    return amax


def half_scale(amax: torch.Tensor, steps: float) -> torch.Tensor:
    """`amax / steps` in fp16, one bit more where rounding would leave `amax` over half a step beyond the last one.

    Raises:
        ValueError: too large for fp16.
    """
    if (amax > LARGEST_HALF * steps).any():
        raise ValueError(
            f"its largest number is {amax.max().item():.6g}, and this format holds up to {LARGEST_HALF * steps:.6g}"
        )
    scale = (amax / steps).half()
    short = scale.float() * (steps + 0.5) < amax
    return torch.where(short, (scale.view(torch.int16) + 1).view(torch.float16), scale)


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[N, K] of 0..15 -> uint8 [N, K / 2], number 2j in the low nibble of byte j, number 2j + 1 in the high one."""
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)
