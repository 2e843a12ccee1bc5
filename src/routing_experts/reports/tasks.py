"""What lmms-eval's tasks gave, as tables: each metric dense and routed with what was skipped, and how long it took."""

from rich.console import Console

from routing_experts.records import SideScore, Spread, TaskScore, TaskScores
from routing_experts.reports.summary import MINUS, NONE, Grid, percent, times
from routing_experts.reports.table import grids_markdown, print_grids


def task_grids(record: TaskScores) -> list[Grid]:
    """Scores, and times."""
    return [_scores(record), _times(record)]


def _scores(record: TaskScores) -> Grid:
    """A row a metric and side."""
    rows = tuple(_row(score, side) for score in record.scores for side in score.sides)
    first = record.scores[0].sides[0].side
    limit = "" if record.limit is None else f", the first {record.limit:,} samples of each"
    empty = sum(side.empty for score in record.by_task.values() for side in score.sides)
    note = (
        f"lmms-eval {record.lmms_eval}, batches of {record.batch_size}{limit}. To {first}: the difference on the same "
        "samples, with its 95 % interval."
    )
    if empty:
        note += f" {empty:,} answers were empty."
    others = {size for score in record.scores for side in score.sides for size in side.batch_sizes}
    if earlier := sorted(others - {record.batch_size}):
        note += (
            f" Some answers are kept from runs at batches of {', '.join(map(str, earlier))}, where the same weights "
            "round otherwise; give another --log to ask all of them anew."
        )
    columns = ("task", "metric", "side", "score", f"to {first}", "95 % interval", "skipped")
    return Grid("Tasks", columns, rows, num_texts=3, note=note)


def _times(record: TaskScores) -> Grid:
    """A row a task and side, each beside the task's first."""
    rows = tuple(
        (
            task,
            side.side,
            _milliseconds(side.seconds_to_first),
            _speed_up(score.sides[0].seconds_to_first, side.seconds_to_first),
            _milliseconds(side.seconds_a_token),
            _speed_up(score.sides[0].seconds_a_token, side.seconds_a_token),
        )
        for task, score in record.by_task.items()
        for side in score.sides
    )
    note = (
        "Medians over samples, with the middle half in brackets, of the batches that they were in; one side after the "
        "other, so that a drift of the machine's speed falls on one of them; kept answers of other batch sizes or "
        "devices do not count. `roe bench` takes turns."
    )
    columns = ("task", "side", "to the first token", "speed-up", "a token behind it", "speed-up")
    return Grid("Times", columns, rows, num_texts=2, note=note)


def print_tasks(record: TaskScores, console: Console) -> None:
    """Prints the table."""
    print_grids(task_grids(record), console)


def tasks_markdown(record: TaskScores) -> str:
    """The table as Markdown."""
    return grids_markdown(task_grids(record))


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
    )


def _signed(value: float) -> str:
    """In the metric's own unit, which need not be a share."""
    text = f"{abs(value):.3g}"
    return "0" if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def _speed_up(first: Spread | None, own: Spread | None) -> str:
    return NONE if first is None or own is None or first is own else times(first.median / own.median)


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return NONE
    median, low, high = (f"{1000 * value:.3g}" for value in (spread.median, spread.low, spread.high))
    return f"{median}\N{NO-BREAK SPACE}ms ({low}\N{EN DASH}{high})"
