"""What a router would choose for the hidden state of one token that is not there yet, on the CPU."""

from __future__ import annotations

import torch

from moert import _C
from moert.kernels.cpu import NUMBERS

UNSCALED = -1.0
"""Instead of an eps: the source is taken as it is."""


class Lines:
    """For each of D channels the line that says what becomes of it, drawn through what has been seen to."""

    def __init__(self, width: int) -> None:
        """At first nothing changes. All fp32."""
        self.mean = torch.zeros(2, width)
        """[2, D] of source and target."""
        self.moments = torch.zeros(2, width)
        """[2, D] variance of the source, covariance of both."""
        self.gain = torch.ones(width)
        self.offset = torch.zeros(width)
        self._seen = self.mean.data_ptr(), self.moments.data_ptr()
        self.pointers = self.gain.data_ptr(), self.offset.data_ptr()
        """Where gain and offset are."""

    def learn(self, source: torch.Tensor, target: torch.Tensor, share: float, *, moments: bool = True) -> bool:
        """`source` [1, D] became `target` [1, D]: move by `share` towards that, the `moments` or the means alone.

        Returns:
            False, and nothing has changed, where they are not finite.

        Raises:
            ValueError: not one token of this width, of floating-point numbers, contiguous, on the CPU.
        """
        width = self.gain.shape[0]
        for tensor in (source, target):
            if tensor.shape != (1, width) or not is_for(tensor):
                raise ValueError(f"{list(tensor.shape)} in {tensor.dtype} is not one token of {width} numbers")
        return _C.learn_lines(
            NUMBERS[source.dtype],
            source.data_ptr(),
            NUMBERS[target.dtype],
            target.data_ptr(),
            width,
            share,
            moments,
            *self._seen,
            *self.pointers,
        )


class GateLook:
    """A router's weights, to be asked for one token at a time."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, correction: torch.Tensor | None, count: int
    ) -> None:
        """`weight` [E, D]; `bias` [E] is added to the products, `correction` [E] to the sigmoid of those.

        Args:
            count: so many experts are named, at most E.

        Raises:
            ValueError: the weight is not of floating-point numbers, contiguous, on the CPU; or shapes do not fit.
        """
        if weight.dim() != 2 or not is_for(weight):
            raise ValueError(f"a weight {list(weight.shape)} in {weight.dtype} on {weight.device} cannot be looked at")
        experts = weight.shape[0]
        vectors = []
        for vector in (bias, correction):
            if vector is not None and vector.shape != (experts,):
                raise ValueError(f"{list(vector.shape)} numbers for {experts} experts")
            vectors.append(None if vector is None else vector.to("cpu", torch.float32).contiguous())
        if not 0 <= count <= experts:
            raise ValueError(f"the best {count} of {experts} experts")
        self._kept = (weight, *vectors)
        self._width = weight.shape[1]
        self._experts = experts
        self._number, self._count = NUMBERS[weight.dtype], count
        self._weight_at = weight.data_ptr()
        self._bias_at, self._correction_at = (None if vector is None else vector.data_ptr() for vector in vectors)

    def best(
        self,
        source: torch.Tensor,
        lines: Lines | None = None,
        eps: float = UNSCALED,
        scaled: torch.Tensor | None = None,
    ) -> tuple[list[int], torch.Tensor]:
        """What the router would choose first for the token that `source` [1, D] becomes. Takes microseconds.

        Args:
            lines: what will become of each channel; None: nothing.
            eps: at least 0: the source is divided by the root of its mean square plus this, before all else, and
                written to `scaled` [1, D], fp32.

        Returns:
            The experts, the best first, of equal ones the first; none where something is not finite. And what was
            compared, [1, E] fp32.

        Raises:
            ValueError: not one token of the weight's width, of floating-point numbers, contiguous, on the CPU.
        """
        if source.shape != (1, self._width) or not is_for(source):
            raise ValueError(f"{list(source.shape)} in {source.dtype} is not one token of {self._width} numbers")
        if scaled is not None and (scaled.shape != source.shape or scaled.dtype is not torch.float32):
            raise ValueError(f"scaled must be {list(source.shape)} in torch.float32")
        values = torch.empty(1, self._experts)
        found = _C.gate_look(
            NUMBERS[source.dtype],
            source.data_ptr(),
            self._width,
            eps,
            None if scaled is None else scaled.data_ptr(),
            None if lines is None else lines.pointers[0],
            None if lines is None else lines.pointers[1],
            self._number,
            self._weight_at,
            self._experts,
            self._bias_at,
            self._correction_at,
            self._count,
            values.data_ptr(),
        )
        return found, values


def is_for(tensor: torch.Tensor) -> bool:
    """Whether the kernels can read a tensor."""
    return tensor.dtype in NUMBERS and tensor.is_cpu and tensor.is_contiguous()
