"""A study's figures: the front of all arms, and what the reference's routes are like beside the authors'."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from routing_experts.records import StudyRecord, StudyRun, from_bits, from_marks
from routing_experts.reports.figures import blank_figure, plain, style_axes
from routing_experts.reports.many import MARKERS, colour_of, put_legend
from routing_experts.reports.palette import Look
from routing_experts.reports.study_data import Front, depths, tenth_shares


def draw_front(study: StudyRecord, fronts: Mapping[str, Front], look: Look) -> Figure:
    """Accuracy against the share of work that is left out: a line an arm, a band from its worst to its best seed."""
    figure = blank_figure(look, 3.9 if look.narrow else 4.6)
    axes = figure.add_subplot()
    style_axes(axes, look)
    shown = [value for front in fronts.values() for point in front for value in point.accuracies]
    for index, (arm, front) in enumerate(fronts.items()):
        colour, skipped = colour_of(index, look), [100 * point.skip_rate for point in front]
        low, high = ([100 * pick(point.accuracies) for point in front] for pick in (min, max))
        style: dict[str, Any] = {"color": colour, "zorder": 4 if index == 0 else 3}
        axes.fill_between(skipped, low, high, alpha=0.18, linewidth=0, **style)
        middle = [100 * mean(point.accuracies) for point in front]
        width = 2.2 if index == 0 else 1.3
        style |= {"marker": MARKERS[index % len(MARKERS)], "markersize": 4.5}
        axes.plot(skipped, middle, linewidth=width, label=plain(arm), **style)
    dense = [run.accuracy for run in study.runs if run.wanted == 0]
    levels: list[tuple[float, str, Any]] = [(study.base_accuracy, "base", (0, (4, 3)))]
    if dense:
        levels.append((mean(dense), "dense", "-"))
    for value, name, dash in levels:
        axes.axhline(100 * value, color=look.faint, linewidth=0.8, linestyle=dash, zorder=1)
        over = value == max(levels)[0]  # the other's name goes below its line: they lie close together
        place: dict[str, Any] = {"xytext": (0, 3 if over else -3), "va": "bottom" if over else "top", "fontsize": 8}
        axes.annotate(name, (0, 100 * value), color=look.faint, textcoords="offset points", **place)
    axes.set(xlabel="work left out (% of layers times tokens, at prefill)", ylabel="accuracy (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(100 * _floor(shown, study.base_accuracy), None)
    put_legend(axes, look)
    return figure


def _floor(shown: Sequence[float], base: float) -> float:
    """Where the axis begins: what falls far below all others would flatten them."""
    near = [value for value in shown if value > base - 0.4]
    return min(near, default=0.0) - 0.01


def draw_depths(run: StudyRun, num_layers: int, authors: Mapping[float, float], look: Look) -> Figure:
    """How many layers questions skipped: the run's and the authors', as shares of each model's own depth."""
    figure = blank_figure(look, 2.9)
    axes = figure.add_subplot()
    style_axes(axes, look)
    ours = depths(run, num_layers)
    axes.bar(
        [100 * count / num_layers for count in ours],
        [100 * share for share in ours.values()],
        width=70 / num_layers,
        color=look.routed,
        label="here",
    )
    axes.plot(
        [100 * share for share in authors],
        [100 * value for value in authors.values()],
        color=look.static,
        marker=".",
        linewidth=1.2,
        label="the authors' log",
    )
    axes.set(xlabel="layers skipped (% of the model's)", ylabel="questions (%)")
    put_legend(axes, look)
    return figure


def draw_difficulty(study: StudyRecord, run: StudyRun, num_layers: int, look: Look) -> Figure:
    """By tenths of the base model's loss on the right answer: layers run, and answers right."""
    assert study.base is not None
    figure = blank_figure(look, 4.2)
    layers, rights = figure.subplots(2, 1, sharex=True)
    tenths = np.arange(1, 11)
    for axes in (layers, rights):
        style_axes(axes, look)
    layers.bar(tenths, tenth_shares(study.base, depths_of(run, num_layers)), color=look.routed, width=0.75)
    layers.set_ylabel("layers run")
    _two_lines(rights, tenths, study, run, look)
    rights.set(xlabel="questions by difficulty, from the easiest tenth", ylabel="right (%)")
    rights.set_xticks(tenths)
    figure.align_ylabels()
    return figure


def depths_of(run: StudyRun, num_layers: int) -> list[float]:
    """Layers that each question ran."""
    return [float(ran) for ran in from_marks(run.layers_run)] or [(1 - run.skip_rate) * num_layers] * len(run.right)


def _two_lines(axes: Axes, tenths: np.ndarray, study: StudyRecord, run: StudyRun, look: Look) -> None:
    assert study.base is not None
    for name, right, colour in (("base", study.base.right, look.faint), (run.arm, run.right, look.routed)):
        values = tenth_shares(study.base, [100.0 * one for one in from_bits(right)])
        axes.plot(tenths, values, marker="o", markersize=4, color=colour, label=plain(name))
    put_legend(axes, look)


def draw_layer_rates(ours: Sequence[float], authors: Sequence[float], look: Look) -> Figure:
    """How often each layer is skipped, by its relative depth: here, and in the authors' log."""
    figure = blank_figure(look, 2.7)
    axes = figure.add_subplot()
    style_axes(axes, look)
    for rates, name, colour in ((ours, "here", look.routed), (authors, "the authors' log", look.static)):
        places = [100 * (layer + 0.5) / len(rates) for layer in range(len(rates))]
        axes.plot(places, [100 * rate for rate in rates], drawstyle="steps-mid", color=colour, label=name)
    axes.set(xlabel="depth of the layer (%)", ylabel="questions that skip it (%)", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    put_legend(axes, look)
    return figure
