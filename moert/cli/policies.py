"""`moert policies`: which cache policies there are, and what they can be told."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moert.cli.options import Json
from moert.cli.output import print_json, stdout

OWN = "package.module:Class"
EXAMPLE = "PYTHONPATH=. moert simulate TRACE --policy my_policies:MyPolicy,PARAMETER=VALUE"


def policies(json: Json = False) -> int:
    """List the cache policies: what each does, its parameters, and whether it can run live or is a bound."""
    found = [_describe(name) for name in _names()]
    if json:
        print_json({"policies": found, "own": OWN})
    else:
        _print(found, stdout())
    return 0


def _names() -> list[str]:
    from moert.policies import policy_names

    return policy_names()


def _describe(name: str) -> dict[str, Any]:
    from moert.plugins import load_plugin, read_choice
    from moert.policies import Policy

    package = Policy.__module__.rpartition(".")[0]
    cls = load_plugin(package, name, Policy)  # type: ignore[type-abstract]  # only looked up
    return {
        "name": name,
        "about": _first_line(inspect.getmodule(cls)),
        "rule": _first_line(cls),
        "parameters": read_choice(package, name, Policy)[1],  # type: ignore[type-abstract]  # only looked up
        "live": not cls.needs_future,
    }


def _first_line(described: Any) -> str:
    return (inspect.getdoc(described) or "").partition("\n\n")[0].replace("\n", " ")


def _print(found: list[dict[str, Any]], console: Console) -> None:
    from moert.plugins import write_value

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("policy", no_wrap=True, style="cyan")
    table.add_column("parameters", overflow="fold")
    table.add_column("runs", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for policy in found:
        parameters = "\n".join(f"{name}={write_value(value)}" for name, value in policy["parameters"].items())
        table.add_row(
            policy["name"],
            parameters or Text("–", style="bright_black"),
            "live" if policy["live"] else Text("bound", style="yellow"),
            policy["about"],
        )
    console.print()
    console.print(table)
    console.print()
    console.print(
        "A bound knows every event beforehand: for `moert simulate` only. The others run live too, with "
        "`moert run --policy NAME`.\nParameters follow the name: --policy ema,alpha=0.05.",
        soft_wrap=True,
    )
    console.print(f'A policy of your own is one file, named "{OWN}":', soft_wrap=True)
    console.print(Text(f"  {EXAMPLE}", style="bright_black"), soft_wrap=True)
