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
from routing_experts.reports.exhibits import exhibits_of
from routing_experts.reports.latex import latex_tables
from routing_experts.reports.many import draw_curves
from routing_experts.reports.page import FIGURES_FOLDER, REPORT_NAME, Drawing, drawing_of, render
from routing_experts.reports.study_data import main_rate, reference_run
from routing_experts.reports.study_drawings import front_drawing, route_drawings
from routing_experts.reports.study_files import study_csv
from routing_experts.reports.study_tables import claims_grid, rate_grids, routes_grid, seed_cell, task_grid
from routing_experts.reports.summary import NONE, Grid, percent, plural, points, span
from routing_experts.reports.table import grids_markdown, print_grids


def study_grids(study: StudyRecord) -> list[Grid]:
    """Arms first, then contrasts."""
    return [arms(study), differences(study)]


def arms(study: StudyRecord) -> Grid:
    """Each arm at each rate: accuracy by seed and on average, what it skipped, how its routes vary."""
    groups: dict[tuple[float, str], list[StudyRun]] = {}
    for run in study.runs:
        groups.setdefault((run.wanted, run.arm), []).append(run)
    rows = tuple(_arm_row(study, arm, runs) for (_, arm), runs in sorted(groups.items(), key=lambda item: item[0][0]))
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


def front_markdown(study: StudyRecord) -> str:
    """The main table by rate as Markdown, and what the paper says."""
    return grids_markdown(_there(*rate_grids(study), claims_grid(study)))


def front_grids(study: StudyRecord) -> list[Grid]:
    """The main table by rate, what the paper says, the reference by task, its routes beside the authors'."""
    run = reference_run(study)
    routes = routes_grid(study, run) if run else None
    return _there(*rate_grids(study), claims_grid(study), task_grid(study), routes)


def _there(*grids: Grid | None) -> list[Grid]:
    return [grid for grid in grids if grid is not None]


def write_study_report(folder: Path) -> Path:
    """Writes ``report.html`` for a study's folder, and its tables as ``study.md``, ``study.csv`` and ``study.tex``.

    Raises:
        ReportError: if ``study.json`` is missing or does not fit.
    """
    study = StudyRecord.load(folder / STUDY_NAME)
    main, others = front_grids(study), study_grids(study)
    figures = folder / FIGURES_FOLDER
    drawings = [front_drawing(study, figures), *route_drawings(study, figures), *_curves(study, folder, figures)]
    num_layers = len(study.runs[0].layer_skip_rates) if study.runs else 0
    page = render(
        "study.html.jinja",
        title=f"study {study.name}",
        date=str(study.environment.get("date", ""))[:10],
        headline=f"{plural(len({run.arm for run in study.runs}), 'contender')}, "
        f"{plural(len(study.runs), 'run')}, {study.questions:,} questions each",
        tiles=_tiles(study),
        front=drawings[0],
        main=main,
        drawings=drawings[1:],
        others=others,
        exhibits=exhibits_of(folder, num_layers),
    )
    write_text(folder / REPORT_NAME, page)
    write_text(folder / "study.md", grids_markdown([*main, *others]))
    write_text(folder / "study.csv", study_csv(study))
    write_text(folder / "study.tex", latex_tables([*main, *others]))
    return folder / REPORT_NAME


def _tiles(study: StudyRecord) -> list[tuple[str, str, str]]:
    """What the main rate came to: the reference, the base, and the best of all rivals."""
    rate = main_rate(study)
    runs = study.reference_runs.get(rate, [])
    if not runs:
        return []
    own, skipped = mean(run.accuracy for run in runs), mean(run.skip_rate for run in runs)
    tiles = [
        (f"{study.reference} at {percent(skipped)}", percent(own), plural(len(runs), "seed")),
        ("to the base model", points(own - study.base_accuracy), f"base {percent(study.base_accuracy)}"),
    ]
    rivals = [one for one in study.contrasts if one.wanted == rate and not study.is_dense(one.second)]
    if rivals:
        best = min(rivals, key=lambda one: one.difference)
        tiles.append((f"to {best.second}, the best rival", points(best.difference), span(best.low, best.high)))
    return tiles


def _curves(study: StudyRecord, folder: Path, figures: Path) -> list[Drawing]:
    logs: dict[str, dict[str, list[LogLine]]] = {}
    order = {arm: number for number, arm in enumerate(study.plan.get("arms", {}))}
    paths = folder.glob(f"*/seed-*/{LOG_NAME}")
    for path in sorted(paths, key=lambda path: (order.get(path.parts[-3].rsplit("-", 1)[0], len(order)), path)):
        logs.setdefault(path.parts[-3], {})[path.parts[-2]] = read_log(path)
    return [
        drawing_of(
            figures,
            "Curves of every seed",
            partial(draw_curves, logs) if logs else None,
            "A colour an arm and rate, a dash a seed. Cross-entropy is logarithmic.",
            "Not drawn: the folder holds no training logs.",
            "Training curves of " + ", ".join(logs),
        )
    ]


def _arm_row(study: StudyRecord, arm: str, runs: list[StudyRun]) -> tuple[str, ...]:
    raw = [run.raw_skip_rate for run in runs if run.raw_skip_rate is not None]
    return (
        arm,
        percent(mean(run.accuracy for run in runs)),
        seed_cell(study, {run.seed: run.accuracy for run in runs}),
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
