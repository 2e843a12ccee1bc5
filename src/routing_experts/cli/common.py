"""What several verbs need: folders of runs, models on their device, progress over questions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from routing_experts.errors import CheckpointError
from routing_experts.records import RESULTS_NAME, Results
from routing_experts.training.folder import RunFolder

Device = Annotated[str, typer.Option(help="auto (the accelerator if there is one), cpu, cuda, cuda:1 or mps.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions asked at a time; fewer take less memory.")]


def model_folder(folder: str) -> str:
    """The model of a run's folder; anything else (a model's folder, a name) is taken as it is.

    Raises:
        CheckpointError: if it looks like a path of this machine but nothing is there.
    """
    path = Path(folder)
    if (run := RunFolder(path)).model.is_dir():
        return str(run.model)
    if not path.exists() and (folder.startswith((".", "/")) or folder.count("/") != 1) and folder != "pocket":
        raise CheckpointError(f"{folder}: there is no such folder. Give a run's or a model's folder, or a hub name.")
    return folder


def refuse_beside(what: str, given: Mapping[str, object]) -> None:
    """Raises ``BadParameter`` for options that were given and would be ignored."""
    ignored = [name for name, value in given.items() if value]
    if ignored:
        raise typer.BadParameter(f"{', '.join(ignored)} with {what}: it would be ignored. Leave one of the two out.")


def evaluated_results(folder: str) -> Results | None:
    """What an evaluation left in a run's folder, if one did."""
    path = Path(folder) / RESULTS_NAME
    return Results.load(path) if path.is_file() else None


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar; the function it gives moves it on."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
