"""Several runs on one page: what each reached, task by task, at which budgets, and how it learned."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from routing_experts.errors import ReportError
from routing_experts.records import LOG_NAME, RESULTS_NAME, STUDY_NAME, Results, read_log, write_text
from routing_experts.reports.many import draw_budgets, draw_curves
from routing_experts.reports.page import FIGURES_FOLDER, drawing_of, render
from routing_experts.reports.summary import NONE, Grid, duration, headline_cases, percent, speed_up, times

COMPARE_NAME = "compare.html"


def write_comparison(run_dirs: Sequence[Path], output: Path) -> Path:
    """Writes ``compare.html`` into a folder.

    Args:
        run_dirs: two or more evaluated runs.
        output: the folder of the page; made if it is not there.

    Raises:
        ReportError: for fewer than two runs, or if a record is missing or does not fit.
    """
    if len(run_dirs) < 2:
        raise ReportError(f"{len(run_dirs)} run to compare: a comparison needs two or more. Name another run's folder.")
    studies = [folder for folder in run_dirs if (folder / STUDY_NAME).is_file()]
    if studies:
        raise ReportError(f"{studies[0]} holds a study, whose page compares its runs: leave --compare out for it.")
    names = _names(run_dirs)
    runs = {name: Results.load(folder / RESULTS_NAME) for name, folder in zip(names, run_dirs, strict=True)}
    logs = {
        name: {name: read_log(folder / LOG_NAME)}
        for name, folder in zip(names, run_dirs, strict=True)
        if (folder / LOG_NAME).exists()
    }
    figures = output / FIGURES_FOLDER
    drawings = [
        drawing_of(
            figures,
            "Accuracy against layers skipped",
            partial(draw_budgets, runs),
            "Each run at several budgets: a bias on every keep logit moves it along its line. Large: its own budget.",
            "Not drawn: no runs.",
            "; ".join(f"{n}: {percent(r.routed.accuracy)} at {percent(r.routed.skip_rate)}" for n, r in runs.items()),
        ),
        drawing_of(
            figures,
            "Training",
            partial(draw_curves, logs) if logs else None,
            "Cross-entropy (logarithmic) and layers skipped, as logged.",
            f"Not drawn: no run has a {LOG_NAME}.",
            "Training curves of " + ", ".join(logs),
        ),
    ]
    page = render(
        "many.html.jinja",
        title="comparison",
        date="",
        headline=f"{len(runs)} runs side by side: {', '.join(runs)}",
        grids=comparison_grids(runs),
        drawings=drawings,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / COMPARE_NAME, page)
    return output / COMPARE_NAME


def comparison_grids(runs: dict[str, Results]) -> list[Grid]:
    """One table of the runs, one of the tasks."""
    different = len({(run.questions, run.seed) for run in runs.values()}) > 1
    note = "The runs were asked different questions: their accuracies carry different chance." if different else ""
    rows = tuple(_row(name, run) for name, run in runs.items())
    columns = ("run", "routed", "layers skipped", "dense", "static", "random", "speed-up, batch 1", "batch 16", "took")
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run.tasks))
    by_task = tuple((task, *(_task_cell(run, task) for run in runs.values())) for task in tasks)
    return [
        Grid("Runs", columns, rows, note=note),
        Grid("By task", ("task", *runs), by_task, note="Accuracy, skipped."),
    ]


def _row(name: str, run: Results) -> tuple[str, ...]:
    speeds = {case.batch: times(speed_up(case)) for case in headline_cases(run)}
    return (
        name,
        percent(run.routed.accuracy),
        percent(run.routed.skip_rate),
        percent(run.dense.accuracy),
        percent(run.static.accuracy),
        percent(run.random.accuracy),
        speeds.get(1, NONE),
        speeds.get(16, NONE),
        duration(run.seconds_total),
    )


def _task_cell(run: Results, task: str) -> str:
    found = run.tasks.get(task)
    return NONE if found is None else f"{percent(found.routed)}, {percent(found.skip_rate)}"


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: the folder's, or the path where folders are called alike."""
    short = [folder.resolve().name for folder in run_dirs]
    return short if len(set(short)) == len(short) else [str(folder) for folder in run_dirs]
