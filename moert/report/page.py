"""The HTML report: one file that asks nothing of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from string import Template
from typing import NamedTuple

from moert.config import format_bytes
from moert.report.figures import svg
from moert.report.study import LayerUse, Row, Study, TraceStudy

_DASH = "–"
_USE_POINTS = 64
"""Of the drawing of a layer's use, which has no room for more."""


def html(study: Study) -> str:
    """The report as one HTML document. Every name in it is escaped."""
    template = Template(files("moert.report").joinpath("report.html").read_text(encoding="utf-8"))
    names = ", ".join(trace.name for trace in study.traces[:3]) + (" and others" if len(study.traces) > 3 else "")
    policies = len({row["policy"] for trace in study.traces for row in trace.rows})
    return template.substitute(
        title=escape(f"Expert caches on {names}"),
        lead=escape(
            f"{_count(policies, 'cache policy', 'cache policies')} replayed over "
            f"{_count(len(study.traces), 'recorded trace', 'recorded traces')} of expert routing, with the bound that "
            "no policy can pass."
        ),
        contents=_contents(study.traces) if len(study.traces) > 1 else "",
        settings=_facts(study.settings),
        traces="\n".join(_trace(trace, place) for place, trace in enumerate(study.traces)),
        notes=f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in study.notes)}</ul>',
        command=escape(study.command),
        version=escape(study.version),
        made=escape(study.made),
    )


def _contents(traces: Sequence[TraceStudy]) -> str:
    links = "".join(f'<li><a href="#trace-{place}">{escape(trace.name)}</a></li>' for place, trace in enumerate(traces))
    return f'<nav aria-label="Traces"><ul>{links}</ul></nav>'


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts) + "</dl>"


def _trace(trace: TraceStudy, place: int) -> str:
    return "\n".join(
        (
            f'<section aria-labelledby="trace-{place}">',
            f'<h2 id="trace-{place}">{escape(trace.name)}</h2>',
            _facts(trace.facts),
            "<h3>Hit rates</h3>",
            _results(trace, place),
            _forced_note(trace.rows),
            "<h3>Miss-ratio curves</h3>",
            _curves(trace, place),
            "<h3>Layer by layer</h3>",
            _heat_map(trace, place),
            "</section>",
        )
    )


def _scroll(table: str, name: str) -> str:
    """A table that scrolls by itself where the screen is narrow, by keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{table}</div>'


def _results(trace: TraceStudy, place: int) -> str:
    columns = [column for column in _COLUMNS if any(column.text(row) != _DASH for row in trace.rows)]
    head = '<th scope="col">policy</th>' + "".join(f'<th scope="col">{column.title}</th>' for column in columns)
    groups = [list(rows) for _, rows in groupby(trace.rows, key=lambda row: row["capacity"])]
    table = (
        f'<table aria-describedby="results-{place}"><thead><tr>{head}</tr></thead>'
        f"{''.join(_capacity_rows(rows, columns) for rows in groups)}</table>"
    )
    return (
        f'<p class="note" id="results-{place}">By capacity of the cache, with the highest hit rate that is possible '
        "there. Bold is the best policy that can run; in italics are those that know the future.</p>"
        + _scroll(table, f"Hit rates of {trace.name}")
    )


def _capacity_rows(rows: Sequence[Row], columns: Sequence[_Column]) -> str:
    rates = {row["hit_rate"] for row in rows if not row["bound"]}
    best = max(rates) if len(rates) > 1 else None
    lines = [f'<tr><th scope="rowgroup" colspan="{1 + len(columns)}">{_capacity(rows[0])}</th></tr>']
    for row in rows:
        kind = "bound" if row["bound"] else "best" if row["hit_rate"] == best else "other"
        cells = "".join(f'<td class="{column.kind}">{column.text(row)}</td>' for column in columns)
        lines.append(f'<tr class="{kind}"><th scope="row" class="name">{escape(policy_label(row))}</th>{cells}</tr>')
    return f"<tbody>{''.join(lines)}</tbody>"


def policy_label(row: Row) -> str:
    """The policy with what it is, where the name alone would mislead."""
    name = str(row["policy"])
    if name == "belady":
        name = "MIN (belady)" if row["bound"] else "belady"
    return f"{name}, one cache for all" if row["scope"] == "global" and row["aside"] else name


def percent(share: float | None) -> str:
    """`93.4 %`; a dash where there is none."""
    return _DASH if share is None else f"{100 * share:.1f} %"


def _capacity(row: Row) -> str:
    return f"{escape(str(row['capacity']))} <small>{escape(capacity_note(row))}</small>"


def capacity_note(row: Row) -> str:
    """What a capacity is, and the highest hit rate that is possible with it, if a row of its scope knows."""
    parts = [f"{row['capacity_experts']:,} slots"]
    if row["capacity_bytes"] is not None:
        parts.append(format_bytes(row["capacity_bytes"]))
    if row["min_misses"] is not None:
        parts.append(f"at most {percent(1 - row['min_misses'] / row['accesses'])}")
    return ", ".join(parts)


class _Column(NamedTuple):
    """A column of the results, left out where it would say nothing."""

    title: str
    kind: str
    text: Callable[[Row], str]


def _interval(row: Row) -> str:
    low, high = row["hit_rate_low"], row["hit_rate_high"]
    return _DASH if low is None else f"{100 * low:.1f} – {100 * high:.1f}"


def _fetched(row: Row) -> str:
    return _DASH if row["bytes_moved"] is None else format_bytes(row["bytes_moved"] / max(1, row["tokens"]))


def _gap(row: Row) -> str:
    return _DASH if row["gap_closed"] is None or row["bound"] else percent(row["gap_closed"])


_COLUMNS = (
    _Column("hit rate", "rate", lambda row: percent(row["hit_rate"])),
    _Column("95 % interval", "interval", _interval),
    _Column("misses<br>a token", "misses", lambda row: f"{row['misses_per_token']:.2f}"),
    _Column("fetched<br>a token", "fetched", _fetched),
    _Column("saved from<br>LRU to bound", "gap", _gap),
)


def _forced_note(rows: Sequence[Row]) -> str:
    small = sorted({str(row["capacity"]) for row in rows if row["forced_misses"]})
    if not small:
        return ""
    return (
        f'<p class="note">At {escape(", ".join(small))} some steps need more experts at once than the cache has slots. '
        "What had to leave within such a step is counted as a miss, and MIN is then a good guess, not a bound.</p>"
    )


def _curves(trace: TraceStudy, place: int) -> str:
    head = "".join(f'<th scope="col">{100 * capacity:.3g} %</th>' for capacity in trace.curves[0].capacities)
    body = "".join(
        f'<tr><th scope="row">{escape(curve.policy)}</th>'
        + "".join(f"<td>{percent(ratio)}</td>" for ratio in curve.miss_ratio)
        + "</tr>"
        for curve in trace.curves
    )
    table = (
        f'<table aria-describedby="curves-{place}"><thead><tr><th scope="col">policy</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    return (
        f'<figure role="group" aria-labelledby="curves-{place}">{svg(trace, f"trace-{place}")}'
        f'<figcaption id="curves-{place}">Misses, of all accesses, by the share of experts that the cache holds; lower '
        "is better. The shaded part lies below MIN, which knows the future. Dashed upright lines are the capacities of "
        "the table, the dotted line is what any cache must miss, an expert’s first use.</figcaption></figure>"
        f"<details><summary>The same as a table</summary>{_scroll(table, f'Miss ratios of {trace.name}')}</details>"
    )


def _heat_map(trace: TraceStudy, place: int) -> str:
    head = "".join(f'<th scope="col">{escape(capacity)}</th>' for capacity in trace.heat_capacities)
    rates = [rate for layer in trace.layers for rate in layer.hit_rate if rate is not None]
    low, high = (min(rates), max(rates)) if rates else (0.0, 1.0)
    body = "".join(_heat_row(layer, low, high) for layer in trace.layers)
    table = (
        f'<table class="heat" aria-describedby="layers-{place}"><thead><tr><th scope="col">layer</th>{head}'
        '<th scope="col">half of its<br>picks go to</th><th scope="col" class="name">use</th></tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    return (
        f'<p class="note" id="layers-{place}">Hit rate of {escape(trace.heat_policy)} in each layer, in per cent, by '
        "the share of experts held. To the right, how the layer’s picks fall on its experts, the most used first.</p>"
        + _scroll(table, f"Layers of {trace.name}")
    )


def _heat_row(layer: LayerUse, low: float, high: float) -> str:
    cells = "".join(_heat_cell(rate, low, high) for rate in layer.hit_rate)
    half = _experts_for(layer.use, 0.5)
    return (
        f'<tr><th scope="row">{escape(layer.name)}</th>{cells}'
        f"<td>{half} of {layer.num_experts}</td><td>{_use_drawing(layer.use)}</td></tr>"
    )


def _heat_cell(rate: float | None, low: float, high: float) -> str:
    if rate is None:
        return f"<td>{_DASH}</td>"
    depth = 0.04 + 0.56 * ((rate - low) / (high - low) if high > low else 1)
    return f'<td class="cell" style="--a: {depth:.2f}">{100 * rate:.0f}</td>'


def _experts_for(use: Sequence[float], share: float) -> int:
    """How many of the most used experts take `share` of the picks."""
    total = 0.0
    for count, part in enumerate(use, start=1):
        total += part
        if total >= share - 1e-9:
            return count
    return len(use)


def _use_drawing(use: Sequence[float]) -> str:
    step = max(1, -(-len(use) // _USE_POINTS))
    heights = [max(use[place : place + step]) for place in range(0, len(use), step)]
    top = max(heights, default=0) or 1
    bars = "".join(
        f"M{place} 20h.8v{-round(20 * height / top, 1)}h-.8z" for place, height in enumerate(heights) if height
    )
    return (
        f'<svg viewBox="0 0 {len(heights)} 20" preserveAspectRatio="none" aria-hidden="true"><path d="{bars}"/></svg>'
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
