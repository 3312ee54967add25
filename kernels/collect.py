"""The CPU's answer to a message, waited for and added to what the device has summed up itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moert.kernels._launch import CompileSpec, Launch, power_of_2_from
from moert.kernels._letters import ANSWERED, FAILED, NUMBER, SUMS, part
from moert.kernels.bank import FLOATS, output
from moert.kernels.dispatch import check_tensor
from moert.kernels.mailbox import MOST_POLLS, UNANSWERED, Letters, new_letters


@triton.jit
def _kernel(
    addresses_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    count_ptr: tl.tensor,
    y_ptr: tl.tensor,
    D: tl.constexpr,
    MOST: tl.constexpr,
    FAILURE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    count = tl.load(count_ptr)
    has_come = count == 0
    if count > 0:
        number = tl.load(part(addresses_ptr, NUMBER, tl.int32))
        answered_ptr = part(addresses_ptr, ANSWERED, tl.int32)
        # Adding 0 compiles to a load that later loads cannot overtake, and that sees what the CPU writes.
        answered = tl.atomic_add(answered_ptr, 0, sem="acquire", scope="sys")
        polls = 1
        while (answered != number) & (answered >= 0) & (polls < MOST):
            answered = tl.atomic_add(answered_ptr, 0, sem="acquire", scope="sys")
            polls += 1
        has_come = answered == number
        if answered != number:
            tl.store(part(addresses_ptr, FAILED, tl.int32), FAILURE)
    their_ptr = part(addresses_ptr, SUMS, tl.float32)
    for begin in range(0, D, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        mask = place < D
        y = tl.load(sums_ptr + place, mask=mask, other=0.0)
        if count > 0:
            y += tl.load(their_ptr + place, mask=mask & has_come, other=float("nan"))
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


def collect(
    letters: Letters,
    sums: torch.Tensor,
    count: torch.Tensor,
    *,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    most_polls: int = MOST_POLLS,
) -> torch.Tensor:
    """Add the CPU's sums for the latest message to the device's, and round once; `reference.collected` is the meaning.

    Where nothing was posted nothing is waited for. Else one program looks until the answer's number is that of the
    message, at most `most_polls` times; then, or if nobody answers any more, the result is NaN, and `Letters.failed`
    says so. A CUDA graph may capture it. The host does not wait.

    Args:
        letters: as for `post`.
        sums: fp32 [1, D].
        count: as for `post`.
        dtype: of the result, bf16, fp16 or fp32.
        out: [1, D], written to if given.

    Returns:
        [1, D], new memory or `out`.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    launch, y = _launch(letters, sums, count, dtype, out, most_polls)
    launch.run(sums.device)
    return y


def _launch(
    letters: Letters,
    sums: torch.Tensor,
    count: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    most_polls: int = MOST_POLLS,
) -> tuple[Launch, torch.Tensor]:
    device, hidden = letters.addresses.device, letters.sums.numel()
    check_tensor("sums", sums, 2, (torch.float32,), device)
    check_tensor("count", count, 1, (torch.int32,), device)
    if tuple(sums.shape) != (1, hidden) or count.numel() != 1 or dtype not in FLOATS or most_polls < 1:
        raise ValueError(
            f"sums {list(sums.shape)}, count {list(count.shape)}, {dtype} and {most_polls} polls: answers are of one "
            f"token of {hidden} numbers, in {', '.join(map(str, FLOATS))}, and somebody has to look for them"
        )
    out = output(out, (1, hidden), (dtype,), device)
    arguments = {
        "addresses_ptr": letters.addresses,
        "sums_ptr": sums,
        "count_ptr": count,
        "y_ptr": out,
        "D": hidden,
        "MOST": most_polls,
        "FAILURE": UNANSWERED,
        "BLOCK": min(4096, power_of_2_from(hidden)),
    }
    return Launch(_kernel, (1,), arguments, {"num_warps": 8}), out


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    specs = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        letters = new_letters(2048, 8, dtype, "meta")
        sums = torch.empty(1, 2048, device="meta")
        count = torch.empty(1, dtype=torch.int32, device="meta")
        launch, _ = _launch(letters, sums, count, dtype)
        specs.append(CompileSpec(f"collect[{name}]", launch, ("load128", "acquire")))
    return specs
