"""Figures that hold several runs side by side: budgets, and curves of every run or seed."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from routing_experts.records import LogLine, Results, StudyRecord
from routing_experts.reports.figures import blank_figure, plain, style_axes
from routing_experts.reports.palette import Look

# After the look's own first colour, those that stand out on light and dark paper: Okabe and Ito's, a violet, and one
# that all others share.
COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#8a63d2", "#8c8c8c")
MARKERS = "osD^vPX"  # beside colours, for eyes and prints that tell few of those apart
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


def draw_budgets(runs: Mapping[str, Results], look: Look) -> Figure:
    """Each run's accuracy against skip rate as its keep bias sweeps; the large point is its own budget."""
    figure = blank_figure(look, 3.4 if look.narrow else 3.9)
    axes = figure.add_subplot()
    style_axes(axes, look)
    for index, (name, results) in enumerate(runs.items()):
        colour = colour_of(index, look)
        sweep = sorted(results.sweep, key=lambda point: point.keep_bias)
        axes.plot(
            [100 * point.skip_rate for point in sweep],
            [100 * point.accuracy for point in sweep],
            color=colour,
            linewidth=1.5,
            marker="o",
            markersize=3.5,
        )
        own = (100 * results.routed.skip_rate, 100 * results.routed.accuracy)
        axes.plot(*own, "o", color=colour, markersize=10, markeredgecolor=look.paper, label=plain(name))
    axes.set(xlabel="decoder layers skipped (%)", ylabel="accuracy (%)")
    put_legend(axes, look)
    return figure


def draw_curves(logs: Mapping[str, Mapping[str, Sequence[LogLine]]], look: Look) -> Figure:
    """Cross-entropy and skip rate by step: a colour a group of runs, a dash a run (or seed) of the group."""
    figure = blank_figure(look, 4.6)
    losses, rates = figure.subplots(2, 1, sharex=True)
    for axes in (losses, rates):
        style_axes(axes, look)
    for index, (group, runs) in enumerate(logs.items()):
        for number, log in enumerate(runs.values()):
            style = {"color": colour_of(index, look), "linewidth": 1.1, "linestyle": DASHES[number % len(DASHES)]}
            label = _label(group, index) if number == 0 else None
            known = [(line.step, line.ce) for line in log if line.ce is not None]
            routed = [(line.step, 100 * line.skip_rate) for line in log if line.skip_rate is not None]
            losses.plot(*_columns(known), label=label, **style)
            rates.plot(*_columns(routed), **style)
    losses.set(yscale="log", ylabel="cross-entropy (nats)")
    rates.set(ylabel="layers skipped (%)", xlabel="optimiser step")
    rates.set_ylim(bottom=0)
    put_legend(losses, look)
    figure.align_ylabels()
    return figure


def draw_arms(study: StudyRecord, look: Look) -> Figure:
    """A row an arm, the best at the top: a mark a seed, a bar at their mean, the stronger the more is skipped."""
    means: dict[tuple[str, float], float] = {}
    for run in study.runs:
        same = [other.accuracy for other in study.runs if (other.arm, other.wanted) == (run.arm, run.wanted)]
        means[run.arm, run.wanted] = 100 * mean(same)
    rates = sorted({wanted for _, wanted in means})
    names = sorted({arm for arm, _ in means}, key=lambda arm: max(v for (name, _), v in means.items() if name == arm))
    figure = blank_figure(look, 1.2 + 0.34 * len(names))
    axes = figure.add_subplot()
    style_axes(axes, look, grid=False)
    for rate in rates:
        colour = look.colours(0.25 + 0.75 * rate / (rates[-1] or 1.0))
        runs = [run for run in study.runs if run.wanted == rate]
        rows = [names.index(run.arm) for run in runs]
        style: dict[str, Any] = {"color": colour, "markersize": 5, "alpha": 0.75}
        axes.plot([100 * run.accuracy for run in runs], rows, "o", label=f"{rate:.0%} skipped", **style)
        for arm in {run.arm for run in runs}:
            row = names.index(arm)
            axes.vlines(means[arm, rate], row - 0.3, row + 0.3, color=colour)
    axes.axvline(100 * study.base_accuracy, color=look.faint, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(names)), [plain(name) for name in names])
    axes.grid(axis="x", color=look.line, linewidth=0.7)
    axes.set(xlabel="accuracy (%)", ylim=(-0.6, len(names) - 0.4))
    put_legend(axes, look)
    return figure


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _label(group: str, index: int) -> str | None:
    """A legend's entry: groups that share the last colour are one."""
    if index < len(COLOURS):
        return plain(group)
    return "others" if index == len(COLOURS) else None


def colour_of(index: int, look: Look) -> str:
    """A series' colour: the look's own first, then those that stand out beside it."""
    return look.routed if index == 0 else COLOURS[min(index, len(COLOURS)) - 1]


def put_legend(axes: Axes, look: Look) -> None:
    """A legend above the axes, if there is something to name."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if look.narrow else min(4, len(handles))
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=8,
            labelcolor=look.ink,
            handlelength=1.4,
            columnspacing=1.2,
        )
