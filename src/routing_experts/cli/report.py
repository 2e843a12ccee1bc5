"""``roe report``: a run's records as a page."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.output import AsJson


def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder with results.json and log.jsonl.")],
    json: AsJson = False,
) -> None:
    """Draw a run's figures and write report.html.

    Example: roe report runs/quickstart
    """
    from routing_experts.cli.output import print_json, start
    from routing_experts.reports import write_report

    say, page = start(), write_report(folder)
    if json:
        print_json({"report": str(page)})
        return
    say.results.print(f"report: {page}")
