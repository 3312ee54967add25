"""What was possible where something was measured: the link's time, what is there already, and the other ways."""

from __future__ import annotations

from typing import Any

from gpu_results import Rows, Target
from gpu_tiered import FETCHED, HYBRID, STATIC

SHARES = (25, 10, 50)
WHOLE = 100

SHARE_OF_BOUND = Target(0.70, at_most=False)
OVERLAP = Target(1.15)
OVER_STATIC = Target(1.7, at_most=False)
OVER_BEST = Target(0.97, at_most=False)
OVER_HF = Target(20, at_most=False)
GOAL_SHARE = 25
"""Of the experts on the device, in percent: what goals are said of."""
GRAPH = Target(1.8, at_most=False)
GRAPH_OVER_EAGER = "graph over eager"


class Found:
    """Rows by what they are of."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = {
            (row["kind"], row["stored_as"], row["share"], row["way"]): row
            for row in rows
            if row.get("kind") and row["value"] is not None
        }

    def row(self, kind: str, share: int, way: str, stored_as: str = "bf16") -> dict[str, Any] | None:
        return self._rows.get((kind, stored_as, share, way))

    def ways(self, kind: str, share: int) -> dict[str, dict[str, Any]]:
        wanted = kind, "bf16", share
        return {way: row for (*what, way), row in self._rows.items() if tuple(what) == wanted}


def judge(rows: Rows, link: float, expert_bytes: int) -> None:
    """Add the rows that come out of others.

    Args:
        link: bytes a second from page-locked memory.
    """
    found = Found(rows.rows)
    for share in SHARES:
        _bound(rows, found, share, link, expert_bytes)
        _hybrid(rows, found, share)
        _prefill(rows, found, share, link)
        _same_tokens(rows, found, share)
        _beside_hf(rows, found, share)
    if not any(row["what"].endswith(GRAPH_OVER_EAGER) for row in rows.rows):
        why = "its part was not measured"
        rows.add(f"decode, {GRAPH_OVER_EAGER}", None, "x", goal="G9", target=GRAPH, why=why)


def _bound(rows: Rows, found: Found, share: int, link: float, expert_bytes: int) -> None:
    """Decoding takes at least what copying the missing experts takes, and what the rest takes with all of them there.
    With a share for the CPU it may be less."""
    whole = found.row("decode", WHOLE, FETCHED)
    ways = found.ways("decode", share)
    for way, row in ways.items():
        if whole is None:
            continue
        bound_s = row["missed"] * expert_bytes / link + whole["s_per_token"]
        goal = {"goal": "G9", "target": SHARE_OF_BOUND} if way == HYBRID else {}
        of_link = row["copied_bytes"] / link / row["s_per_token"]
        what = f"decode at {share} %, share of the bound, {way}"
        rows.add(what, bound_s / row["s_per_token"], "", **goal, bound_s=bound_s, share_of_link=of_link)
    if whole is None or HYBRID not in ways:
        what = f"decode at {share} %, share of the bound, {HYBRID}"
        rows.add(what, None, "", goal="G9", target=SHARE_OF_BOUND, why="one of its parts was not measured")


def _hybrid(rows: Rows, found: Found, share: int) -> None:
    ways = found.ways("decode", share)
    hybrid = ways.pop(HYBRID, None)
    gains = {} if hybrid is None else {way: hybrid["value"] / row["value"] for way, row in ways.items()}
    pure = {way: gain for way, gain in gains.items() if way != STATIC}
    best = min(pure, key=lambda way: pure[way], default=None)
    facts = {"goal": "offload", "gains": gains} | ({} if gains else {"why": "one of its parts was not measured"})
    what = "the best other way" if best is None else best
    rows.add(f"decode at {share} %, {HYBRID} over {what}", pure.get(what), "x", target=OVER_BEST, **facts)
    target = OVER_STATIC if share == GOAL_SHARE else None
    rows.add(f"decode at {share} %, {HYBRID} over {STATIC}", gains.get(STATIC), "x", target=target, **facts)


def _prefill(rows: Rows, found: Found, share: int, link: float) -> None:
    whole, row = found.row("prefill", WHOLE, FETCHED), found.row("prefill", share, FETCHED)
    what = f"prompt at {share} %, time over max(copies, compute)"
    if whole is None or row is None:
        rows.add(what, None, "x", goal="G7", target=OVERLAP, why="one of its parts was not measured")
        return
    copy_s, compute_s = row["copied_bytes"] / link, whole["value"]
    ratio = row["value"] / max(copy_s, compute_s)
    rows.add(what, ratio, "x", goal="G7", target=OVERLAP, copy_s=copy_s, compute_s=compute_s)


def _same_tokens(rows: Rows, found: Found, share: int) -> None:
    """On the device alone, a budget must not change a bit."""
    whole, row = found.row("decode", WHOLE, FETCHED), found.row("decode", share, FETCHED)
    if whole is None or row is None:
        return
    pairs = list(zip(whole["greedy"], row["greedy"], strict=False))
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    what = f"first greedy tokens at {share} % that are those at {WHOLE} %, of {len(pairs)}"
    rows.add(what, float(same), "tokens", goal="offload", wrong=same < len(pairs))


def _beside_hf(rows: Rows, found: Found, share: int) -> None:
    for kind in ("decode", "prefill"):
        ours, other = found.row(kind, share, HYBRID), found.row(f"hf {kind}", share, "device_map")
        facts = {"goal": "offload", "target": OVER_HF if (kind, share) == ("decode", GOAL_SHARE) else None}
        what = f"{kind} at {share} %, {HYBRID} over device_map"
        if ours is None or other is None:
            rows.add(what, None, "x", **facts, why="one of its parts was not measured")
            continue
        gain = ours["value"] / other["value"] if kind == "decode" else other["value"] / ours["value"]
        rows.add(what, gain, "x", **facts)
