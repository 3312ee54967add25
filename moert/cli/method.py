"""How a simulation was done, in words for its report."""

from __future__ import annotations

from moert.cli.replay import Asked

_ALWAYS = (
    (
        "One step of one layer is one event: all experts that its tokens chose, each counted once. What the cache has "
        "when the event begins are its hits; nothing that the event needs is evicted for it, if it fits."
    ),
    (
        "The replay drives the same policy objects as the engine, by the same rule: a live run that was recorded has "
        "the hits that its replay has."
    ),
    (
        "MIN is Belady’s rule: the expert leaves that is needed again last. No policy that admits every miss has fewer "
        "misses, where every event fits and counts and experts are of one size. “At most” is the bound without these "
        "conditions: it knows what counts, and where an event does not fit it need not admit a miss."
    ),
    "Saved from LRU to bound: of the misses that LRU has beyond the fewest possible, the share that a policy saves.",
    (
        "Intervals are a bootstrap over sequences, 95 %. They say how much the sequences of this trace differ, not how "
        "another text or model would do."
    ),
)
_PROMPTS = "Tokens of prompts warm the cache and are not counted."
_PERSISTENT = (
    "An expert’s first use is a miss, and counted. The cache is empty when the trace begins and keeps what it has from "
    "one sequence to the next."
)
_COLD = "Cache and policy start anew with each sequence; an expert’s first use there is a miss, and counted."
_ASIDE = (
    "“One cache for all” is LRU with a single cache of the same size for all layers. The layers take turns in it, so "
    "that an expert comes back only after a whole token: nothing hits while the cache holds less than a token needs."
)
_BYPASS = (
    "A miss that the policy does not want is computed without a slot; it is a miss, and moves no bytes into the cache."
)


def settings(asked: Asked) -> list[tuple[str, str]]:
    """What was asked for, as names and values."""
    live = [policy for policy in asked.policies if policy not in asked.bounds]
    told = [] if asked.predictor is None else [("predictor", asked.predictor)]
    return [
        ("policies", "; ".join(live) or "none that can run"),
        ("bounds", "; ".join(asked.bounds)),
        *told,
        ("capacities", ", ".join(asked.capacities)),
        ("scope", "a cache for each layer" if asked.scope == "layer" else "one cache for all layers"),
        ("reset", "never: one run over all sequences" if asked.reset == "never" else "each sequence begins empty"),
        ("counted", "generated tokens" if asked.count == "decode" else "all tokens, those of prompts too"),
        ("batch", "one sequence at a time" if asked.batch == 1 else f"{asked.batch} sequences together"),
        ("bypass", "a policy may leave a miss out of the cache" if asked.bypass else "every miss is admitted"),
    ]


def notes(asked: Asked) -> list[str]:
    """What a reader has to know to compare the numbers with others."""
    found = [*_ALWAYS[:2]]
    if asked.count == "decode":
        found.append(_PROMPTS)
    found.append(_PERSISTENT if asked.reset == "never" else _COLD)
    if asked.bypass:
        found.append(_BYPASS)
    found += _ALWAYS[2:]
    if asked.scope == "layer":
        found.append(_ASIDE)
    return found
