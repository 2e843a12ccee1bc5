"""Where a verb's words go: tables and results to standard output, everything on the way to standard error.

``roe --quiet`` shows results alone, ``roe --verbose`` the libraries' own messages and tracebacks as well. Colours and
moving bars are for terminals: rich leaves them out where output is piped, and for NO_COLOR.
"""

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from routing_experts.records import save_json

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]


@dataclass(frozen=True)
class Output:
    """A command's manner of speaking, from the options before the verb.

    Attributes:
        quiet, verbose: as asked.
        stdout: where results go; what libraries print goes to standard error instead, or it would spoil JSON.
    """

    quiet: bool = False
    verbose: bool = False
    stdout: TextIO | None = None

    @property
    def results(self) -> Console:
        """For what was asked for."""
        return Console(file=self.stdout, highlight=False)

    @property
    def progress(self) -> Console:
        """For what is said on the way: bars, stages, where files were put."""
        return Console(stderr=True, quiet=self.quiet, highlight=False)

    def hush(self) -> None:
        """Silences the libraries unless asked to be verbose: their bars and notices would bury what matters."""
        if self.verbose:
            return
        for module in ("transformers", "torch.distributed"):  # the latter's: DeepSpeed's calls, hundreds a run
            warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


_current: ContextVar[Output | None] = ContextVar("output", default=None)


@contextmanager
def speaking(output: Output) -> Iterator[None]:
    """The manner of one command, from the options before its verb to its end."""
    token, stdout = _current.set(output), sys.stdout
    if not output.verbose:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # both are imported in passing where installed
        logging.getLogger("DeepSpeed").addFilter(_is_error)  # sets its level itself when it is imported
    try:
        yield
    finally:
        sys.stdout = stdout
        _current.reset(token)


def start() -> Output:
    """What every verb begins with: quiet libraries, and standard output kept for results until the command ends."""
    output = _current.get()
    if output is None:  # a verb that is called as a function
        output = Output(stdout=sys.stdout)
    else:
        sys.stdout = sys.stderr
    output.hush()
    return output


def print_json(value: Any, output: Output, indent: int | None = 2) -> None:
    """A value for programs: JSON on standard output, nothing else; in one line with ``indent=None``."""
    typer.echo(json.dumps(value, indent=indent, allow_nan=False), file=output.stdout)


def write_json(value: Any, target: Path, output: Output, name: str) -> None:
    """A record into a file, or to standard output where the file is ``-``."""
    if str(target) == "-":
        print_json(value, output)
        return
    save_json(target, value)
    output.progress.print(f"{name}: {target}")
