"""A study for other programs and for papers: CSV of every run, and its tables in LaTeX."""

import csv
import io
from collections.abc import Sequence

from routing_experts.records import StudyRecord
from routing_experts.reports.summary import Grid

COLUMNS = (
    *("arm", "seed", "wanted", "accuracy", "skip_rate", "raw_skip_rate", "keep_bias", "varied_layers"),
    *("route_information", "training_seconds", "steps"),
)
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{NO-BREAK SPACE}": "~",
    "\N{EM DASH}": "---",
    "\N{EN DASH}": "--",
}


def study_csv(study: StudyRecord) -> str:
    """A line a run, and its accuracy and skip rate by task."""
    tasks = sorted({task for run in study.runs for task in run.task_accuracy})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"accuracy {task}" for task in tasks), *(f"skip_rate {task}" for task in tasks)])
    for run in study.runs:
        cells = [getattr(run, name) for name in COLUMNS]
        by_task = [values.get(task) for values in (run.task_accuracy, run.task_skip_rate) for task in tasks]
        writer.writerow(["" if cell is None else cell for cell in (*cells, *by_task)])
    return table.getvalue()


def latex_tables(grids: Sequence[Grid]) -> str:
    """Tables for a paper, with booktabs; each with its title and note as the caption."""
    return "\n".join(_latex_table(grid) for grid in grids)


def _latex_table(grid: Grid) -> str:
    columns = "".join("l" if place < grid.num_texts else "r" for place in range(len(grid.columns)))
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(grid.columns)]
    lines.append(r"\midrule")
    for place, row in enumerate(grid.rows):
        cells = [rf"\textbf{{{_escape(cell)}}}" for cell in row] if place == grid.highlighted else None
        lines.append(" & ".join(cells) + r" \\" if cells else _row(row))
    caption = _escape(f"{grid.title}. {grid.note}".strip())
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", r"\end{table}", ""])


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escape, cells)) + r" \\"


def _escape(text: str) -> str:
    return "".join(_ESCAPES.get(mark, mark) for mark in text)
