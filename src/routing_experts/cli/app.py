"""The typer application, and what every verb shares: quiet libraries, errors as one message, exit codes.

Exit codes: 0 done, 1 something the user can mend, 2 wrong usage, 130 interrupted.
"""

import errno
import sys
import traceback
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from routing_experts import __version__
from routing_experts.cli import (
    bench,
    calibrate,
    chat,
    convert,
    data,
    evaluate,
    export,
    generate,
    importing,
    quickstart,
    report,
    study,
    train,
)
from routing_experts.cli.output import Output, speaking
from routing_experts.errors import InterruptedRunError, RoutingExpertsError

MENDABLE, INTERRUPTED = 1, 130

app = typer.Typer(
    name="roe",
    help="Teach an existing multimodal LLM to skip its own decoder layers, example by example.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("quickstart")(quickstart.quickstart)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("calibrate")(calibrate.calibrate)
app.command("bench")(bench.bench)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("study")(study.study)
app.command("report")(report.report)
app.command("convert")(convert.convert)
app.command("import")(importing.import_checkpoint)
app.command("export")(export.export)
app.add_typer(data.app, name="data")
app.command("families")(convert.families)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results alone, no progress.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="The libraries' messages, too, and tracebacks of errors.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and leave.")
    ] = False,
) -> None:
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose contradict each other: give one.")
    context.with_resource(speaking(Output(quiet=quiet, verbose=verbose, stdout=sys.stdout)))


def run() -> None:
    """Runs the command line; a user's mistake is one message, never a traceback (but for ``--verbose``)."""
    verbose = bool({"-v", "--verbose"} & set(sys.argv[1:]))
    try:
        app()
    except InterruptedRunError as error:
        Console(stderr=True).print(str(error), soft_wrap=True, markup=False)
        sys.exit(INTERRUPTED)
    except RoutingExpertsError as error:
        _fail(str(error), verbose)
    except OSError as error:
        _fail(_about_system(error), verbose)


def _fail(message: str, verbose: bool) -> NoReturn:
    if verbose:
        traceback.print_exc()
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(MENDABLE)


def _about_system(error: OSError) -> str:
    """What the system refused, and what to do about it."""
    remedies = {
        errno.ENOSPC: "The disk is full: make room, then give the same command again; whatever was complete stays.",
        errno.EROFS: "The folder cannot be written to: choose another one.",
        errno.EACCES: "You may not use it: choose another path, or change its permissions.",
        errno.EPERM: "You may not do that there: choose another path, or change its permissions.",
        errno.ENOENT: "Check the path.",
        errno.ENOTDIR: "Part of the path is a file: choose another path.",
    }
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}. {remedies.get(error.errno or 0, '')}".strip()
