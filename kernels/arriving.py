"""One token's experts on the CPU, some of which are still being read: each is computed as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moert import _C
from moert.kernels.cpu_ffn import Expert, ExpertFfn


class Arrived(NamedTuple):
    """What has become of a token's K experts; new memory."""

    output: torch.Tensor | None
    """Like the token: as `ExpertFfn.run_token`; None where some could not be read."""
    held: torch.Tensor
    """[K, D] fp32: what each gives, not weighted; 0 for those that could not be read."""
    is_computed: list[bool]
    """[K]"""
    compute_s: float
    """Seconds that computing them took."""
    wait_s: float
    """Seconds that were waited for reads."""


def run_arriving(
    ffn: ExpertFfn,
    hidden: torch.Tensor,
    experts: Sequence[Expert],
    places: Sequence[int],
    weights: torch.Tensor,
    records: Sequence[object | None],
) -> Arrived:
    """What the experts give for one token `hidden` [1, D], to the bit as `ExpertFfn.run_token` gives it once all are
    there. Blocks until they are computed or their reads have failed, without the GIL; runs signal handlers.

    Args:
        experts: at least one.
        places: for each expert where its weight is in `weights`.
        weights: fp32, contiguous, on the CPU.
        records: for each expert what the extension's reader reads it from; None: it is there.

    Raises:
        ValueError: dtypes, shapes or places do not fit.
    """
    ffn.check_token(hidden, weights)
    held = torch.empty(len(experts), ffn.hidden)
    y = torch.empty_like(hidden)
    computed, compute_s, wait_s = _C.ffn_arriving(
        ffn.arguments,
        ffn.number,
        ffn.hidden,
        ffn.width,
        hidden.data_ptr(),
        y.data_ptr(),
        weights.data_ptr(),
        weights.numel(),
        held.data_ptr(),
        [(expert.capsule, place, record) for expert, place, record in zip(experts, places, records, strict=True)],
    )
    return Arrived(y if all(computed) else None, held, computed, compute_s, wait_s)
