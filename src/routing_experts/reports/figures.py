"""A run's three figures, each as PNG for light and dark pages and for wide and narrow screens.

Drawn on ``Figure`` objects, without pyplot: no global state, safe in threads. Texts from the records reach matplotlib
through ``plain``, since a dollar sign would start a formula.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from routing_experts.records import LogLine, Results
from routing_experts.reports.palette import LOOKS, Look
from routing_experts.reports.summary import interval

DPI = 200
LEGIBLE_CELL = 0.235  # inches: the narrowest cell that holds a number
LONGEST_NAME = 26


def save_figure(draw: Callable[[Look], Figure], folder: Path, name: str) -> dict[str, Path]:
    """Draws a figure in every look.

    Returns:
        The files by their look's suffix.
    """
    paths = {look.suffix: folder / f"{name}{look.suffix}.png" for look in LOOKS}
    for look in LOOKS:
        draw(look).savefig(paths[look.suffix], dpi=DPI, format="png")
    return paths


def draw_layers(results: Results, look: Look) -> Figure:
    """Heat map of skip rates: a row a task, a column a layer; the first row is all questions together."""
    rows = [("all questions", results.routed.layer_skip_rates, results.routed.skip_rate)]
    rows += [(name, task.layer_skip_rates, task.skip_rate) for name, task in results.tasks.items()]
    return draw_heat_map(rows, look)


def draw_heat_map(rows: Sequence[tuple[str, Sequence[float], float]], look: Look) -> Figure:
    """A row a name with its layers' skip rates and their mean; the first stands apart."""
    num_layers = len(rows[0][1])
    figure = blank_figure(look, 1.25 + 0.29 * len(rows))
    axes = figure.add_subplot()
    tops = [0.0] + [i + 0.35 for i in range(1, len(rows))]  # a gap below the summary row
    for top, (_, rates, _) in zip(tops, rows, strict=True):
        edges = np.arange(num_layers + 1) - 0.5
        cells = axes.pcolormesh(edges, [top, top + 1], [rates], cmap=look.colours, vmin=0, vmax=1)
        cells.set(edgecolor=look.paper, linewidth=1.2 if num_layers <= 40 else 0.4)
    style_axes(axes, look, grid=False)
    axes.set(xlim=(-0.5, num_layers - 0.5), ylim=(tops[-1] + 1, 0), xlabel="decoder layer")
    axes.set_yticks([top + 0.5 for top in tops], [plain(name) for name, _, _ in rows])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if look.narrow else 17, integer=True))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    beside: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
    for top, (_, _, mean) in zip(tops, rows, strict=True):
        axes.annotate(f"{100 * mean:.0f} %", (num_layers - 0.5, top + 0.5), color=look.ink, **beside)
    axes.annotate("mean", (num_layers - 0.5, -0.3), annotation_clip=False, color=look.faint, **beside)
    _colour_key(figure, axes, look)
    figure.draw_without_rendering()
    cell_width = axes.get_window_extent().width / figure.dpi / num_layers
    if cell_width >= LEGIBLE_CELL:
        _write_rates(axes, look, tops, [rates for _, rates, _ in rows], min(8.0, 26 * cell_width))
    return figure


def draw_tradeoff(results: Results, look: Look) -> Figure:
    """Accuracy against skip rate as the keep bias sweeps, with dense, static and random skipping beside it."""
    figure = blank_figure(look, 3.2 if look.narrow else 3.9)
    axes = figure.add_subplot()
    style_axes(axes, look)
    sweep = sorted(results.sweep, key=lambda point: point.keep_bias)
    track = [(100 * point.skip_rate, 100 * point.accuracy) for point in sweep]
    axes.plot(*zip(*track, strict=True), color=look.routed, linewidth=1.6, marker="o", markersize=4, zorder=3)
    routed = (100 * results.routed.skip_rate, 100 * results.routed.accuracy)
    low, high = interval(results.routed.accuracy, results.questions)
    axes.vlines(routed[0], 100 * low, 100 * high, color=look.routed, linewidth=1, zorder=3)
    marks = {
        "routed": (*routed, "o", look.routed, 11),
        "dense": (0.0, 100 * results.dense.accuracy, "s", look.ink, 7.5),
        "same layers always": (100 * results.static.skip_rate, 100 * results.static.accuracy, "D", look.static, 7),
        "at random": (100 * results.random.skip_rate, 100 * results.random.accuracy, "X", look.random, 8),
    }
    for x, y, marker, colour, size in marks.values():
        axes.plot(
            x, y, marker, color=colour, markersize=size, markeredgecolor=look.paper, markeredgewidth=1.2, zorder=4
        )
    axes.axhline(marks["dense"][1], color=look.faint, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.margins(x=0.09, y=0.13)
    axes.set(xlabel="decoder layers skipped (%)", ylabel="accuracy (%)")
    labels = [
        (name, x, y, colour, "bold" if name == "routed" else "normal") for name, (x, y, _, colour, _) in marks.items()
    ]
    if len(track) > 1:
        ends = ((sweep[0], track[0]), (sweep[-1], track[-1]))
        labels += [(f"bias {_signed(point.keep_bias)}", x, y, look.faint, "normal") for point, (x, y) in ends]
    _place_labels(figure, axes, labels, track, look)
    return figure


def draw_training(log: Sequence[LogLine], look: Look) -> Figure:
    """Cross-entropy and, where a stage routes, the skip rate with its target, on a background of stages."""
    has_rates = any(line.skip_rate is not None for line in log)
    figure = blank_figure(look, (4.4 if has_rates else 2.7) - (0.4 if look.narrow else 0))
    panels = figure.subplots(2 if has_rates else 1, 1, sharex=True, squeeze=False)[:, 0]
    for axes in panels:
        style_axes(axes, look)
        _shade_stages(axes, log, look, named=axes is panels[0])
    _plot_by_stage(panels[0], log, [line.ce for line in log], look.routed)
    panels[0].set_ylabel("cross-entropy (nats)")
    if has_rates:
        _plot_by_stage(panels[1], log, [_percent(line.skip_rate) for line in log], look.routed)
        targets = [_percent(line.target_skip_ratio) for line in log]
        panels[1].plot(
            [line.step for line in log],
            _gaps(targets),
            color=look.static,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            zorder=4,
        )
        _name_target(panels[1], log, look)
        panels[1].set_ylabel("layers skipped (%)")
        panels[1].set_ylim(bottom=0)
    panels[0].set_xlim(0, max(1, log[-1].step))
    panels[-1].set_xlabel("optimiser step")
    figure.align_ylabels()
    return figure


def plain(text: str) -> str:
    """A text on one line, not too long, that matplotlib shows as it is."""
    one_line = "".join(mark if mark.isprintable() else " " for mark in text)
    if len(one_line) > LONGEST_NAME:
        one_line = one_line[: LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return one_line.replace("$", r"\$")


def blank_figure(look: Look, height: float) -> Figure:
    """An empty figure of a look's width; ``height`` is in inches."""
    return Figure(figsize=(look.width, height), dpi=100, facecolor=look.paper, layout="constrained")


def style_axes(axes: Axes, look: Look, grid: bool = True) -> None:
    """A look's colours and sizes."""
    axes.set_facecolor(look.paper)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(look.line)
    axes.tick_params(color=look.line, labelcolor=look.ink, labelsize=8.5, length=3)
    axes.xaxis.label.set(color=look.faint, fontsize=9)
    axes.yaxis.label.set(color=look.faint, fontsize=9)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="y", color=look.line, linewidth=0.7)


def _colour_key(figure: Figure, axes: Axes, look: Look) -> None:
    # In shares of the axes, yet about 5 points high above any number of rows.
    height = 5 / 72 / (figure.get_figheight() - 0.9)
    key = axes.inset_axes((0.0, 1 + 1.8 * height, 0.45 if look.narrow else 0.26, height))
    key.imshow(np.linspace(0, 1, 256)[None], cmap=look.colours, vmin=0, vmax=1, aspect="auto", extent=(0, 100, 0, 1))
    key.set_yticks([])
    key.set_xticks([0, 50, 100])
    key.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, pad=2)
    key.tick_params(labelsize=8, labelcolor=look.faint)
    key.spines[:].set_visible(False)
    beside: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    key.annotate("% of questions skip it", (100, 0.5), color=look.faint, fontsize=8, **beside)


def _write_rates(axes: Axes, look: Look, tops: Sequence[float], rows: Sequence[Sequence[float]], size: float) -> None:
    for top, rates in zip(tops, rows, strict=True):
        for layer, rate in enumerate(rates):
            red, green, blue, _ = look.colours(rate)
            bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5
            colour = "#10141a" if bright else "#ffffff"
            axes.text(layer, top + 0.52, f"{100 * rate:.0f}", ha="center", va="center", fontsize=size, color=colour)


def _shade_stages(axes: Axes, log: Sequence[LogLine], look: Look, named: bool) -> None:
    begins = 0
    for i, (stage, lines) in enumerate(groupby(log, key=lambda line: line.stage)):
        ends = list(lines)[-1].step
        axes.axvspan(begins, ends, color=look.bands[i % 2], linewidth=0, zorder=0)
        if named:
            name = plain(stage.replace("_", " "))
            name = name.replace(" ", "\n") if look.narrow else name
            place = ((begins + ends) / 2, 1.02)
            axes.text(*place, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=8, color=look.faint)
        begins = ends


def _plot_by_stage(axes: Axes, log: Sequence[LogLine], values: Sequence[float | None], colour: str) -> None:
    """Every logged value, faint, under a moving mean that stops at stage boundaries; gaps stay gaps."""
    reach = smoothing_window(len(log)) // 2
    for _, pairs in groupby(zip(log, values, strict=True), key=lambda pair: (pair[0].stage, pair[1] is None)):
        stretch = [(line.step, value) for line, value in pairs if value is not None]
        if not stretch:
            continue
        steps, raw = zip(*stretch, strict=True)
        around = [raw[max(0, i - reach) : i + reach + 1] for i in range(len(raw))]
        axes.plot(steps, raw, color=colour, linewidth=0.8, alpha=0.35 if reach else 0, zorder=2)
        axes.plot(steps, [sum(near) / len(near) for near in around], color=colour, linewidth=1.7, zorder=3)
        if len(steps) == 1:
            axes.plot(steps, raw, ".", color=colour, zorder=3)


def smoothing_window(num_lines: int) -> int:
    """How many logged values the thick training curves average; an odd number."""
    return num_lines // 60 * 2 + 1


def _name_target(axes: Axes, log: Sequence[LogLine], look: Look) -> None:
    """Writes "target" where the curve is farthest from it, on the other side of the line."""
    middle = log[len(log) // 8 : -(len(log) // 8) or None]
    both = [(line, line.skip_rate, line.target_skip_ratio) for line in middle]
    apart = [(rate - goal, line.step, goal) for line, rate, goal in both if rate is not None and goal is not None]
    if apart:
        gap, step, goal = max(apart, key=lambda one: abs(one[0]))
        place: dict[str, Any] = {"xytext": (0, -4 if gap > 0 else 4), "textcoords": "offset points", "ha": "center"}
        side = "top" if gap > 0 else "bottom"
        axes.annotate("target", (step, 100 * goal), va=side, color=look.static, fontsize=8.5, **place)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"


_Label = tuple[str, float, float, str, str]
_OFFSETS = (
    (0, 10),
    (0, -10),
    (10, 0),
    (-10, 0),
    (9, 9),
    (9, -9),
    (-9, 9),
    (-9, -9),
    (0, 20),
    (0, -20),
    (14, 16),
    (14, -16),
)


def _place_labels(
    figure: Figure, axes: Axes, labels: Sequence[_Label], curve: Sequence[tuple[float, float]], look: Look
) -> None:
    """Puts each label on the side of its point where it covers the least: points, the curve, other labels, the edge."""
    figure.draw_without_rendering()  # fixes the layout that extents are measured in
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    track = [axes.transData.transform(point) for point in curve]
    between = [a + (b - a) * t / 12 for a, b in pairwise(track) for t in range(13)]
    track += [axes.transData.transform((x, y)) for _, x, y, _, _ in labels]
    taken: list[Annotation] = []
    for text, x, y, colour, weight in labels:
        best: tuple[float, int, Annotation] | None = None
        for rank, (right, up) in enumerate(_OFFSETS):
            note = axes.annotate(
                text,
                (x, y),
                (right, up),
                textcoords="offset points",
                ha="left" if right > 0 else "right" if right < 0 else "center",
                va="bottom" if up > 0 else "top" if up < 0 else "center",
                color=colour,
                fontsize=8.5,
                fontweight=weight,
                zorder=6,
                path_effects=[withStroke(linewidth=2.5, foreground=look.paper)],
            )
            box = note.get_window_extent()
            outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            crossed = sum(box.contains(*place) for place in between) + 3 * sum(box.contains(*place) for place in track)
            cost = 50.0 * outside + crossed + 20 * sum(box.overlaps(other.get_window_extent()) for other in taken)
            if best is None or (cost, rank) < best[:2]:
                if best is not None:
                    best[2].remove()
                best = (cost, rank, note)
            else:
                note.remove()
        assert best is not None
        taken.append(best[2])
