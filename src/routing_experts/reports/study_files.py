"""A study for other programs: CSV of every run."""

import csv
import io

from routing_experts.records import StudyRecord

COLUMNS = (
    *("arm", "seed", "wanted", "accuracy", "skip_rate", "raw_skip_rate", "keep_bias", "varied_layers"),
    *("route_information", "training_seconds", "steps"),
)


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
