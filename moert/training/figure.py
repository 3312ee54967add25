"""A learning curve, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from moert.report.figures import GRID, INK, MUTED, SERIES
from moert.training.loop import Point


def learning_curve(title: str, points: Sequence[Point], tested: float, references: Mapping[str, float]) -> bytes:
    """A PNG of the recall at k on the validation sequences, by tokens trained on, and of the losses if there are any.

    Args:
        title: of the whole.
        points: the curve.
        tested: the recall on the test sequences, of the best point.
        references: what else was measured there, by name.
    """
    losses = [point for point in points if point.train_loss is not None]
    style: dict[Any, Any] = {
        "font.size": 12,
        "axes.edgecolor": MUTED,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(7, 6.2 if losses else 4.2), layout="constrained", facecolor="white")
        heights = [3, 2] if losses else [1]
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        axes = panels[0, 0]
        axes.set_title(title, loc="left", fontsize=12)
        tokens = [point.n_tokens for point in points]
        axes.plot(
            tokens, [point.validation_recall for point in points], color=SERIES[0], marker="o", label="validation"
        )
        best = max(points, key=lambda point: point.validation_recall)
        axes.plot([best.n_tokens], [tested], color=SERIES[1], marker="D", linestyle="none", label="test, of the best")
        for place, (name, value) in enumerate(references.items()):
            axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=((0, (5, 2)), (0, (1, 2)))[place % 2], label=name)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("recall at k")
        axes.legend(loc="lower right", facecolor="white", edgecolor="none", framealpha=0.9)
        if losses:
            below = panels[1, 0]
            below.plot([p.n_tokens for p in losses], [p.train_loss for p in losses], color=SERIES[2], label="training")
            below.plot(tokens, [p.validation_loss for p in points], color=SERIES[0], marker="o", label="validation")
            below.set_ylabel("loss")
            below.legend(frameon=False)
        for each in panels[:, 0]:
            each.grid(color=GRID, linewidth=0.8)
            each.set_axisbelow(True)
        panels[-1, 0].set_xlabel("tokens trained on")
        panels[-1, 0].xaxis.set_major_formatter(EngFormatter(sep=""))
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=160)
    return out.getvalue()
