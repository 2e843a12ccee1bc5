"""A study's record as tables: arms by skip rate, and paired differences; on the console and as Markdown."""

from functools import partial
from pathlib import Path
from statistics import mean

from rich.console import Console

from routing_experts.records import (
    LOG_NAME,
    STUDY_NAME,
    Contrast,
    LogLine,
    StudyRecord,
    StudyRun,
    read_log,
    write_text,
)
from routing_experts.reports.many import draw_arms, draw_curves
from routing_experts.reports.page import FIGURES_FOLDER, REPORT_NAME, drawing_of, render
from routing_experts.reports.summary import NONE, Grid, percent, points, span
from routing_experts.reports.table import grids_markdown, print_grids


def study_grids(study: StudyRecord) -> list[Grid]:
    """Arms first, then contrasts."""
    return [arms(study), differences(study)]


def arms(study: StudyRecord) -> Grid:
    """Each arm at each rate: accuracy by seed and on average, what it skipped, how its routes vary."""
    groups: dict[tuple[float, str], list[StudyRun]] = {}
    for run in study.runs:
        groups.setdefault((run.wanted, run.arm), []).append(run)
    rows = tuple(_arm_row(arm, runs) for (_, arm), runs in sorted(groups.items(), key=lambda item: item[0][0]))
    base = f"{percent(study.base_accuracy)}" + "".join(
        f", {percent(accuracy)} without {float(rate):.0%} of its layers" for rate, accuracy in study.untrained.items()
    )
    return Grid(
        f"Study {study.name}",
        ("arm", "accuracy", "by seed", "skips", "raw", "vary", "bits"),
        rows,
        note=f"{study.questions:,} held-out questions, the same for every run; the base model, not trained further: "
        f"{base}. Skips: share of all decoder layers; raw: before calibration; vary: share of "
        "the layers that 5 % to 95 % of the questions skip; bits: mutual information of route and task.",
    )


def differences(study: StudyRecord) -> Grid:
    """Paired differences with 95 % intervals."""
    return Grid(
        "Differences, in points",
        ("difference", "at skip rate", "mean", "95 % interval", "by seed"),
        tuple(_difference_row(contrast) for contrast in study.contrasts),
        note="On the same questions; the interval is over questions, for these seeds.",
    )


def print_study(study: StudyRecord, console: Console) -> None:
    """Prints the tables."""
    print_grids(study_grids(study), console)


def study_markdown(study: StudyRecord) -> str:
    """The tables as Markdown."""
    return grids_markdown(study_grids(study))


def write_study_report(folder: Path) -> Path:
    """Writes ``report.html`` for a study's folder: tables, accuracies of all seeds, and their training curves.

    Raises:
        ReportError: if ``study.json`` is missing or does not fit.
    """
    study = StudyRecord.load(folder / STUDY_NAME)
    logs: dict[str, dict[str, list[LogLine]]] = {}
    order = {arm: number for number, arm in enumerate(study.plan.get("arms", {}))}
    paths = folder.glob(f"*/seed-*/{LOG_NAME}")
    for path in sorted(paths, key=lambda path: (order.get(path.parts[-3].rsplit("-", 1)[0], len(order)), path)):
        logs.setdefault(path.parts[-3], {})[path.parts[-2]] = read_log(path)
    figures = folder / FIGURES_FOLDER
    drawings = [
        drawing_of(
            figures,
            "Accuracy by arm",
            partial(draw_arms, study),
            "A mark a seed, a bar at the mean; dashed: the base model, not trained further.",
            "Not drawn.",
            "; ".join(f"{run.arm} seed {run.seed}: {percent(run.accuracy)}" for run in study.runs),
        ),
        drawing_of(
            figures,
            "Curves of every seed",
            partial(draw_curves, logs) if logs else None,
            "A colour an arm and rate, a dash a seed. Cross-entropy is logarithmic.",
            "Not drawn: the folder holds no training logs.",
            "Training curves of " + ", ".join(logs),
        ),
    ]
    page = render(
        "many.html.jinja",
        title=f"study {study.name}",
        date=str(study.environment.get("date", ""))[:10],
        headline=f"{len({run.arm for run in study.runs})} contenders, {len(study.runs)} runs, "
        f"{study.questions:,} questions each",
        grids=study_grids(study),
        drawings=drawings,
    )
    write_text(folder / REPORT_NAME, page)
    return folder / REPORT_NAME


def _arm_row(arm: str, runs: list[StudyRun]) -> tuple[str, ...]:
    raw = [run.raw_skip_rate for run in runs if run.raw_skip_rate is not None]
    return (
        arm,
        percent(mean(run.accuracy for run in runs)),
        " / ".join(f"{100 * run.accuracy:.1f}" for run in runs),
        percent(mean(run.skip_rate for run in runs)),
        percent(mean(raw)) if raw else NONE,
        percent(mean(run.varied_layers for run in runs)),
        f"{mean(run.route_information for run in runs):.2f}",
    )


def _difference_row(contrast: Contrast) -> tuple[str, ...]:
    return (
        f"{contrast.first} − {contrast.second}",
        percent(contrast.wanted),
        points(contrast.difference),
        span(contrast.low, contrast.high),
        " / ".join(points(value) for value in contrast.by_seed),
    )
