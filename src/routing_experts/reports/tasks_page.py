"""lmms-eval's tasks on a page: their tables, and which layers each benchmark skips; with files for papers."""

import csv
import io
from functools import partial
from pathlib import Path
from statistics import mean

from routing_experts.records import TASKS_NAME, SideScore, TaskScores, write_text
from routing_experts.reports.figures import draw_heat_map
from routing_experts.reports.latex import latex_tables
from routing_experts.reports.page import FIGURES_FOLDER, REPORT_NAME, Drawing, drawing_of, render
from routing_experts.reports.summary import Grid, percent, plural
from routing_experts.reports.table import grids_markdown
from routing_experts.reports.tasks import task_grids

COLUMNS = ("difference", "low", "high", "skip_rate", "empty")
TIMES = ("seconds_to_first", "seconds_a_token")


def write_tasks_report(folder: Path) -> Path:
    """Writes ``report.html`` for a folder whose benchmarks are all that was measured of it, and their files.

    Raises:
        ReportError: if ``tasks.json`` is missing or does not fit.
    """
    record = TaskScores.load(folder / TASKS_NAME)
    grids, drawings = tasks_parts(folder, record)
    samples = sum(score.samples for score in record.by_task.values())
    page = render(
        "many.html.jinja",
        title=record.model,
        headline=f"{plural(len(record.by_task), 'benchmark')}, {samples:,} samples: "
        + "; ".join(side.side for side in record.scores[0].sides),
        date=str(record.environment.get("date", ""))[:10],
        grids=grids,
        drawings=drawings,
    )
    write_text(folder / REPORT_NAME, page)
    return folder / REPORT_NAME


def tasks_parts(folder: Path, record: TaskScores) -> tuple[list[Grid], list[Drawing]]:
    """What a page shows of benchmarks; writes ``tasks.md``, ``tasks.csv`` and ``tasks.tex`` beside it."""
    grids = task_grids(record)
    write_text(folder / "tasks.md", grids_markdown(grids))
    write_text(folder / "tasks.csv", tasks_csv(record))
    write_text(folder / "tasks.tex", latex_tables(grids))
    return grids, task_drawings(record, folder / FIGURES_FOLDER)


def task_drawings(record: TaskScores, figures: Path) -> list[Drawing]:
    """A heat map a side that skips anything: benchmarks by layers."""
    by_side: dict[str, dict[str, SideScore]] = {}
    for task, score in record.by_task.items():
        for side in score.sides:
            if side.skip_rate:
                by_side.setdefault(side.side, {})[task] = side
    return [_heat_map(name, tasks, figures) for name, tasks in by_side.items()]


def _heat_map(name: str, tasks: dict[str, SideScore], figures: Path) -> Drawing:
    rows = [(task, list(side.layer_skip_rates), side.skip_rate) for task, side in tasks.items()]
    means = [mean(rates) for rates in zip(*(rates for _, rates, _ in rows), strict=True)]
    everything = ("all benchmarks", means, mean(rate for _, _, rate in rows))
    return drawing_of(
        figures,
        f"Which layers each benchmark skips: {name}",
        partial(draw_heat_map, [everything, *rows] if len(rows) > 1 else rows),
        f"Asked {name}: how often each decoder layer is skipped, in per cent of the samples; each benchmark counts as "
        "much as any other. Layers count from 0.",
        "",
        "; ".join(f"{task} {percent(side.skip_rate)}" for task, side in tasks.items()),
    )


def tasks_csv(record: TaskScores) -> str:
    """A line a metric and side; times are medians, in seconds."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["task", "metric", "samples", "side", "value", *COLUMNS, *TIMES])
    for score in record.scores:
        for side in score.sides:
            cells = [getattr(side, name) for name in COLUMNS]
            times = [spread and spread.median for spread in (getattr(side, name) for name in TIMES)]
            values = (score.task, score.metric, score.samples, side.side, side.value, *cells, *times)
            writer.writerow(["" if value is None else value for value in values])
    return table.getvalue()
