"""What several verbs need: silence from the libraries, folders of runs, progress over questions."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from routing_experts.errors import CheckpointError

MODEL_FOLDER = "model"


def quiet_libraries() -> None:
    """Our verbs say what matters; transformers' own bars and notices would bury it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_folder(folder: str) -> str:
    """The model of a run's folder; anything else (a model's folder, a name) is taken as it is.

    Raises:
        CheckpointError: if it looks like a path of this machine but nothing is there.
    """
    path = Path(folder)
    if (path / MODEL_FOLDER).is_dir():
        return str(path / MODEL_FOLDER)
    if not path.exists() and (folder.startswith((".", "/")) or folder.count("/") != 1) and folder != "pocket":
        raise CheckpointError(f"{folder}: there is no such folder. Give a run's or a model's folder, or a hub name.")
    return folder


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar; the function it gives moves it on."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
