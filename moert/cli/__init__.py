"""The command line: `moert run`, `plan`, `pack`, `verify`, `doctor` and `demo`, and those that replay traces.

Nothing here imports torch before a command needs it, so that `moert --help` answers at once. A command is a function
in a file of its own and returns the exit code. Bad input ends in exit code 2 and one line on standard error, an
interrupt in 130 with the model closed.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moert.torch_threads import limit_spinning

if TYPE_CHECKING:
    import typer

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `arguments` default to the process's own.

    As the process's own it also limits the spinning of torch's threads, unless the environment says how long they spin.
    While it runs, an interrupt (SIGINT) raises KeyboardInterrupt and warnings are printed as one line each.
    """
    if arguments is None:
        # The interpreter's last collections walk over all that torch and transformers made: a second, for nothing.
        atexit.register(gc.freeze)
        limit_spinning()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # an encoding without a ✓ prints what stands for it
                stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _interruptible() as was_interrupted:
        try:
            code = _run(given)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        except BrokenPipeError:
            _forget_stdout()
            code = 1
        except Exception as error:
            # An interrupt inside the import of a C extension comes out as an error of that extension.
            if was_interrupted():
                code = EXIT_INTERRUPTED
            elif "--traceback" in given or not _is_bad_input(error):
                raise
            else:
                from moert.cli.output import print_error

                print_error(_message(error))
                code = EXIT_BAD_INPUT
    if code == EXIT_INTERRUPTED and sys.stdout.isatty():
        print()  # the text may have stopped in the middle of a line
    return code


def make_app() -> typer.Typer:
    """The commands as a typer application."""
    import typer

    from moert.cli.demo import demo
    from moert.cli.doctor import doctor
    from moert.cli.pack import pack
    from moert.cli.plan import plan
    from moert.cli.policies import policies
    from moert.cli.predict import predict
    from moert.cli.run import run
    from moert.cli.simulate import simulate
    from moert.cli.suit import suit
    from moert.cli.trace import app as trace
    from moert.cli.train_predictor import train_predictor
    from moert.cli.verify import verify

    app = typer.Typer(
        help="Run mixture-of-experts models that do not fit: experts in GPU slots, host memory and NVMe.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
        traceback: bool = typer.Option(False, "--traceback", help="On an error, show where it came from."),
    ) -> None:
        pass

    for command in (run, plan, pack, verify, simulate, suit, predict, train_predictor, policies, doctor, demo):
        app.command(command.__name__.replace("_", "-"))(command)
    app.add_typer(trace, name="trace")
    return app


def _run(arguments: list[str]) -> int:
    from moert.cli.output import print_warning

    app = make_app()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: print_warning(message)
        code = app(args=arguments or ["--help"], prog_name="moert", standalone_mode=False)
    sys.stdout.flush()  # a reader that has gone is met here, not in the interpreter's exit
    return int(code or 0)


def _print_version(asked: bool) -> None:
    if asked:
        import typer

        from moert import __version__

        print(f"moert {__version__}")
        raise typer.Exit


def _is_bad_input(error: Exception) -> bool:
    from typer import BadParameter

    from moert.cli.opening import InputError
    from moert.errors import MoertError, PolicyError

    # typer carries a click of its own or uses the one beside it; both have this family of errors.
    usage_error = BadParameter.__mro__[1]
    return isinstance(error, (MoertError, PolicyError, OSError, InputError, usage_error))


def _message(error: Any) -> str:
    if not hasattr(error, "format_message"):
        return str(error)
    context = getattr(error, "ctx", None)
    return f"{error.format_message()} (see {context.command_path if context else 'moert'} --help)"


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Note interrupts, where this is the main thread; yields a function that says whether there was one."""
    interrupted = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGINT, interrupt)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def _forget_stdout() -> None:
    """The reader of our output has gone: let nothing more be written, the flush at the end of the process included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
