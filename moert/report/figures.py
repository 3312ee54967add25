"""Miss-ratio curves, drawn with matplotlib: as a PNG file, and as SVG that takes its colours from the page it is in."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moert.report.study import CurveLine, TraceStudy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours that Okabe and Ito chose to be told apart by colour-blind readers, without yellow, which white swallows.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, MUTED, GRID, PAPER = "#1a1a1b", "#6b6b6d", "#dcdcde", "#fefeff"
_MARKERS = "osD^vPX<>"
_NAMES = {colour: f"--series-{place}" for place, colour in enumerate(SERIES)} | {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PAPER: "--paper",
}
_KEY = 0.52
"""Where the labels begin, of the width of the axes: low curves leave the upper right free."""
_LABEL_GAP = 0.075
"""Between the middles of two labels, of the height of the axes."""
_WIDTH, _HEIGHT = 6.0, 4.3


def png(traces: Sequence[TraceStudy]) -> bytes:
    """A PNG with the curves of every trace, white behind them."""
    columns = min(2, len(traces))
    rows = -(-len(traces) // columns)
    with mpl.rc_context(_style()):
        figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained", facecolor="white")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, trace in zip(panels, traces, strict=False):
            _draw(axes, trace)
            axes.set_title(_plain(trace.name), loc="left", fontsize=12, color=INK)
        for axes in list(figure.axes)[len(traces) :]:
            axes.remove()
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=160)
    return out.getvalue()


def svg(trace: TraceStudy, key: str) -> str:
    """The curves of one trace as an `<svg>` without size; `key` keeps its ids apart from another's in the page."""
    with mpl.rc_context({**_style(), "svg.hashsalt": "moert", "svg.fonttype": "none"}):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        _draw(axes, trace)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', text, count=1)
    text = re.sub(r'(\bid="|\bhref="#|\burl\(#)', rf"\g<1>{key}-", text)
    for colour, name in _NAMES.items():
        text = text.replace(colour, f"var({name}, {colour})")
    return text


def _style() -> dict[Any, Any]:
    return {
        "font.size": 12,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "text.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,
    }


def _draw(axes: Axes, trace: TraceStudy) -> None:
    styles = _styles(trace.curves)
    last = max(capacity for curve in trace.curves for capacity in curve.capacities)
    top = max(1e-3, trace.compulsory or 0, *(ratio for curve in trace.curves for ratio in curve.miss_ratio))
    axes.set_xlim(0, last)
    axes.set_ylim(0, min(1.0, top * 1.04))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("experts that the cache holds")
    axes.set_ylabel("misses, of all accesses")
    for mark in trace.marks:
        if mark <= last:
            axes.axvline(mark, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    for curve in trace.curves:
        axes.plot(curve.capacities, curve.miss_ratio, clip_on=False, **styles[curve.policy])
    bounds = [curve for curve in trace.curves if curve.is_bound]
    if bounds:
        lowest = min(bounds, key=lambda curve: sum(curve.miss_ratio))
        axes.fill_between(lowest.capacities, lowest.miss_ratio, color=MUTED, alpha=0.16, linewidth=0)
    if trace.compulsory is not None:
        axes.axhline(trace.compulsory, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)))
        place = (1.02, trace.compulsory)
        axes.annotate("first uses", xy=place, xycoords=("axes fraction", "data"), va="center", color=MUTED)
    _write_labels(axes, trace.curves, styles)


def _styles(curves: Sequence[CurveLine]) -> dict[str, dict[str, Any]]:
    """How each policy's line is drawn: told apart by colour, by marker and by its label."""
    found: dict[str, dict[str, Any]] = {}
    for curve in curves:
        if curve.is_bound:
            dashes = (0, (5, 2)) if "bypass" in curve.policy else "solid"
            found[curve.policy] = {"color": INK, "linewidth": 2.4, "linestyle": dashes}
        else:
            live = sum("marker" in style for style in found.values())
            marker = _MARKERS[live % len(_MARKERS)]
            colour = SERIES[live % len(SERIES)]
            found[curve.policy] = {"color": colour, "linewidth": 1.7, "marker": marker, "markersize": 4.5}
    return found


def _write_labels(axes: Axes, curves: Sequence[CurveLine], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Name the lines in the free upper right, ordered as where they are furthest apart to the left, and point there."""
    capacities = curves[0].capacities
    apart = [max(values) - min(values) for values in zip(*(curve.miss_ratio for curve in curves), strict=True)]
    left = [place for place, capacity in enumerate(capacities) if capacity <= _KEY * 0.7 * capacities[-1]] or [0]
    where = max(left, key=lambda place: apart[place])
    ordered = sorted(curves, key=lambda curve: -curve.miss_ratio[where])
    gap = min(_LABEL_GAP, 0.94 / len(ordered))
    for place, curve in enumerate(ordered):
        style, height = styles[curve.policy], 0.96 - place * gap
        axes.annotate(
            "",
            xy=(capacities[where], curve.miss_ratio[where]),
            xytext=(_KEY, height),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": style["color"], "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3},
        )
        axes.plot([_KEY, _KEY + 0.07], [height, height], markevery=[1], transform=axes.transAxes, **style)
        label = axes.annotate(
            _label(curve),
            xy=(_KEY + 0.09, height),
            xycoords="axes fraction",
            va="center",
            color=style["color"],
            annotation_clip=False,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5},
        )
        label.set_in_layout(False)


def _label(curve: CurveLine) -> str:
    return {"belady": "MIN (bound)", "min_bypass": "MIN, bypass"}.get(curve.policy, _plain(curve.policy, 24))


def _plain(name: str, most: int = 40) -> str:
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}…{name[-half:]}"
