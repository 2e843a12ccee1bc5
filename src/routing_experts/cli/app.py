"""The typer application, and what every verb shares: quiet libraries, errors as one message, exit codes.

Exit codes: 0 done, 1 something the user can mend, 2 wrong usage, 130 interrupted.
"""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from routing_experts import __version__
from routing_experts.cli import convert, evaluate, generate, quickstart, report, train
from routing_experts.errors import RoutingExpertsError

app = typer.Typer(
    name="roe",
    help="Teach an existing multimodal LLM to skip its own decoder layers, example by example.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("quickstart")(quickstart.quickstart)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("report")(report.report)
app.command("convert")(convert.convert)
app.command("families")(convert.families)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def run() -> None:
    """Runs the command line; a user's mistake is one message, never a traceback."""
    try:
        app()
    except RoutingExpertsError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)
    except OSError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: nothing already written was lost.")
        sys.exit(130)
