"""Whether moert's tokens are the right ones: no speed without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from limited import Outcome
from systems import Spec

# A logit this close below the best one, in standard deviations of all logits, is a tie in bf16.
TIE = 0.1


@dataclass(frozen=True)
class Parity:
    """`verdict` is "equal", "ties", "red", "not checked" (no reference could be had) or "not asked" (moert not run)."""

    verdict: str
    reference: str = ""
    why: str = ""

    @property
    def green(self) -> bool:
        return self.verdict in ("equal", "ties", "not asked")


def check(
    outcomes: list[Outcome], spec: Spec, reference_host_memory: str, run: Callable[[Spec, bool], Outcome]
) -> Parity:
    """Compare moert's greedy tokens with those of transformers or, if that has none, of moert with another budget.

    Where they differ from those of transformers, moert runs once more along the reference's tokens, and each must be
    within a bf16 tie of moert's own best: rounding may order near-equal logits differently, nothing else may differ.
    With another budget of moert there is no such leave: every budget gives the same bits.

    Args:
        spec: moert's run. `run(spec, limited)` runs one more, under the memory limit or without it.
    """
    mine = [outcome.run.tokens for outcome in outcomes if outcome.system == "moert" and outcome.run]
    if not mine:
        return Parity("not checked", why="moert did not run")
    if any(tokens != mine[0] for tokens in mine):
        return Parity("red", "moert, another round", "moert's tokens differ between rounds")
    theirs = [outcome.run.tokens for outcome in outcomes if outcome.system == "hf" and outcome.run]
    if not theirs:
        reference = f"moert with host_memory={reference_host_memory}"
        other = run(replace(spec, host_memory=reference_host_memory), False)
        if other.run is None:
            return Parity("not checked", reference, other.error)
        equal = other.run.tokens == mine[0]
        return Parity("equal" if equal else "red", reference, "" if equal else "other tokens")
    if mine[0] == theirs[0]:
        return Parity("equal", "hf")
    along = run(replace(spec, forced=theirs[0]), True)
    if along.run is None:
        return Parity("red", "hf", f"moert along hf's tokens: {along.error}")
    worst = max(along.run.gaps)
    differ = next(place for place, pair in enumerate(zip(mine[0], theirs[0], strict=True)) if pair[0] != pair[1])
    return Parity(
        "ties" if worst <= TIE else "red",
        "hf",
        f"tokens differ from number {differ} on; along hf's tokens {along.run.forced_differ} of {len(along.run.gaps)} "
        f"are not moert's best, by {worst:.3f} standard deviations of the logits at most (a tie is {TIE})",
    )
