"""``roe report``: a run's records as a page."""

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="A run's folder with results.json and log.jsonl.")]) -> None:
    """Draw a run's figures and write report.html.

    Example: roe report runs/quickstart
    """
    from rich.console import Console

    from routing_experts.reports import write_report

    Console().print(f"report: {write_report(folder)}")
