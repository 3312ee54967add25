"""Tables of block sizes, rewritten by what a sweep found."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton_support

from moert.kernels import configs, grouped_configs
from moert.kernels._samples import sample_banks

pytestmark = pytest.mark.usefixtures("bench_on_path")

DECODE = {"block_n": 8, "block_k": 256, "block_picks": 1, "num_warps": 4}
GROUPED = {"block_n": 64, "block_k": 64, "swapped": False, "num_warps": 8, "num_stages": 3}
"""Of codes, in blocks of 128 picks, on 80."""


def row(keys: list[Any], own: dict[str, Any], times: list[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    module = "grouped_configs" if "block_picks" not in own else "configs"
    candidates = [{"config": {**own, **other}, "us": us} for other, us in times]
    return json.loads(json.dumps({"entry": {"module": module, "keys": keys}, "own": own, "candidates": candidates}))


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"written_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def flat(table: Any, *keys: Any) -> dict[tuple[Any, ...], str]:
    if not isinstance(table, dict):
        return {keys: repr(table)}
    return {path: text for key, inner in table.items() for path, text in flat(inner, *keys, key).items()}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="triton's interpreter is off: there is a GPU")
def test_the_kernels_take_what_a_sweep_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_sweep
    import gpu_tables
    from gpu_layers import TINY, Setting
    from gpu_results import Rows

    assert triton_support.INTERPRETED
    rows = Rows(tmp_path / "rows.json")
    gpu_sweep.run(Setting(torch.device("cpu"), TINY), rows, math.inf)
    found = json.loads((tmp_path / "rows.json").read_text())
    best = {}
    for one in found:
        own, other = one["candidates"]
        assert own["config"] == one["own"] != other["config"]
        own["us"], other["us"] = 2.0, 1.0  # under the interpreter times mean nothing
        best[one["what"].partition(",")[0]] = other["config"]
    assert best.keys() == {"decode_gate_up", "decode_down", "grouped_gate_up", "grouped_down"}
    assert {entry.gain for entry in gpu_tables.write(found, tmp_path)} == {2.0}

    decode, grouped = (loaded(tmp_path / f"{name}.py", monkeypatch) for name in gpu_tables.CLASSES)
    bank = sample_banks()["bf16"]
    for matrix, name in ((bank.up, "gate_up"), (bank.down, "down")):
        kernel = f"decode_{name}"
        assert decode.decode_config(kernel, matrix, 90) == decode.DecodeConfig(**best[kernel], origin="measured")
        assert decode.decode_config(kernel, matrix, 89).origin == "compiled"
        taken = grouped.grouped_config(name, matrix, 16, torch.bfloat16, 90)
        assert taken == grouped.GroupedConfig(**best[f"grouped_{name}"], origin="measured")
    for before, after in ((configs, decode), (grouped_configs, grouped)):
        written = set(flat(after._TABLES).items()) - set(flat(before._TABLES).items())
        assert len(written) == 2 and all("measured" in text for _, text in written)
        assert flat(after._TABLES).keys() >= flat(before._TABLES).keys()


def test_every_search_has_its_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_sweep
    import gpu_tables
    from gpu_layers import QWEN3_30B, Setting

    rows = []
    for search in gpu_sweep.searches(Setting(torch.device("meta"), QWEN3_30B)):
        own, *others = map(gpu_sweep._values, search.candidates)
        rows.append({"entry": {"module": search.module, "keys": search.keys}, "own": own})
        rows[-1]["candidates"] = [{"config": own, "us": 2.0}, *({"config": other, "us": 1.0} for other in others)]
    found = gpu_tables.write(json.loads(json.dumps(rows)), tmp_path)
    # int4 and mxfp4 share theirs.
    assert len(found) == len(rows) - 2
    for entry in found:
        table = loaded(tmp_path / f"{entry.module}.py", monkeypatch)._TABLES
        assert flat(table)[entry.keys] == repr(entry.config)


def test_what_becomes_the_entry() -> None:
    import gpu_tables

    def best(*rows: dict[str, Any]) -> tuple[int, float | None]:
        (entry,) = gpu_tables.entries([{"what": "no time left for it"}, *rows])
        assert entry.config.origin == "measured"
        return entry.config.block_k, entry.gain

    def codes(*times: tuple[int, float]) -> dict[str, Any]:
        return row([["down", "codes"], 128, 90], GROUPED, [({"block_k": size}, us) for size, us in times])

    assert best(codes((64, 3.0), (128, 2.0))) == (128, 1.5)
    assert best(codes((64, 1.02), (128, 1.0))) == (64, 1.0)
    assert best(codes((128, 2.0))) == (128, None)
    # int4 gains twice as much as mxfp4 loses; what did not run in both is no choice.
    int4, mxfp4 = codes((64, 4.0), (128, 1.0), (32, 0.1)), codes((64, 1.0), (128, 2.0))
    assert best(int4, mxfp4) == (128, pytest.approx(math.sqrt(2)))
    assert gpu_tables.entries([codes((32, 1.0)), mxfp4]) == []


def test_the_source_stays_as_it_was_around_an_entry() -> None:
    import gpu_tables

    source = '''"""é"""

_TABLES: dict[str, object] = {
    ("gate_up", "codes"): {
        # Of 16.
        16: {80: GroupedConfig(64, 64), 100: GroupedConfig(1, 2)},  # stays
        64: {80: GroupedConfig(64, 64)},
    },
}
"""After."""
'''

    def entry(block_m: int, capability: int, kind: str = "codes", **values: Any) -> Any:
        keys = [["gate_up", kind], block_m, capability]
        (made,) = gpu_tables.entries([row(keys, GROUPED, [(values, 1.0)])])
        return made

    once = gpu_tables.with_entry(source, entry(16, 90, num_warps=4))
    assert once == source.replace(
        "        16: {80: GroupedConfig(64, 64), 100: GroupedConfig(1, 2)},  # stays\n",
        "        16: {\n"
        "            80: GroupedConfig(64, 64),\n"
        '            90: GroupedConfig(64, 64, origin="measured"),\n'
        "            100: GroupedConfig(1, 2),\n"
        "        },  # stays\n",
    )
    assert gpu_tables.with_entry(once, entry(16, 90, num_warps=4)) == once
    again = gpu_tables.with_entry(once, entry(16, 90, block_n=32, swapped=True))
    assert again == once.replace(
        'GroupedConfig(64, 64, origin="measured")',
        'GroupedConfig(32, 64, swapped=True, num_warps=8, origin="measured")',
    )
    short = gpu_tables.with_entry(source, entry(64, 90, num_warps=4))
    assert '        64: {80: GroupedConfig(64, 64), 90: GroupedConfig(64, 64, origin="measured")},\n' in short
    for wrong in (entry(32, 90), entry(16, 90, "fp32")):
        with pytest.raises(LookupError, match=r"has no (32; it has 16, 64|\('gate_up', 'fp32'\); it has )"):
            gpu_tables.with_entry(source, wrong)


def test_a_dry_run_does_not_become_the_kernels_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_tables

    own = tmp_path / "kernels"
    own.mkdir()
    for name in gpu_tables.CLASSES:
        (own / f"{name}.py").write_text((gpu_tables.KERNELS / f"{name}.py").read_text())
    monkeypatch.setattr(gpu_tables, "KERNELS", own)
    keys = [["decode_gate_up", "plain"], 120]
    rows = [row(keys, DECODE, [({}, 3.0), ({"block_n": 32}, 2.0)])]

    def ran(dry: bool, *into: str, rows: list[dict[str, Any]] = rows) -> int:
        session = tmp_path / "session.json"
        session.write_text(json.dumps({"dry_run": dry, "steps": {"sweep": {"rows": rows}}}))
        monkeypatch.setattr(sys, "argv", ["gpu_tables.py", str(session), *into])
        return gpu_tables.main()

    before = (own / "configs.py").read_text()
    with pytest.raises(SystemExit):
        ran(True)
    assert "times of a dry run mean nothing" in capsys.readouterr().err
    assert ran(True, "--into", str(tmp_path / "elsewhere")) == 0
    assert (own / "configs.py").read_text() == before
    assert ran(False, rows=[]) == 1
    assert (own / "configs.py").read_text() == before
    assert ran(False) == 0
    assert '120: DecodeConfig(32, 256, origin="measured")}' in (own / "configs.py").read_text()
    said = capsys.readouterr().out
    assert '120: DecodeConfig(32, 256, origin="measured"), 1.50x the one before' in said and "1 entries" in said
