"""The command line as a whole: help, versions, usage errors, options from the configuration."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
from cli_support import Cli

import moert
from moert.cli import main, make_app
from moert.cli.options import LoadOptions, flag_of, offered_fields, with_load_options
from moert.cli.output import one_line, short_names
from moert.config import OffloadConfig


def commands() -> list[str]:
    """Of the application, as they are typed."""
    app = make_app()
    own = [info.name or info.callback.__name__ for info in app.registered_commands if info.callback is not None]
    return own + [str(group.name) for group in app.registered_groups]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capfd)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_help_brings_in_neither_torch_nor_transformers() -> None:
    asked = [["--help"], ["--version"], [], *([command, "-h"] for command in commands())]
    code = (
        f"import sys; from moert.cli import main; print([main(words) for words in {asked!r}], file=sys.stderr); "
        "print(sorted({'torch', 'transformers', 'numpy', 'numba'} & set(sys.modules)), file=sys.stderr)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.stderr == f"{[0] * len(asked)}\n[]\n"
    assert child.stdout


def test_the_module_runs_as_the_command_does() -> None:
    child = subprocess.run([sys.executable, "-m", "moert", "--version"], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout) == (0, f"moert {moert.__version__}\n")


def test_a_number_of_threads_that_cannot_be_is_one_line() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "moert", "run", "demo", "def", "--max-new-tokens", "1"],
        env={**os.environ, "MOERT_THREADS": "many"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 2
    assert child.stderr == "moert: error: MOERT_THREADS is 'many', must be a number in 1..1024\n"


def test_a_terminal_that_knows_ascii_alone_gets_it() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "moert", "policies"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
    )
    assert (child.returncode, child.stderr) == (0, b"")
    assert b"fifo" in child.stdout


def test_help_names_every_command(cli: Cli) -> None:
    ran = cli("--help")
    assert ran.code == 0
    assert {"run", "simulate", "trace"} < set(commands())
    assert all(f" {command} " in ran.out for command in commands())
    assert cli().out == ran.out, "without arguments there is help too"


@pytest.mark.parametrize("command", ["run", "verify"])
def test_help_lists_every_option_with_its_description(command: str, cli: Cli) -> None:
    text = cli(command, "--help").out
    for name in offered_fields():
        assert flag_of(name) in text
    assert "--no-direct-io" in text
    assert "--no-preload" in text
    assert "25%" in text, "the descriptions are those of OffloadConfig"
    assert "None:" not in text
    assert "Default:" in text
    assert "moert policies" in text


def test_every_option_of_the_configuration_is_offered_but_debug() -> None:
    assert set(OffloadConfig.option_names()) - set(offered_fields()) == {"debug"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], OffloadConfig()),
        (["--host-memory", "25%", "--io-depth", "7"], OffloadConfig(host_memory="25%", io_depth=7)),
        (["--no-direct-io", "--preload"], OffloadConfig(direct_io=False, preload=True)),
        (["--no-preload", "--policy", "a.b:C"], OffloadConfig(preload=False, policy="a.b:C")),
    ],
)
def test_options_become_the_configuration(arguments: list[str], expected: OffloadConfig) -> None:
    import typer

    seen: list[LoadOptions] = []

    @with_load_options()
    def command(*, options: LoadOptions) -> int:
        seen.append(options)
        return 0

    app = typer.Typer()
    app.command()(command)
    app(arguments, standalone_mode=False)
    assert seen == [LoadOptions(expected)]
    fields = {name: getattr(expected, name) for name in OffloadConfig.option_names()}
    assert seen[0].kwargs == {**fields, "dtype": "auto", "revision": None}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["nothing", "moert --help"]),
        (["run"], ["MODEL", "moert run --help"]),
        (["run", "x"], ["PROMPT"]),
        (["run", "x", "y", "--polcy", "lru"], ["--polcy", "--policy"]),
        (["run", "x", "y", "--io-depth", "many"], ["--io-depth", "integer"]),
        (["run", "x", "y", "--max-new-tokens", "0"], ["--max-new-tokens", "1"]),
        (["verify"], ["MODEL"]),
        (["--nothing"], ["--nothing"]),
        (["doctor", "a", "b"], ["b"]),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], words: list[str], cli: Cli) -> None:
    error = cli(*arguments).error
    for word in words:
        assert word in error


def test_an_error_of_ours_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moert.cli.doctor.examine", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_traceback_of_bad_input_on_request() -> None:
    with pytest.raises(moert.ConfigError):
        main(["--traceback", "run", "/nothing/here", "x"])


def test_warnings_are_one_line_each(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(*_: object) -> Any:
        warnings.warn("the first line\n  and the second", RuntimeWarning, stacklevel=2)
        raise moert.ConfigError("enough")

    monkeypatch.setattr("moert.cli.doctor.examine", examine)
    ran = cli("doctor")
    assert ran.err.splitlines() == ["moert: warning: the first line and the second", "moert: error: enough"]


def test_interrupt_that_an_import_turns_into_an_error_is_still_an_interrupt(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def examine(*_: object) -> Any:
        try:
            os.kill(os.getpid(), 2)
            os.getpid()
        except KeyboardInterrupt as error:
            raise ImportError("initialisation failed") from error

    monkeypatch.setattr("moert.cli.doctor.examine", examine)
    ran = cli("doctor")
    assert (ran.code, ran.out, ran.err) == (130, "", "")


def test_reader_that_went_away_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        child = subprocess.run(
            [sys.executable, "-m", "moert", "--version"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(write)
    assert child.returncode == 1
    assert "Traceback" not in child.stderr


def test_commands_are_a_typer_application() -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(make_app(), ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"moert {moert.__version__}\n")


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.0.mlp.experts", "model.layers.11.mlp.experts"], ["0", "11"]),
        (["a.0.x", "a.0.y"], ["x", "y"]),
        (["a.0.x", "b.0.x"], ["a", "b"]),
        (["only.one"], ["only.one"]),
        (["a", "a.b"], ["a", "a.b"]),
        ([], []),
    ],
)
def test_names_lose_what_they_share(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_messages_fit_on_a_line() -> None:
    assert one_line("a\n\n  b\tc ") == "a b c"
