"""A message to the CPU: a token, and which experts of a layer are left to it; written by the device itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moert.kernels._launch import CompileSpec, Launch, power_of_2_from
from moert.kernels._letters import HEADER, HIDDEN, IDS, NUMBER, POSTED, WEIGHTS, part
from moert.kernels.bank import FLOATS
from moert.kernels.dispatch import check_tensor
from moert.kernels.mailbox import Letters, new_letters


@triton.jit(do_not_specialize=["layer"])
def _kernel(
    addresses_ptr: tl.tensor,
    words_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    count_ptr: tl.tensor,
    layer: tl.tensor,
    PICKS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    count = tl.load(count_ptr)
    if count > 0:
        number_ptr = part(addresses_ptr, NUMBER, tl.int32)
        number = (tl.load(number_ptr) + 1) & 0x7FFFFFFF
        place = tl.arange(0, BLOCK_P)
        mask = place < count
        experts = tl.load(experts_ptr + place, mask=mask, other=-1)
        ids = tl.load(ids_ptr + place, mask=place < PICKS, other=-1).to(tl.int32)
        weights = tl.load(weights_ptr + place, mask=place < PICKS, other=0.0).to(tl.float32)
        weights = tl.sum(tl.where(experts[:, None] == ids[None, :], weights[None, :], 0.0), axis=1)
        tl.store(part(addresses_ptr, IDS, tl.int32) + place, experts, mask=mask)
        tl.store(part(addresses_ptr, WEIGHTS, tl.float32) + place, weights, mask=mask)
        to_ptr = part(addresses_ptr, HIDDEN, words_ptr.dtype.element_ty)
        for begin in range(0, WORDS, BLOCK):
            word = begin + tl.arange(0, BLOCK)
            tl.store(to_ptr + word, tl.load(words_ptr + word, mask=word < WORDS), mask=word < WORDS)
        header_ptr = part(addresses_ptr, HEADER, tl.int32)
        tl.store(header_ptr, layer)
        tl.store(header_ptr + 1, count)
        tl.store(number_ptr, number)
        # What every thread has written comes before what one of them releases.
        tl.debug_barrier()
        tl.atomic_xchg(part(addresses_ptr, POSTED, tl.int32), number, sem="release", scope="sys")


def post(
    letters: Letters,
    layer: int,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Ask the CPU for what some experts of a layer give for a token; `reference.message` is the meaning.

    Nothing is written where there are none. The number of the message comes last, released to the whole system, so who
    sees it sees the message. Does not wait for the device, nor for the CPU: `collect` does. One program; a CUDA graph
    may capture it.

    Args:
        letters: of the device.
        layer: what `Mailbox.set_layer` calls it.
        hidden: [1, D] in the dtype of the letters.
        ids, weights: [1, K], int32 or int64, and bf16, fp16 or fp32.
        experts, count: int32 [M] and [1] on the device, `on_cpu` and `on_cpu_count` of a `Plan` of these ids.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    _launch(letters, layer, hidden, ids, weights, experts, count).run(hidden.device)


def _launch(
    letters: Letters,
    layer: int,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    count: torch.Tensor,
) -> Launch:
    device = letters.addresses.device
    check_tensor("hidden", hidden, 2, (letters.hidden.dtype,), device)
    check_tensor("ids", ids, 2, (torch.int32, torch.int64), device)
    check_tensor("weights", weights, 2, FLOATS, device)
    check_tensor("experts", experts, 1, (torch.int32,), device)
    check_tensor("count", count, 1, (torch.int32,), device)
    picks = ids.shape[1]
    if (
        tuple(hidden.shape) != (1, letters.hidden.numel())
        or tuple(ids.shape) != (1, picks)
        or weights.shape != ids.shape
        or experts.numel() > min(picks, letters.ids.numel())
        or count.numel() != 1
    ):
        raise ValueError(
            f"hidden {list(hidden.shape)}, ids {list(ids.shape)}, weights {list(weights.shape)}, experts "
            f"{list(experts.shape)} and count {list(count.shape)}: messages are of one token of "
            f"{letters.hidden.numel()} numbers and of at most {letters.ids.numel()} experts, and no more than picks"
        )
    # Numbers are moved as they are, so their kind does not matter.
    words = hidden.view(torch.int16 if hidden.element_size() == 2 else torch.int32)
    arguments = {
        "addresses_ptr": letters.addresses,
        "words_ptr": words,
        "ids_ptr": ids,
        "weights_ptr": weights,
        "experts_ptr": experts,
        "count_ptr": count,
        "layer": layer,
        "PICKS": picks,
        "WORDS": words.numel(),
        "BLOCK_P": power_of_2_from(picks),
        "BLOCK": min(4096, power_of_2_from(words.numel())),
    }
    return Launch(_kernel, (1,), arguments, {"num_warps": 8})


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    specs = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        letters = new_letters(2048, 8, dtype, "meta")
        hidden = torch.empty(1, 2048, dtype=dtype, device="meta")
        ids = torch.empty(1, 8, dtype=torch.int64, device="meta")
        weights = torch.empty(1, 8, dtype=dtype, device="meta")
        experts, count = (torch.empty(n, dtype=torch.int32, device="meta") for n in (8, 1))
        launch = _launch(letters, 1, hidden, ids, weights, experts, count)
        # The number of the message is exchanged, not added to.
        specs.append(CompileSpec(f"post[{name}]", launch, ("load128", "release", "atomic"), lacks=()))
    return specs
