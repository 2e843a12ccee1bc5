"""A study's record as tables: arms by skip rate, and paired differences; on the console and as Markdown."""

from statistics import mean

from rich.console import Console

from routing_experts.records import Contrast, StudyRecord, StudyRun
from routing_experts.reports.summary import NONE, Grid, percent, points
from routing_experts.reports.table import markdown_table, rich_table


def study_grids(study: StudyRecord) -> list[Grid]:
    """Arms first, then contrasts."""
    return [arms(study), differences(study)]


def arms(study: StudyRecord) -> Grid:
    """Each arm at each rate: accuracy by seed and on average, what it skipped, how its routes vary."""
    groups: dict[tuple[float, str], list[StudyRun]] = {}
    for run in study.runs:
        groups.setdefault((run.wanted, run.arm), []).append(run)
    rows = tuple(_arm_row(arm, runs) for (_, arm), runs in sorted(groups.items(), key=lambda item: item[0][0]))
    return Grid(
        f"Study {study.name}",
        ("arm", "accuracy", "by seed", "skipped", "before calibration", "layers that vary", "route tells, bits"),
        rows,
        note=f"{study.questions:,} held-out questions, the same for every run. The base model, not trained further: "
        f"{percent(study.base_accuracy)}. “Layers that vary” are those that 5 % to 95 % of the questions skip; the "
        "last column is the mutual information of route and task.",
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
    for grid in study_grids(study):
        console.print(rich_table(grid))
        console.print(grid.note, style="dim", markup=False)


def study_markdown(study: StudyRecord) -> str:
    """The tables as Markdown."""
    return "\n\n".join(markdown_table(grid) for grid in study_grids(study)) + "\n"


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
        f"{points(contrast.low)} to {points(contrast.high)}",
        " / ".join(points(value) for value in contrast.by_seed),
    )
