"""Whole experts on the CPU: the weights of one, a step of many, and the sum of what they give."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moert import _C
from moert.kernels.cpu import bias_fits
from moert.kernels.cpu_matrix import NUMBERS, Matrix
from moert.kernels.gate import Gate


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """One expert's weights, ready to be computed with; keeps its tensors alive."""

    capsule: object
    tensors: tuple[object, ...]


class Handle:
    """A step under way; keeps what it reads and writes alive."""

    __slots__ = ("_job", "_keep")

    def __init__(self, job: object, keep: object) -> None:
        self._job = job
        self._keep = keep

    def ready(self) -> bool:
        """Whether it is done."""
        return _C.job_ready(self._job)

    def wait(self) -> None:
        """Block until it is done, taking part in the work."""
        _C.job_wait(self._job)
        self._keep = None

    def __del__(self) -> None:
        # The threads may still write to memory that this object keeps; there are none in a fork and at the exit.
        with contextlib.suppress(RuntimeError):
            self.wait()


class ExpertFfn:
    """What all experts of a layer have in common, and how a step of them is run."""

    def __init__(self, gate: Gate, hidden: int, width: int, dtype: torch.dtype) -> None:
        """
        Args:
            gate: from the up product [.., 2 * width or width] to [.., width].
            hidden, width: D and F.
            dtype: of activations and biases, and of the weights if they are plain.
        """
        if dtype not in NUMBERS:
            raise ValueError(f"activations are {', '.join(map(str, NUMBERS))}, not {dtype}")
        self.gate, self.hidden, self.width, self.dtype = gate, hidden, width, dtype
        self.number = NUMBERS[dtype]
        """What the extension calls it."""
        self.arguments = (
            gate.activation,
            gate.gated,
            gate.interleaved,
            gate.alpha,
            gate.gate_limit,
            gate.up_limit,
            gate.up_offset,
            gate.output_limit,
        )
        """What the extension takes of the gate."""

    def expert(
        self, up: Matrix, down: Matrix, up_bias: torch.Tensor | None = None, down_bias: torch.Tensor | None = None
    ) -> Expert:
        """An expert of this layer: up [2F or F, D], down [D, F], biases [2F or F] and [D].

        Raises:
            ValueError: shapes or dtypes are not those of the layer.
        """
        rows = self.width * (2 if self.gate.gated else 1)
        if up.shape != (rows, self.hidden) or down.shape != (self.hidden, self.width):
            raise ValueError(
                f"up {up.shape} and down {down.shape} are not {(rows, self.hidden)} and {(self.hidden, self.width)}"
            )
        for name, bias, size in (("up", up_bias, rows), ("down", down_bias, self.hidden)):
            if bias is not None and not bias_fits(bias, size, self.dtype):
                raise ValueError(
                    f"the {name} bias is {tuple(bias.shape)} of strides {bias.stride()} in {bias.dtype} on "
                    f"{bias.device}, not contiguous ({size},) in {self.dtype} on the CPU"
                )
        capsule = _C.expert(
            self.number,
            up.capsule,
            down.capsule,
            None if up_bias is None else up_bias.data_ptr(),
            None if down_bias is None else down_bias.data_ptr(),
        )
        return Expert(capsule, (up, down, up_bias, down_bias))

    def run(
        self,
        hidden: torch.Tensor,
        experts: Sequence[Expert],
        tokens: Sequence[torch.Tensor | None],
        weights: Sequence[torch.Tensor | None],
        out: torch.Tensor,
        *,
        out_rows: Sequence[int] | None = None,
    ) -> None:
        """Add to `out` [T, D] (fp32) what each expert gives for its tokens of `hidden` [T, D], times the weights.

        The sum is made in fp32, expert after expert in the order given, with a rounding after each product and each
        sum, so it does not matter whether experts come in one call or several. Blocks, without the GIL.

        Args:
            hidden: in the layer's dtype, contiguous, as `out` is.
            tokens: for each expert the int64 rows that chose it, each once, or None for all rows.
            weights: for each expert fp32 weights of those rows, or None for 1.
            out_rows: for each expert where its rows of `out` begin, which then lie one after the other; `out` may then
                have any number of rows. None: its rows of `out` are those of `hidden`.

        Raises:
            ValueError: dtypes, shapes or rows do not fit.
        """
        _C.ffn_run(*self._arguments(hidden, experts, tokens, weights, out, out_rows))

    def run_token(
        self, hidden: torch.Tensor, experts: Sequence[Expert], places: Sequence[int], weights: torch.Tensor
    ) -> torch.Tensor:
        """What the experts give for one token `hidden` [1, D], weighted, as `run` adds it up: [1, D] in the layer's
        dtype, rounded once; new memory. Blocks, without the GIL.

        Args:
            experts: at least one.
            places: for each expert where its weight is in `weights`.
            weights: fp32, contiguous, on the CPU.

        Raises:
            ValueError: dtypes, shapes or places do not fit.
        """
        self.check_token(hidden, weights)
        y = torch.empty_like(hidden)
        _C.ffn_token(
            self.arguments,
            self.number,
            self.hidden,
            self.width,
            hidden.data_ptr(),
            y.data_ptr(),
            weights.data_ptr(),
            weights.numel(),
            [expert.capsule for expert in experts],
            list(places),
        )
        return y

    def check_token(self, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        """
        Raises:
            ValueError: `hidden` is not one token [1, D] of the layer, or `weights` are no weights of experts.
        """
        if (
            hidden.dtype is not self.dtype
            or hidden.shape != (1, self.hidden)
            or not hidden.is_contiguous()
            or not hidden.is_cpu
        ):
            raise self._unfit("hidden states", hidden, self.dtype)
        if weights.dtype is not torch.float32 or not weights.is_contiguous() or not weights.is_cpu:
            raise ValueError(
                f"weights must be contiguous torch.float32 on the CPU, not {tuple(weights.shape)} in {weights.dtype} "
                f"on {weights.device}"
            )

    def submit(
        self,
        hidden: torch.Tensor,
        experts: Sequence[Expert],
        tokens: Sequence[torch.Tensor | None],
        weights: Sequence[torch.Tensor | None],
        out: torch.Tensor,
        *,
        out_rows: Sequence[int] | None = None,
    ) -> Handle:
        """Start what `run` does and return; `hidden`, the weights and `out` belong to the work until it is done."""
        arguments = self._arguments(hidden, experts, tokens, weights, out, out_rows)
        return Handle(_C.ffn_submit(*arguments), (hidden, experts, tokens, weights, out))

    def _arguments(
        self,
        hidden: torch.Tensor,
        experts: Sequence[Expert],
        tokens: Sequence[torch.Tensor | None],
        weights: Sequence[torch.Tensor | None],
        out: torch.Tensor,
        out_rows: Sequence[int] | None,
    ) -> tuple[Any, ...]:
        self._check(hidden, out)
        rows = hidden.shape[0]
        begins = out_rows if out_rows is not None else [None] * len(experts)
        groups = [
            (expert.capsule, *_addresses(of, weight, rows), begin)
            for expert, of, weight, begin in zip(experts, tokens, weights, begins, strict=True)
        ]
        return (
            self.arguments,
            self.number,
            self.hidden,
            self.width,
            hidden.data_ptr(),
            rows,
            out.data_ptr(),
            out.shape[0],
            groups,
        )

    def _check(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        for what, tensor, dtype in (("hidden states", hidden, self.dtype), ("out", out, torch.float32)):
            if (
                tensor.dtype != dtype
                or tensor.dim() != 2
                or tensor.shape[1] != self.hidden
                or not tensor.is_contiguous()
                or not tensor.is_cpu
            ):
                raise self._unfit(what, tensor, dtype)

    def _unfit(self, what: str, tensor: torch.Tensor, dtype: torch.dtype) -> ValueError:
        return ValueError(
            f"{what} must be contiguous [T, {self.hidden}] in {dtype} on the CPU, not {list(tensor.shape)} of strides "
            f"{tensor.stride()} in {tensor.dtype} on {tensor.device}"
        )


def add_rows(held: torch.Tensor, tokens: torch.Tensor | None, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Add each row of `held` [n, D] times its weight to a row of `out` [T, D]: a product, then a sum. Blocks.

    Args:
        held, weights, out: fp32; `held` and `out` contiguous, on the CPU.
        tokens: [n] int64, the rows of `out`, each once; None: the first n.

    Raises:
        ValueError: dtypes, shapes or rows do not fit.
    """
    for what, tensor in (("held", held), ("out", out)):
        if (
            tensor.dtype != torch.float32
            or tensor.dim() != 2
            or tensor.shape[1] != held.shape[1]
            or not tensor.is_contiguous()
            or not tensor.is_cpu
        ):
            raise ValueError(
                f"{what} must be contiguous [rows, {held.shape[-1] if held.dim() else 'D'}] in torch.float32 on the "
                f"CPU, not {list(tensor.shape)} of strides {tensor.stride()} in {tensor.dtype} on {tensor.device}"
            )
    rows = held.shape[0]
    count, to, weights_at = _addresses(tokens, weights, rows)
    if count != rows:
        raise ValueError(f"{count} tokens for {rows} rows")
    if rows and weights_at is None:
        raise ValueError(f"no weights for {rows} rows")
    if rows and weights_at is not None:
        _C.add_rows(held.data_ptr(), rows, held.shape[1], to, weights_at, out.data_ptr(), out.shape[0])


def add_in_order(held: torch.Tensor, places: Sequence[int], weights: torch.Tensor, out: torch.Tensor) -> None:
    """Add the rows of `held` [K, D], each times its weight, to `out` [1, D], row after row as `add_rows` would. Blocks.

    Args:
        held, weights, out: fp32, contiguous, on the CPU.
        places: [K], where each row's weight is in `weights`.

    Raises:
        ValueError: dtypes, shapes or places do not fit.
    """
    for what, tensor in (("held", held), ("weights", weights), ("out", out)):
        if tensor.dtype is not torch.float32 or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(f"{what} must be contiguous torch.float32 on the CPU, not {tensor.dtype}")
    if held.dim() != 2:
        raise ValueError(f"held must be [K, D], not {list(held.shape)}")
    rows, width = held.shape
    if out.shape != (1, width) or len(places) != rows or not all(0 <= place < weights.numel() for place in places):
        raise ValueError(
            f"{list(held.shape)} rows with weights {list(places)} of {weights.numel()} do not fit {list(out.shape)}"
        )
    begin, weights_at, to = held.data_ptr(), weights.data_ptr(), out.data_ptr()
    for row, place in enumerate(places):
        _C.add_rows(begin + 4 * row * width, 1, width, None, weights_at + 4 * place, to, 1)


def _addresses(
    tokens: torch.Tensor | None, weights: torch.Tensor | None, rows: int
) -> tuple[int, int | None, int | None]:
    """How many tokens there are, and where their rows and weights lie."""
    count, address = rows, None
    if tokens is not None:
        if tokens.dtype != torch.int64 or tokens.dim() != 1 or not tokens.is_contiguous() or not tokens.is_cpu:
            raise ValueError(
                f"rows must be contiguous 1-D int64 on the CPU, not {tokens.dtype} {tuple(tokens.shape)} of strides "
                f"{tokens.stride()} on {tokens.device}"
            )
        count, address = tokens.shape[0], tokens.data_ptr() or None
    if weights is None:
        return count, address, None
    if weights.dtype != torch.float32 or weights.shape != (count,) or not weights.is_contiguous() or not weights.is_cpu:
        raise ValueError(
            f"weights must be contiguous ({count},) in torch.float32 on the CPU, not {tuple(weights.shape)} of strides "
            f"{weights.stride()} in {weights.dtype} on {weights.device}"
        )
    return count, address, weights.data_ptr() or None
