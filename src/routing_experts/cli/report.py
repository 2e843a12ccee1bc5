"""``roe report``: the records of a run, a study or a benchmark as a page, or of several runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.output import AsJson


def report(
    folders: Annotated[list[Path], typer.Argument(help="A run's, study's or bench's folder; several with --compare.")],
    compare: Annotated[bool, typer.Option("--compare", help="Put the runs side by side on one page.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where compare.html goes; here by default.")] = None,
    json: AsJson = False,
) -> None:
    """Draw figures and write a page: report.html in each folder, or compare.html.

    Example: roe report --compare runs/quickstart runs/digits
    """
    from routing_experts.cli.output import print_json, start
    from routing_experts.reports import write_comparison, write_folder_report

    say = start()
    if output is not None and not compare:
        raise typer.BadParameter("--output is for --compare: a run's report stays in the run's folder.")
    if compare:
        pages = [write_comparison(folders, output or Path("."))]
    else:
        pages = [write_folder_report(folder) for folder in folders]
    if json:
        print_json({"reports": [str(page) for page in pages]}, say)
        return
    for page in pages:
        say.results.print(f"report: {page}")
