"""A run's results as a table: on the console through rich, and as Markdown."""

import html
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from routing_experts.records import BudgetRecord, Results
from routing_experts.reports.summary import Grid, budget, by_task, comparison, headline, speed

WIDE_CONSOLE = 110  # characters; narrower ones get medians without their ranges


def print_results(results: Results, console: Console | None = None) -> None:
    """Prints headline and tables."""
    console = console or Console()
    console.print(Text(headline(results), style="bold"))
    for grid in _grids(results, ranges=console.width >= WIDE_CONSOLE):
        console.print()
        console.print(rich_table(grid))
        if grid.note:
            console.print(Text(grid.note, style="dim"))
    if results.speed.note:
        console.print(Text(results.speed.note))


def print_budget(record: BudgetRecord, console: Console | None = None) -> None:
    """Prints what each skip ratio gives."""
    print_grids([budget(record)], console or Console())


def print_grids(grids: Sequence[Grid], console: Console) -> None:
    """Prints tables, each with its note."""
    for grid in grids:
        console.print(rich_table(grid))
        console.print(Text(grid.note, style="dim"))


def grids_markdown(grids: Sequence[Grid]) -> str:
    """Tables as Markdown."""
    return "\n\n".join(map(markdown_table, grids)) + "\n"


def results_markdown(results: Results) -> str:
    """Headline and tables as Markdown; texts from the records are escaped."""
    parts = [f"**{_escape(headline(results))}**", *map(markdown_table, _grids(results)), _escape(results.speed.note)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _grids(results: Results, ranges: bool = True) -> list[Grid]:
    return [grid for grid in (comparison(results), by_task(results), speed(results, ranges)) if grid.rows]


def rich_table(grid: Grid) -> Table:
    """A grid for the console."""
    table = Table(title=Text(grid.title), title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(grid.columns):
        table.add_column(Text(column), justify="left" if i < grid.num_texts else "right")
    for i, row in enumerate(grid.rows):
        # Text, not str: square brackets in a task's name are no markup.
        table.add_row(*(Text(cell) for cell in row), style="bold" if i == grid.highlighted else None)
    return table


def markdown_table(grid: Grid) -> str:
    """A grid in Markdown; texts are escaped."""
    rules = ["---" if i < grid.num_texts else "--:" for i in range(len(grid.columns))]
    lines = [f"### {grid.title}", "", _markdown_row(grid.columns), "|" + "|".join(rules) + "|"]
    for i, row in enumerate(grid.rows):
        cells = [_escape(cell) for cell in row]
        lines.append(_markdown_row([f"**{cell}**" for cell in cells] if i == grid.highlighted else cells))
    return "\n".join(lines + (["", _escape(grid.note)] if grid.note else []))


def _markdown_row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    one_line = html.escape(" ".join(text.split()), quote=False)
    for mark in "\\`*_[]|":
        one_line = one_line.replace(mark, "\\" + mark)
    return one_line
