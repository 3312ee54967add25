"""The HTML report stands by itself, says what the rows say, and lets no name break out of its place."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from cli_support import Cli
from report_support import EXPERTS, LAYERS, TOP_K, routing, trace, write

from moert.config import format_bytes
from moert.report.collect import collect, curve_shares, layer_use
from moert.report.figures import png, svg
from moert.report.page import html
from moert.report.study import CurveLine, LayerUse, Study, TraceStudy
from moert.trace import LayerInfo, Phase, Sequence, Trace, TraceHeader

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

EVIL = '<script>alert("1")</script>&amp;$title ${x}'


class Reader(HTMLParser):
    """Collects tags, attributes and text; a tag that is not closed in order is an error."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def study_of(name: str = "tiny", **changes: object) -> TraceStudy:
    row = {
        "trace": name,
        "policy": name,
        "scope": "layer",
        "capacity": "25%",
        "capacity_experts": 12,
        "capacity_bytes": 12 << 20,
        "hit_rate": 0.5,
        "hit_rate_low": 0.45,
        "hit_rate_high": 0.55,
        "misses_per_token": 3.0,
        "bytes_moved": 300 << 20,
        "tokens": 100,
        "gap_closed": 0.25,
        "min_misses": 30,
        "accesses": 200,
        "forced_misses": 0,
        "bound": False,
        "aside": False,
    }
    values: dict[str, object] = {
        "name": name,
        "facts": [("model", name)],
        "rows": [{**row, "policy": "belady", "bound": True, "hit_rate": 0.7, "gap_closed": 1.0}, row],
        "curves": [CurveLine(name, [0.25, 0.5], [0.5, 0.2], False), CurveLine("belady", [0.25, 0.5], [0.3, 0.1], True)],
        "compulsory": 0.02,
        "marks": [0.25],
        "heat_policy": name,
        "heat_capacities": ["25 %", "50 %"],
        "layers": [LayerUse(name, 4, [0.5, 0.3, 0.2, 0.0], [0.25, None])],
    }
    return TraceStudy(**{**values, **changes})  # type: ignore[arg-type]


def page_of(*traces: TraceStudy) -> str:
    return html(Study(EVIL, "1.2.3", "today", [("scope", EVIL)], [EVIL], list(traces)))


def test_names_are_escaped_wherever_they_stand() -> None:
    page = page_of(study_of(EVIL), study_of("b"))
    reader = Reader(page)
    assert "script" not in reader.tags
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    text = "".join(reader.texts)
    # Heading, title, facts, table, curves, heat map, layer, notes, command, settings, table of contents.
    assert text.count('alert("1")') >= 11
    assert text.count("$title ${x}") >= 10


def test_the_page_asks_nothing_of_the_network() -> None:
    page = page_of(study_of(), study_of("b"))
    reader = Reader(page)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert (value or "").startswith(("#", "data:")), f"{name}={value}"
    assert not {"link", "script", "iframe", "img", "object", "embed"} & set(reader.tags)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert len(reader.ids) == len(set(reader.ids)), "ids are unique over all figures"
    for name, value in reader.attributes:
        if name in ("aria-describedby", "aria-labelledby"):
            assert value in reader.ids


def test_the_highest_possible_hit_rate_stands_at_each_capacity() -> None:
    assert "25% <small>12 slots, 12.0 MiB, at most 85.0 %</small>" in page_of(study_of())


def test_a_heat_map_cell_without_counts_is_a_dash() -> None:
    assert 'style="--a: 0.60">25</td><td>–</td>' in page_of(study_of())


def test_columns_that_say_nothing_are_left_out() -> None:
    rows = [{**row, "bytes_moved": None, "hit_rate_low": None, "capacity_bytes": None} for row in study_of().rows]
    page = page_of(study_of(rows=rows))
    assert "interval</th>" not in page and "fetched" not in page
    assert "interval</th>" in page_of(study_of()) and "fetched" in page_of(study_of())


def test_svg_is_sound_and_takes_its_colours_from_the_page() -> None:
    text = svg(study_of(EVIL), "a")
    root = ET.fromstring(text)
    assert root.attrib.keys().isdisjoint({"width", "height"}) and "viewBox" in root.attrib
    assert "var(--ink, " in text and "var(--series-0, " in text
    assert text == svg(study_of(EVIL), "a"), "the same each time"
    own, other = (set(re.findall(r'id="([^"]+)"', svg(study_of(), key))) for key in "ab")
    assert {name for name in own & other if re.search(r"p[0-9a-f]{8}", name)} == set()


def test_curves_of_many_policies_and_names_have_their_place() -> None:
    lines = [CurveLine(f"policy-{i}" * 4, [0.1, 0.9], [0.9 - i / 40, 0.1], False) for i in range(12)]
    assert png([study_of(curves=lines)] * 3).startswith(b"\x89PNG")
    assert png([study_of("$x^2$ \\frac{", curves=[CurveLine("a_b$^", [1.0], [0.0], False)])]).startswith(b"\x89PNG")


def header(top_k: int, *num_experts: int) -> TraceHeader:
    return TraceHeader(tuple(LayerInfo(str(i), n, top_k) for i, n in enumerate(num_experts)))


def test_curves_begin_where_one_token_fits() -> None:
    assert curve_shares(header(2, 16), [0.2]) == [0.125, 0.1875, 0.2, 0.25, 0.375, 0.5, 0.625, 0.75]
    assert curve_shares(header(6, 64), [0.01])[0] == 0.125
    assert curve_shares(header(8, 8), []) == [1.0]


def test_use_is_counted_over_all_tokens_but_padding() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[3, 0]]], np.int32)
    phases = np.array([Phase.PREFILL, Phase.DECODE, Phase.PADDING], np.uint8)
    made = Trace(header(2, 4), [Sequence(experts, np.arange(3), phases)])
    assert layer_use(made)[0].tolist() == [0.5, 0.25, 0.25, 0]


def test_the_report_of_a_run_says_what_its_rows_say(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = Cli(capfd)
    path, out = write(tmp_path / "<i>tiny.safetensors"), tmp_path / "out.html"
    ran = cli("simulate", path, "--policy", "lru,ema", "--capacity", "25%,8", "--html", out, "--json")
    assert ran.code == 0, ran.err
    page = out.read_text()
    text = re.sub(r"\s+", " ", " ".join(Reader(page).texts))
    for row in ran.document["results"]:
        assert f"{100 * row['hit_rate']:.1f} %" in text
        assert f"{row['misses_per_token']:.2f}" in text
        assert format_bytes(row["bytes_moved"] / row["tokens"]) in text
    assert ran.document["command"] in text.replace("&#x27;", "'")
    assert "<i>tiny" not in page.replace("&lt;i&gt;tiny", "")
    assert f"{LAYERS} layers of {EXPERTS}, {TOP_K} for each token" in text
    # A row for each layer, by its number: the rest of its name is in all of them.
    heat = page[page.index('class="heat"') :]
    assert re.findall(r'<tr><th scope="row">(\d+)</th>', heat) == ["0", "1", "2"]
    assert len(page) < 200_000


def test_collect_takes_the_rates_of_layers_from_the_replays() -> None:
    from moert.simulate import simulate

    made = trace()
    curves = [simulate(made, policy, capacity) for policy in ("lru", "belady") for capacity in (4, 8)]
    study = collect(
        made, name="t", layer_names=["a", "b", "c"], rows=[], results=curves[:1], curves=curves, bounds=["belady"]
    )
    assert study.heat_policy == "lru"
    assert [line.is_bound for line in study.curves] == [False, True]
    assert study.curves[0].capacities == [0.25, 0.5]
    for place, layer in enumerate(study.layers):
        for rate, result in zip(layer.hit_rate, curves[:2], strict=True):
            assert rate == result.layer_hits[place] / result.layer_accesses[place]
        assert layer.use == sorted(layer.use, reverse=True)
        assert sum(layer.use) == pytest.approx(1)
    counts = np.bincount(np.concatenate([routing(i, 60)[:, 1] for i in range(4)]).ravel(), minlength=EXPERTS)
    assert study.layers[1].use[0] == pytest.approx(counts.max() / counts.sum())
