"""``roe report``: the records of a run, a study or a benchmark as a page, or of several runs side by side."""

import time
from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.output import AsJson, Output
from routing_experts.errors import ReportError

EVERY = 10.0


def report(
    folders: Annotated[list[Path], typer.Argument(help="A run's, study's or bench's folder; several with --compare.")],
    compare: Annotated[bool, typer.Option("--compare", help="Put the runs side by side on one page.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Renew the page of one run while it trains, until it is finished.")
    ] = False,
    every: Annotated[
        float | None, typer.Option(min=1, help=f"Seconds between looks at the log with --follow; {EVERY:g} by default.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where compare.html goes; here by default.")] = None,
    json: AsJson = False,
) -> None:
    """Draw figures and write a page: report.html in each folder, or compare.html.

    Example: roe report --compare runs/quickstart runs/digits

    With --follow, open report.html in a browser: the tab renews itself. Ctrl-C leaves the last page.
    """
    from routing_experts.cli.output import print_json, start
    from routing_experts.reports import write_comparison, write_folder_report

    say = start()
    if output is not None and not compare:
        raise typer.BadParameter("--output is for --compare: a run's report stays in the run's folder.")
    if every is not None and not follow:
        raise typer.BadParameter("--every is for --follow: without it the page is written once.")
    if follow and compare:
        raise typer.BadParameter("--follow shows one run while it trains, --compare several afterwards: leave one out.")
    if follow and json:
        raise typer.BadParameter(
            "--follow has no result for programs: read the run's log.jsonl, which grows as it trains, or leave --json "
            "out."
        )
    if follow and len(folders) > 1:
        raise typer.BadParameter(
            f"--follow watches one run, and these are {len(folders)} folders: give each a `roe report --follow` of its "
            "own."
        )
    if follow:
        pages = [follow_run(folders[0], every or EVERY, say)]
    elif compare:
        pages = [write_comparison(folders, output or Path("."))]
    else:
        pages = [write_folder_report(folder) for folder in folders]
    if json:
        print_json({"reports": [str(page) for page in pages]}, say)
        return
    for page in pages:
        say.results.print(f"report: {page}")


def follow_run(folder: Path, every: float, say: Output) -> Path:
    """Renews a run's page until the run is finished, or until Ctrl-C.

    Args:
        folder: of a run that trains, is about to, or did.
        every: seconds between looks.
        say: where it is told that there is nothing to show yet, and then that there is.

    Returns:
        The page, which no longer renews itself.

    Raises:
        ReportError: if the folder holds no training run, or the run left no line in its log.
    """
    from routing_experts.records import LOG_NAME, RESULTS_NAME
    from routing_experts.reports import ProgressPage, write_folder_report
    from routing_experts.training.folder import RUN_NAME, RunFolder

    run = RunFolder(folder)
    if run.recipe is None:
        raise ReportError(
            f"{folder} holds no training run: {RUN_NAME} is not there, which a training writes when it begins. Give "
            "the folder that `roe train` names with --output; of a study, that of one run, such as routed-30/seed-0."
        )
    page, told = ProgressPage(folder, every), ""
    try:
        while not run.is_finished:
            page.renew()
            now = f"following: {page.path}" if page.is_written else f"{run.log} has no line yet: waiting for the first."
            if now != told:
                say.progress.print(now, soft_wrap=True, markup=False)
            told = now
            time.sleep(every)
    except KeyboardInterrupt:
        pass  # how following ends while the run goes on
    is_finished = run.is_finished
    if is_finished and (folder / RESULTS_NAME).is_file():
        return write_folder_report(folder)
    if not page.close(is_finished):
        raise ReportError(
            f"{folder / LOG_NAME} has no line, so there is no page: a run logs every training.logging_steps "
            "steps. Lower it, or follow the run until its first line."
        )
    return page.path
