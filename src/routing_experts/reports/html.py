"""A run's page: one HTML file that holds its own figures and styles, and asks nothing of the network."""

from functools import partial
from itertools import groupby
from pathlib import Path

from routing_experts.records import (
    LOG_NAME,
    RESULTS_NAME,
    TASKS_NAME,
    LogLine,
    Results,
    TaskScores,
    from_bits,
    read_log,
    write_text,
)
from routing_experts.reports.exhibits import Exhibit, exhibits_of
from routing_experts.reports.figures import draw_layers, draw_tradeoff, draw_training, smoothing_window
from routing_experts.reports.gallery import layers_in_words
from routing_experts.reports.page import FIGURES_FOLDER, REPORT_NAME, Drawing, drawing_of, render
from routing_experts.reports.routes import MAX_BARS, draw_routes
from routing_experts.reports.summary import (
    Grid,
    by_task,
    comparison,
    headline,
    headline_cases,
    percent,
    speed,
    speed_up,
    surroundings,
    times,
)
from routing_experts.reports.tasks_page import tasks_parts


def write_report(run_dir: Path) -> Path:
    """Draws a run's figures and writes its page; what an earlier report left is replaced.

    Args:
        run_dir: a folder with ``results.json``; ``log.jsonl``, ``gallery.json`` and ``tasks.json`` are shown if they
            are there.

    Returns:
        The page, ``report.html`` in that folder.

    Raises:
        ReportError: if a record is missing or does not fit; its path and field are named.
    """
    results = Results.load(run_dir / RESULTS_NAME)
    log = read_log(run_dir / LOG_NAME) if (run_dir / LOG_NAME).exists() else []
    exhibits = exhibits_of(run_dir, results.num_layers)
    drawings = {drawing.title: drawing for drawing in _drawings(run_dir / FIGURES_FOLDER, results, log)}
    path = run_dir / REPORT_NAME
    write_text(path, _page(results, drawings, exhibits, _benchmarks(run_dir)))
    return path


def _benchmarks(run_dir: Path) -> tuple[list[Grid], list[Drawing]]:
    """What lmms-eval's tasks gave, if they were asked; with their files beside the page."""
    if not (run_dir / TASKS_NAME).is_file():
        return [], []
    return tasks_parts(run_dir, TaskScores.load(run_dir / TASKS_NAME))


def _page(
    results: Results,
    drawings: dict[str, Drawing],
    exhibits: list[Exhibit],
    benchmarks: tuple[list[Grid], list[Drawing]],
) -> str:
    return render(
        "report.html.jinja",
        title=results.recipe,
        headline=headline(results),
        date=str(results.environment.get("date", ""))[:10],
        tiles=_tiles(results),
        comparison=comparison(results),
        by_task=by_task(results),
        speed=speed(results),
        speed_note=results.speed.note,
        environment=surroundings(results),
        drawings=drawings,
        exhibits=exhibits,
        benchmarks=benchmarks,
    )


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    tiles = [
        ("routed accuracy", percent(results.routed.accuracy), f"dense {percent(results.dense.accuracy)}"),
        ("layers skipped", percent(results.routed.skip_rate), f"of {results.num_layers}, on average"),
    ]
    for case in headline_cases(results):
        tiles.append((f"speed-up, batch {case.batch}", times(speed_up(case)), f"measured, {case.phase}"))
    if len(tiles) == 2 and results.speed.routed_seconds > 0:
        tiles.append(("speed-up", times(results.speed.dense_seconds / results.speed.routed_seconds), "measured"))
    return tiles


def _drawings(folder: Path, results: Results, log: list[LogLine]) -> list[Drawing]:
    return [
        drawing_of(
            folder,
            "layers",
            partial(draw_layers, results) if results.tasks else None,
            "How often each decoder layer is skipped, by task, in per cent of the questions. Layers count from 0.",
            f"Not drawn: {RESULTS_NAME} has no tasks to show layers of.",
            f"Heat map of skip rates: {len(results.tasks)} tasks by {results.num_layers} layers. "
            + "; ".join(f"{name} {percent(task.skip_rate)}" for name, task in results.tasks.items()),
        ),
        drawing_of(
            folder,
            "tradeoff",
            partial(draw_tradeoff, results) if results.sweep else None,
            "One trained model at several budgets: a bias added to every keep logit moves it along the line, without "
            "training. The large point is the evaluated budget, with a 95 % interval; the dashed line is dense.",
            f"Not drawn: {RESULTS_NAME} has no sweep of the keep bias.",
            "Accuracy against layers skipped. "
            + "; ".join(f"{percent(one.accuracy)} at {percent(one.skip_rate)} skipped" for one in results.sweep),
        ),
        training_drawing(folder, log),
        drawing_of(
            folder,
            "routes",
            partial(draw_routes, results.routes, results.questions) if results.routes else None,
            f"The commonest of the routes that questions took, up to {MAX_BARS}: filled cells ran; the bar is the "
            "share of questions, the figure beside it how many of them were answered right.",
            f"Not drawn: {RESULTS_NAME} has no routes.",
            "; ".join(f"{layers_in_words(from_bits(one.keeps))} {one.questions}" for one in results.routes[:5]),
        ),
    ]


def training_drawing(folder: Path, log: list[LogLine]) -> Drawing:
    """The curves of a training log, however long it is so far."""
    stages = ", ".join(stage.replace("_", " ") for stage, _ in groupby(line.stage for line in log))
    window = smoothing_window(len(log))
    lost = sum(line.ce is None for line in log)
    return drawing_of(
        folder,
        "training",
        partial(draw_training, log) if log else None,
        "Training from left to right through its stages."
        + (f" Thin: every logged value; thick: moving mean of {window}." if window > 1 else "")
        + (f" Cross-entropy was absent or not finite in {lost} of {len(log)} lines." if lost else ""),
        f"Not drawn: the run has no {LOG_NAME}, or an empty one.",
        f"Cross-entropy and skip rate by step; stages: {stages}.",
    )
