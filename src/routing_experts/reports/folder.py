"""The page of a folder, by what it holds."""

from pathlib import Path

from routing_experts.errors import ReportError
from routing_experts.records import BENCH_NAME, LOG_NAME, RESULTS_NAME, STUDY_NAME, TASKS_NAME
from routing_experts.reports.bench import write_bench_report
from routing_experts.reports.html import write_report
from routing_experts.reports.study import write_study_report
from routing_experts.reports.tasks_page import write_tasks_report


def write_folder_report(folder: Path) -> Path:
    """Writes ``report.html`` for a run's, a study's or a benchmark's folder.

    Raises:
        ReportError: if its record is missing or does not fit.
    """
    if (folder / STUDY_NAME).is_file():
        return write_study_report(folder)
    if (folder / BENCH_NAME).is_file():
        return write_bench_report(folder)
    if (folder / RESULTS_NAME).is_file():
        return write_report(folder)
    if (folder / TASKS_NAME).is_file():
        return write_tasks_report(folder)
    if (folder / LOG_NAME).is_file():
        raise ReportError(
            f"{folder} was trained, but has no {RESULTS_NAME}: a report says what an evaluation measured. Evaluate it "
            f"(roe evaluate {folder}), or look at its training alone (roe report --follow {folder})."
        )
    return write_report(folder)
