"""Recall by horizon, and whether probabilities come true, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moert.predict.run import Result, horizon_name
from moert.report.figures import GRID, INK, MUTED, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vPX<>"
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


def png(studies: Sequence[Sequence[Result]]) -> bytes:
    """A PNG with a row for each study: recall of k by horizon, and the reliability of those that give probabilities."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13, 4.6 * len(studies)), layout="constrained", facecolor="white")
        panels = figure.subplots(len(studies), 2, squeeze=False, width_ratios=(3, 2))
        for (left, right), results in zip(panels, studies, strict=True):
            styles = _styles(results)
            _draw_recall(left, results, styles)
            _draw_reliability(right, results, styles)
            first = results[0]
            left.set_title(f"{first.trace}, trained on {first.trained_on}", loc="left", fontsize=12)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=140)
    return out.getvalue()


def _styles(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    pairs = zip(results, cycle(SERIES), cycle(_MARKERS), strict=False)
    return {result.predictor: {"color": color, "marker": marker, "markersize": 5} for result, color, marker in pairs}


def _draw_recall(axes: Axes, results: Sequence[Result], styles: dict[str, dict[str, Any]]) -> None:
    found = {(row.ahead_layers, row.ahead_tokens) for result in results for row in result.rows}
    keys = sorted(found, key=lambda key: (key[1], key[0]))
    for result in results:
        known = {(row.ahead_layers, row.ahead_tokens): row for row in result.rows if row.answered}
        for part in (False, True):
            places = [place for place, key in enumerate(keys) if key in known and bool(key[1]) == part]
            label = result.predictor if not part or not any(not key[1] for key in known) else None
            if places:
                values = [known[keys[place]].recall["k"] for place in places]
                axes.plot(places, values, label=label, **styles[result.predictor])
    axes.set_xticks(range(len(keys)), [horizon_name(*key) for key in keys])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("picks among the k likeliest")
    axes.grid(color=GRID, linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left")


def _draw_reliability(axes: Axes, results: Sequence[Result], styles: dict[str, dict[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    for result in results:
        row = next((row for row in result.rows if row.reliability), None)
        if row is not None and row.reliability:
            means, shares, _ = zip(*row.reliability, strict=True)
            axes.plot(means, shares, label=result.predictor, **styles[result.predictor])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("probability named")
    axes.set_ylabel("share that was picked")
    axes.grid(color=GRID, linewidth=0.8)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)
