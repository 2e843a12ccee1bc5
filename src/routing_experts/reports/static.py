"""A static export as a table: all layers, routed, static."""

from rich.console import Console

from routing_experts.records import StaticExport, StaticRow
from routing_experts.reports.summary import Grid, percent, points, span, spread, times
from routing_experts.reports.table import print_grids


def static_grid(record: StaticExport) -> Grid:
    """A row a model; speed-ups are of whole answers, to all layers."""
    dense = record.rows[0]
    sizes = tuple(dense.seconds)
    rows = tuple(_row(row, dense, sizes) for row in record.rows)
    dropped = ", ".join(map(str, record.dropped))
    note = (
        f"Dropped for everyone: layers {dropped}, the most skipped on {record.chosen_on:,} other questions. Static to "
        f"routed: {points(record.difference)} points ({span(record.low, record.high)}), on {record.questions:,} "
        "questions. Speed-up: of whole answers, taken in turn: median and quartiles."
    )
    columns = ("model", "accuracy", "layers skipped", "parameters", *(f"speed-up, batch {size}" for size in sizes))
    return Grid("Static export", columns, rows, highlighted=len(rows) - 1, note=note)


def print_static(record: StaticExport, console: Console) -> None:
    """Prints the table."""
    print_grids([static_grid(record)], console)


def _row(row: StaticRow, dense: StaticRow, sizes: tuple[str, ...]) -> tuple[str, ...]:
    pairs = ([whole / own for whole, own in zip(dense.seconds[size], row.seconds[size], strict=True)] for size in sizes)
    speeds = (times(1.0) if row is dense else spread(ratios) for ratios in pairs)
    name = {"dense": "all layers"}.get(row.name, row.name)
    return (name, percent(row.accuracy), percent(row.skip_rate), f"{row.parameters:,}", *speeds)
