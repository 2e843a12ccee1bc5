"""Tables, figures and the page that a run's records become. Reads records, never torch."""

from routing_experts.reports.bench import bench_markdown, print_bench, write_bench_report
from routing_experts.reports.compare import write_comparison
from routing_experts.reports.folder import write_folder_report
from routing_experts.reports.html import write_report
from routing_experts.reports.mixture import print_check, print_manifest
from routing_experts.reports.progress import ProgressPage
from routing_experts.reports.static import print_static
from routing_experts.reports.study import front_markdown, print_study, study_markdown, write_study_report
from routing_experts.reports.study_data import reference_run
from routing_experts.reports.summary import calibration_line
from routing_experts.reports.table import print_budget, print_results, results_markdown
from routing_experts.reports.tasks import print_tasks, tasks_markdown

__all__ = [
    "ProgressPage",
    "bench_markdown",
    "calibration_line",
    "front_markdown",
    "print_bench",
    "print_budget",
    "print_check",
    "print_manifest",
    "print_results",
    "print_static",
    "print_study",
    "print_tasks",
    "reference_run",
    "results_markdown",
    "study_markdown",
    "tasks_markdown",
    "write_bench_report",
    "write_comparison",
    "write_folder_report",
    "write_report",
    "write_study_report",
]
