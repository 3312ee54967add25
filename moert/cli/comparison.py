"""Two runs of one prompt, token by token: what they have in common and where they part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from moert.hf.decoded import DecodedCheck
    from moert.hf.reference import Products


@dataclass(frozen=True)
class Tolerance:
    """How far the logits may be apart, as a share of the largest of them, and why that far."""

    share: float
    reason: str


EXACT = Tolerance(0.0, "the same kernels on the same weights: every bit must agree")
FLOAT32 = Tolerance(1e-5, "float32 keeps 24 bits; sums in another order differ in the last few")
SIXTEEN_BIT = Tolerance(2**-6, "two units in the last place of bfloat16, 2^-7 each; float16 has finer ones")
# Twice, for two products, a number is off by up to 1/254 of the largest of 32. That makes about 1 % of the typical
# output and is less of the largest; five times as much is an error.
INT8_ACTIVATIONS = Tolerance(0.05, "activations too are rounded to 8 bits for such weights")
# Both sum in float32 and round once, so the two are neighbours at most.
PRODUCT_ULPS = 1.0


@dataclass(frozen=True)
class Reference:
    """What the offloaded run is held against."""

    kind: Literal["transformers", "resident", "moert"]
    description: str
    tolerance: Tolerance
    decoded_tolerance: Tolerance | None = None
    """How far experts may be from what their decoded weights give, where they are quantised."""


@dataclass(frozen=True)
class Trace:
    """One greedy run: its tokens, the logits behind each, and the experts that each forward of each layer picked."""

    token_ids: list[int]
    logits: torch.Tensor
    picks: dict[str, list[torch.Tensor]]
    decoded: DecodedCheck | None = None
    """Of a reference with quantised experts: how far they are from their decoded weights."""
    products: Products | None = None
    """Of a reference that rounds as moert does: how far moert's products are from torch's."""


def compare(mine: Trace, theirs: Trace, reference: Reference, tokenizer: Any) -> dict[str, Any]:
    """What two runs of one prompt have in common.

    After the first token that differs the two have different texts before them, so logits and routing are compared up
    to and including the forward that chose it.
    """
    pairs = list(zip(mine.token_ids, theirs.token_ids, strict=False))
    shared = next((step for step, (a, b) in enumerate(pairs) if a != b), len(pairs))
    identical_tokens = mine.token_ids == theirs.token_ids
    forwards = min(shared + 1, len(mine.logits), len(theirs.logits))
    error = float((mine.logits[:forwards] - theirs.logits[:forwards]).abs().max())
    largest = float(theirs.logits[:forwards].abs().max())
    picks, differing, first_layer = _compare_routing(mine, theirs, forwards)
    tolerance = reference.tolerance
    within = error <= tolerance.share * largest  # false for NaN too
    products = theirs.products
    products_within = products is None or products.largest_error_ulps <= PRODUCT_ULPS
    decoded, allowed = theirs.decoded, reference.decoded_tolerance
    decoded_within = decoded is None or allowed is None or decoded.largest_error <= allowed.share
    first_difference: dict[str, Any] | None = None
    if not identical_tokens:
        first_difference = _difference(mine, theirs, shared, tokenizer)
    return {
        "reference": reference.kind,
        "reference_description": reference.description,
        "tokens_compared": len(pairs),
        "identical_tokens": identical_tokens,
        "identical_routing": not differing,
        "picks_compared": picks,
        "picks_differing": differing,
        "first_layer_differing": first_layer,
        "max_abs_logit_error": error,
        "max_abs_logit": largest,
        "tolerance": tolerance.share,
        "tolerance_reason": tolerance.reason,
        "within_tolerance": within,
        "products_compared": 0 if products is None else products.compared,
        "max_product_error_ulps": None if products is None else products.largest_error_ulps,
        "products_within_tolerance": products_within,
        "decoded_compared": 0 if decoded is None else decoded.compared,
        "max_decoded_error": None if decoded is None else decoded.largest_error,
        "decoded_tolerance": None if allowed is None else allowed.share,
        "decoded_tolerance_reason": None if allowed is None else allowed.reason,
        "decoded_within_tolerance": decoded_within,
        "first_difference": first_difference,
        "passed": identical_tokens and not differing and within and products_within and decoded_within,
    }


def _compare_routing(mine: Trace, theirs: Trace, forwards: int) -> tuple[int, int, str | None]:
    """(picks compared, picks that only one of the two made, the first layer with one)."""
    picks, differing, first = 0, 0, None
    for path, calls in theirs.picks.items():
        for expected, found in zip(calls[:forwards], mine.picks.get(path, [])[:forwards], strict=False):
            picks += expected.numel()
            here = int((expected != found).sum()) if expected.shape == found.shape else expected.numel()
            differing += here
            first = first or (path if here else None)
    return picks, differing, first


def _difference(mine: Trace, theirs: Trace, step: int, tokenizer: Any) -> dict[str, Any]:
    """The first token that differs, and by how much the reference preferred its own; None where one run just ended."""
    tokens = [run.token_ids[step] if step < len(run.token_ids) else None for run in (mine, theirs)]
    found, expected = tokens
    margin = None
    if found is not None and expected is not None:
        margin = float(theirs.logits[step, expected] - theirs.logits[step, found])
    return {
        "step": step,
        "token": found,
        "text": None if found is None else tokenizer.decode([found]),
        "reference_token": expected,
        "reference_text": None if expected is None else tokenizer.decode([expected]),
        "reference_margin": margin,
    }
