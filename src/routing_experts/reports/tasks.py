"""What lmms-eval's tasks gave, as a table: each metric dense and routed, what was skipped, and how long it took."""

from rich.console import Console

from routing_experts.records import SideScore, Spread, TaskScore, TaskScores
from routing_experts.reports.summary import MINUS, NONE, Grid, percent
from routing_experts.reports.table import grids_markdown, print_grids


def task_grid(record: TaskScores) -> Grid:
    """A row a metric and side."""
    rows = tuple(_row(score, side) for score in record.scores for side in score.sides)
    first = record.scores[0].sides[0].side
    limit = "" if record.limit is None else f", the first {record.limit:,} samples of each"
    empty = sum(side.empty for score in record.scores for side in score.sides)
    note = (
        f"lmms-eval {record.lmms_eval}, batches of {record.batch_size}{limit}. To {first}: the difference on the same "
        "samples, with its 95 % interval. First token and token: medians of the batches' times that samples were in, "
        "one side after the other."
    )
    if empty:
        note += f" {empty:,} answers were empty."
    columns = ("task", "metric", "side", "score", f"to {first}", "95 % interval", "skipped", "first token", "a token")
    return Grid("Tasks", columns, rows, num_texts=3, note=note)


def print_tasks(record: TaskScores, console: Console) -> None:
    """Prints the table."""
    print_grids([task_grid(record)], console)


def tasks_markdown(record: TaskScores) -> str:
    """The table as Markdown."""
    return grids_markdown([task_grid(record)])


def _row(score: TaskScore, side: SideScore) -> tuple[str, ...]:
    interval = NONE
    if side.low is not None and side.high is not None:
        interval = f"{_signed(side.low)} to {_signed(side.high)}"
    return (
        score.task,
        score.metric + ("" if score.higher_is_better else " (lower is better)"),
        side.side,
        f"{side.value:.4g}",
        NONE if side.difference is None else _signed(side.difference),
        interval,
        percent(side.skip_rate),
        _milliseconds(side.seconds_to_first),
        _milliseconds(side.seconds_a_token),
    )


def _signed(value: float) -> str:
    """In the metric's own unit, which need not be a share."""
    text = f"{abs(value):.3g}"
    return "0" if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def _milliseconds(spread: Spread | None) -> str:
    return NONE if spread is None else f"{1000 * spread.median:.3g}\N{NO-BREAK SPACE}ms"
