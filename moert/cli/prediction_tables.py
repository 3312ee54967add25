"""What `moert predict` prints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from moert.predict import Result


def print_results(results: Sequence[Result], console: Console) -> None:
    """What one study has found: a table one layer ahead, and one of all horizons."""
    from moert.predict.run import horizon_name

    first = results[0]
    trained = f"trained on {first.trained_on}"
    trained += f", {first.train_tokens:,} tokens" if first.train_tokens else ""
    console.print()
    console.print(
        Text.assemble((first.trace, "bold"), f"  {trained}; tested on {first.test_tokens:,} tokens"), soft_wrap=True
    )
    found = {(row.ahead_layers, row.ahead_tokens) for result in results for row in result.rows}
    keys = sorted(found, key=lambda key: (key[1], key[0]))
    for key in [key for key in keys if key != (0, 0)][:1]:
        console.print()
        console.print(Text(f"{horizon_name(*key)} ahead, %", style="bold"))
        console.print(_first_table(results, key))
    if len(keys) > 1:
        console.print()
        console.print(Text("recall of k by how far ahead, %", style="bold"))
        console.print(_horizons_table(results, keys))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black", padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(
            name, justify="right" if place else "left", no_wrap=place > 0, overflow="fold", vertical="bottom"
        )
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _first_table(results: Sequence[Result], key: tuple[int, int]) -> Table:
    columns = (
        "recall\nof k",
        "of\n1.5k",
        "of\n2k",
        "preci-\nsion",
        "of\n2k",
        "exact\nset",
        "calib.\nerror",
        "µs a\nlayer",
    )
    table = _table("predictor", *columns)
    for result in results:
        for row in result.rows:
            if (row.ahead_layers, row.ahead_tokens) != key:
                continue
            table.add_row(
                result.predictor,
                *(_percent(row.recall[name]) for name in ("k", "1.5k", "2k")),
                *(_percent(row.precision[name]) for name in ("k", "2k")),
                _percent(row.exact),
                _percent(row.calibration_error),
                f"{result.observe_us + row.ask_us:.0f}",
            )
    return table


def _horizons_table(results: Sequence[Result], keys: Sequence[tuple[int, int]]) -> Table:
    from moert.predict.run import horizon_name

    names = []
    for is_token, same in groupby(keys, key=lambda key: bool(key[1])):
        for place, key in enumerate(same):
            names.append(horizon_name(*key).replace(" ", "\n") if not place or not is_token else f"{key[1]}\n")
    table = _table("predictor", *names)
    for result in results:
        rows = {(row.ahead_layers, row.ahead_tokens): row for row in result.rows}
        cells = [rows.get(key) for key in keys]
        table.add_row(
            result.predictor,
            *(_percent(None if row is None or not row.answered else row.recall["k"]) for row in cells),
        )
    return table
