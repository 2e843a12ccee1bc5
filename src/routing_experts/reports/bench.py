"""A benchmark's record as tables and a picture: gains over dense, and how near they come to what is possible."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from rich.console import Console

from routing_experts.records import BENCH_NAME, BenchCase, BenchRecord, write_text
from routing_experts.reports.figures import blank_figure, style_axes
from routing_experts.reports.page import FIGURES_FOLDER, REPORT_NAME, drawing_of, render
from routing_experts.reports.palette import Look
from routing_experts.reports.summary import NONE, Grid, measured, percent, speed_up, times
from routing_experts.reports.table import WIDE_CONSOLE, grids_markdown, print_grids


def bench_grids(record: BenchRecord, ranges: bool = True) -> list[Grid]:
    """Fixed batches, requests that come and go, counted cost."""
    grids = [_batches(record, ranges), _serving(record, ranges), _counted(record)]
    return [grid for grid in grids if grid.rows]


def print_bench(record: BenchRecord, console: Console) -> None:
    """Prints the tables."""
    print_grids(bench_grids(record, ranges=console.width >= WIDE_CONSOLE), console)


def bench_markdown(record: BenchRecord) -> str:
    """The tables as Markdown."""
    return grids_markdown(bench_grids(record))


def write_bench_report(folder: Path) -> Path:
    """Writes ``report.html`` beside a folder's ``bench.json``.

    Raises:
        ReportError: if the record is missing or does not fit.
    """
    record = BenchRecord.load(folder / BENCH_NAME)
    drawing = drawing_of(
        folder / FIGURES_FOLDER,
        "Gain over the dense model",
        partial(draw_bench, record),
        "A bar a case: dense time over routed time, medians. The tick is the static twin, whose skipped layers are "
        "physically replaced: the most that a fixed route can give.",
        "Not drawn.",
        "; ".join(f"{case.name}: {times(speed_up(case))}" for case in record.cases),
    )
    page = render(
        "many.html.jinja",
        title=f"bench {record.name}",
        date=str(record.environment.get("date", ""))[:10],
        headline=f"{record.model['num_layers']} decoder layers of width {record.model['hidden_size']}, "
        f"{record.model['dtype']}, on {record.environment.get('cpu', record.environment.get('device', ''))}",
        grids=bench_grids(record, ranges=False),  # with them the table is wider than the page
        drawings=[drawing],
    )
    write_text(folder / REPORT_NAME, page)
    return folder / REPORT_NAME


def draw_bench(record: BenchRecord, look: Look) -> Figure:
    """A bar a case from 1 to its gain, in the record's order; a tick where the twin stands."""
    cases = record.cases
    figure = blank_figure(look, 0.9 + (0.36 if look.narrow else 0.27) * len(cases))
    axes = figure.add_subplot()
    style_axes(axes, look, grid=False)
    for row, case in enumerate(cases):
        gain = speed_up(case)
        axes.barh(row, gain - 1, left=1, height=0.62, color=look.routed if case.skip_rate else look.faint)
        if case.twin_seconds:
            twin = median(case.dense_seconds) / median(case.twin_seconds)
            axes.plot([twin, twin], [row - 0.42, row + 0.42], color=look.static, linewidth=2)
        beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        outline = [withStroke(linewidth=3, foreground=look.paper)]  # a tick may stand where the number does
        axes.annotate(f"{gain:.2f}", (max(gain, 1), row), color=look.ink, path_effects=outline, **beside)
    axes.axvline(1, color=look.line, linewidth=1)
    names = [_short(case) for case in cases]
    axes.set_yticks(range(len(cases)), names)
    axes.set(ylim=(len(cases) - 0.4, -0.6), xlabel="dense time / routed time")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    return figure


def _batches(record: BenchRecord, ranges: bool) -> Grid:
    rows = tuple(
        (
            case.name,
            percent(case.skip_rate),
            times(speed_up(case)),
            times(median(case.twin_seconds) / median(case.routed_seconds)) if case.twin_seconds else NONE,
            measured(case, case.dense_seconds, ranges),
            measured(case, case.routed_seconds, ranges),
        )
        for case in record.cases
        if case.served is None
    )
    return Grid(
        f"Bench {record.name}",
        ("case", "skipped", "speed-up", "of the twin", "dense", "routed"),
        rows,
        note=("Medians, with minimum to maximum in brackets. " if ranges else "Medians. ")
        + "Of the twin: its time over the routed time; the twin has the same layers physically replaced by their "
        "adapters. Routes are forced, which leaves out what deciding costs, except where routers are asked."
        + _engines(record),
    )


def _engines(record: BenchRecord) -> str:
    if all(case.phase != "engine" for case in record.cases):
        return ""
    return (
        " The engine's cases stand beside the dense model's own generate: with all layers kept they show what the "
        "engine gives without skipping"
        + (", captured decoding among it." if record.environment.get("device") != "cpu" else ".")
    )


def _serving(record: BenchRecord, ranges: bool) -> Grid:
    rows = []
    for case in record.cases:
        if case.served is None:
            continue
        served = case.served
        first = served.first_token_seconds
        rows.append(
            (
                case.name,
                times(speed_up(case)),
                f"{times(served.weight_cap)} / {times(served.row_cap)}",
                f"{served.layers_read:.1f}",
                f"{served.waiting_bytes / 2**20:,.0f} MiB",
                _first(first) if first else NONE,
                measured(case, case.routed_seconds, ranges),
            )
        )
    return Grid(
        "Requests of different routes",
        ("case", "speed-up", "caps", "layers a step", "waiting", "first token", "decoding"),
        tuple(rows),
        note="Speed-up over the dense model in the same engine, decoding alone, each a step in turn"
        + (" in one run" if all(len(case.routed_seconds) == 1 for case in record.cases if case.served) else "")
        + ". Caps: the gain if a step cost its "
        "weights alone, and if it cost its rows alone. "
        + _first_tokens(record)
        + "Routes are forced: no router is asked.",
    )


def _first_tokens(record: BenchRecord) -> str:
    for case in record.cases:
        if case.served and case.served.first_token_requests and case.served.dense_first_token_seconds:
            return (
                f"First token: median and 95th percentile of {case.served.first_token_requests} requests sent at once "
                f"and prefilled for real (dense: {_first(case.served.dense_first_token_seconds)}). "
            )
    return ""


def _first(seconds: Sequence[float]) -> str:
    """Median and 95th percentile."""
    return " / ".join(f"{one:.3g} s" for one in seconds)


def _counted(record: BenchRecord) -> Grid:
    rows = tuple(
        (
            case.name,
            f"{case.routed.flops / case.dense.flops:.3f}",
            f"{case.routed.bytes / case.dense.bytes:.3f}",
            f"{case.routed.cache_bytes / case.dense.cache_bytes:.3f}",
            f"{median(case.routed_seconds) / median(case.dense_seconds):.3f}",
        )
        for case in record.cases
        if case.dense and case.routed and case.skip_rate
    )
    return Grid(
        "Counted, routed over dense",
        ("case", "operations", "bytes read", "cache bytes", "measured time"),
        rows,
        note="Counted from shapes: linear maps and attention, weights and keys and values. A prefill follows the "
        "operations, a decoding step of few rows the bytes. An engine's slots have room for the answers, too.",
    )


def _short(case: BenchCase) -> str:
    if case.served is not None:
        return case.name.split(", ")[-1]
    manner = "asked" if "asked" in case.name else "mixed" if case.mixed else "kept" if not case.skip_rate else "alike"
    return f"{case.phase} {case.batch}, {manner}"
