"""Figures that hold several runs side by side: budgets, and curves of every run or seed."""

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from routing_experts.records import LogLine, Results, StudyRecord
from routing_experts.reports.figures import blank_figure, plain, style_axes
from routing_experts.reports.palette import Look

# After the look's own first colour, Okabe and Ito's that stand out on light and dark paper; the last is for all others.
COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#8c8c8c")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


def draw_budgets(runs: Mapping[str, Results], look: Look) -> Figure:
    """Each run's accuracy against skip rate as its keep bias sweeps; the large point is its own budget."""
    figure = blank_figure(look, 3.4 if look.narrow else 3.9)
    axes = figure.add_subplot()
    style_axes(axes, look)
    for index, (name, results) in enumerate(runs.items()):
        colour = _colour(index, look)
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
    _legend(axes, look)
    return figure


def draw_curves(logs: Mapping[str, Mapping[str, Sequence[LogLine]]], look: Look) -> Figure:
    """Cross-entropy and skip rate by step: a colour a group of runs, a dash a run (or seed) of the group."""
    figure = blank_figure(look, 4.6)
    losses, rates = figure.subplots(2, 1, sharex=True)
    for axes in (losses, rates):
        style_axes(axes, look)
    for index, (group, runs) in enumerate(logs.items()):
        for number, log in enumerate(runs.values()):
            style = {"color": _colour(index, look), "linewidth": 1.1, "linestyle": DASHES[number % len(DASHES)]}
            label = plain(group) if number == 0 else None
            known = [(line.step, line.ce) for line in log if line.ce is not None]
            routed = [(line.step, 100 * line.skip_rate) for line in log if line.skip_rate is not None]
            losses.plot(*_columns(known), label=label, **style)
            rates.plot(*_columns(routed), **style)
    losses.set(yscale="log", ylabel="cross-entropy (nats)")
    rates.set(ylabel="layers skipped (%)", xlabel="optimiser step")
    rates.set_ylim(bottom=0)
    _legend(losses, look)
    figure.align_ylabels()
    return figure


def draw_arms(study: StudyRecord, look: Look) -> Figure:
    """Accuracy by skip rate: a mark a seed, a bar at the mean of an arm."""
    figure = blank_figure(look, 3.4 if look.narrow else 3.9)
    axes = figure.add_subplot()
    style_axes(axes, look)
    names = list(dict.fromkeys(run.arm for run in study.runs))
    for index, name in enumerate(names):
        runs = [run for run in study.runs if run.arm == name]
        shift = 0.35 * (index - (len(names) - 1) / 2)  # arms at one rate would hide one another
        axes.plot(
            [100 * run.skip_rate + shift for run in runs],
            [100 * run.accuracy for run in runs],
            "o",
            color=_colour(index, look),
            markersize=5,
            alpha=0.75,
            label=plain(name),
        )
        for wanted in {run.wanted for run in runs}:
            same = [run for run in runs if run.wanted == wanted]
            middle = 100 * mean(run.skip_rate for run in same) + shift
            axes.hlines(
                100 * mean(run.accuracy for run in same), middle - 0.5, middle + 0.5, color=_colour(index, look)
            )
    axes.axhline(100 * study.base_accuracy, color=look.faint, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="decoder layers skipped (%)", ylabel="accuracy (%)")
    _legend(axes, look)
    return figure


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _colour(index: int, look: Look) -> str:
    return look.routed if index == 0 else COLOURS[min(index, len(COLOURS)) - 1]


def _legend(axes: Axes, look: Look) -> None:
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
