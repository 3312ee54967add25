"""Put the block sizes that the sweep found on a GPU into the tables that the kernels take them from.

    python bench/gpu_tables.py bench/results/gpu-session-NAME.json                 # kernels/configs.py and its sibling
    python bench/gpu_tables.py bench/results/gpu-session-NAME.json --into FOLDER   # copies of them in FOLDER

The entry of that GPU's compute capability becomes what was fastest, or stays the table's own where nothing was faster
by more than timing the same twice differs; its origin is "measured" either way. Formats that share an entry decide
together, by the product of their times. Newer architectures take over what older ones have, so that `make kernels`
comes next.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from moert.kernels.configs import DecodeConfig
from moert.kernels.grouped_configs import GroupedConfig

Config = DecodeConfig | GroupedConfig

KERNELS = Path(__file__).parents[1] / "kernels"
CLASSES: dict[str, type[Config]] = {"configs": DecodeConfig, "grouped_configs": GroupedConfig}
"""Module with the table -> class of its entries."""

WORTH_IT = 1.03
"""Times the table's own: more than timing the same twice differs."""

WIDTH = 120
"""Of a line of the sources."""


@dataclass(frozen=True)
class Entry:
    """What an entry of a table is to be."""

    module: str
    keys: tuple[Any, ...]
    """From the outermost table on; the last is the compute capability."""
    config: Config
    gain: float | None
    """Times the speed of what was there; None if that could not run."""


def entries(rows: Sequence[dict[str, Any]]) -> list[Entry]:
    """Of the rows of a sweep, each entry once."""
    sharing: dict[tuple[str, tuple[Any, ...]], list[dict[str, Any]]] = {}
    for row in rows:
        if "candidates" in row:
            name, *sizes = row["entry"]["keys"]
            sharing.setdefault((row["entry"]["module"], (tuple(name), *sizes)), []).append(row)
    found = []
    for (module, keys), those in sharing.items():

        def config(values: dict[str, Any], module: str = module) -> Config:
            return CLASSES[module](**values, origin="measured")

        times = [{config(one["config"]): one["us"] for one in row["candidates"]} for row in those]
        both = {one: prod(each[one] for each in times) for one in times[0] if all(one in each for each in times)}
        if not both:
            continue
        best, own = min(both, key=lambda one: both[one]), config(those[0]["own"])
        gain = (both[own] / both[best]) ** (1 / len(those)) if own in both else None
        if gain is not None and gain <= WORTH_IT:
            best, gain = own, 1.0
        found.append(Entry(module, keys, best, gain))
    return found


def with_entry(source: str, entry: Entry) -> str:
    """A module's source with the entry in its table; all else, comments too, stays as it is.

    Raises:
        LookupError: the table has no such kernel, kind of weight or block of picks.
    """
    (table,) = (
        statement.value
        for statement in ast.parse(source).body
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "_TABLES"
    )
    *outer, capability = entry.keys
    for key in outer:
        assert isinstance(table, ast.Dict)
        inner = {ast.literal_eval(name): value for name, value in zip(table.keys, table.values, strict=True) if name}
        if key not in inner:
            raise LookupError(f"the table of {entry.module} has no {key!r}; it has {', '.join(map(repr, inner))}")
        table = inner[key]
    assert isinstance(table, ast.Dict) and table.end_lineno is not None and table.end_col_offset is not None
    texts = {
        ast.literal_eval(name): ast.get_source_segment(source, value)
        for name, value in zip(table.keys, table.values, strict=True)
        if name
    }
    texts[capability] = text(entry.config)
    items = [f"{name}: {value}" for name, value in sorted(texts.items())]
    lines = source.splitlines(keepends=True)
    head, tail = lines[table.lineno - 1][: table.col_offset], lines[table.end_lineno - 1][table.end_col_offset :]
    indent = " " * (len(head) - len(head.lstrip()))
    whole = f"{head}{{{', '.join(items)}}}{tail}"
    if len(whole.rstrip()) > WIDTH:
        whole = "\n".join([f"{head}{{", *(f"{indent}    {item}," for item in items), f"{indent}}}{tail}"])
    return "".join([*lines[: table.lineno - 1], whole, *lines[table.end_lineno :]])


def text(config: Config) -> str:
    """As the tables write it: sizes by place, the rest by name where it is not the default."""
    parts = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.default is MISSING:
            parts.append(repr(value))
        elif value != field.default:
            parts.append(f"{field.name}={json.dumps(value) if isinstance(value, str) else value}")
    return f"{type(config).__name__}({', '.join(parts)})"


def write(rows: Sequence[dict[str, Any]], folder: Path) -> list[Entry]:
    """The modules with what the rows of a sweep say, into `folder`; what was put in is returned.

    Raises:
        LookupError: see `with_entry`; nothing is written then.
    """
    found = entries(rows)
    sources = {}
    for module in CLASSES:
        source = (KERNELS / f"{module}.py").read_text()
        for entry in found:
            if entry.module == module:
                source = with_entry(source, entry)
        sources[module] = source
    folder.mkdir(parents=True, exist_ok=True)
    for module, source in sources.items():
        (folder / f"{module}.py").write_text(source)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path, help="JSON that bench/gpu_session.py wrote")
    parser.add_argument("--into", type=Path, default=KERNELS, help="folder (kernels/)")
    options = parser.parse_args()
    session = json.loads(options.session.read_text())
    if session["dry_run"] and options.into.resolve() == KERNELS.resolve():
        parser.error("the times of a dry run mean nothing; with --into FOLDER it is written elsewhere")
    rows = session["steps"].get("sweep", {}).get("rows", [])
    found = write(rows, options.into)
    for entry in found:
        gain = "the one before cannot run" if entry.gain is None else f"{entry.gain:.2f}x the one before"
        print(f"{' '.join(map(str, entry.keys))}: {text(entry.config)}, {gain}")
    print(f"{len(found)} entries in {options.into}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
