"""The route histogram: which routes questions took, the commonest first."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from routing_experts.records import RouteCount
from routing_experts.reports.figures import blank_figure, style_axes
from routing_experts.reports.palette import Look

MAX_BARS = 12
_GAP = 0.18  # of a row's height


def draw_routes(routes: Sequence[RouteCount], questions: int, look: Look) -> Figure:
    """A strip of layers and a bar for each route, the commonest first.

    Args:
        routes: in that order.
        questions: how many were asked in all.
        look: the variant.
    """
    shown, num_layers = routes[:MAX_BARS], len(routes[0].keeps)
    figure = blank_figure(look, 0.75 + 0.27 * len(shown))
    strips, bars = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1) if look.narrow else (2, 3))
    for axes in (strips, bars):
        style_axes(axes, look, grid=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_yticks([])
    for row, route in enumerate(shown):
        for layer, mark in enumerate(route.keeps):
            colour = look.routed if mark == "1" else look.bands[1]
            strips.add_patch(Rectangle((layer - 0.45, row + _GAP), 0.9, 1 - 2 * _GAP, color=colour, linewidth=0))
    strips.set(xlim=(-0.5, num_layers - 0.5), ylim=(len(shown), 0), xlabel="decoder layer")
    shares = [100 * route.questions / questions for route in shown]
    places = [row + 0.5 for row in range(len(shown))]
    bars.barh(places, shares, height=1 - 2 * _GAP, color=look.static, zorder=3)
    beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
    for place, share, route in zip(places, shares, shown, strict=True):
        text = f"{share:.1f} %, {100 * route.right:.0f} % right" if not look.narrow else f"{share:.1f} %"
        bars.annotate(text, (share, place), color=look.ink, **beside)
    bars.set(xlim=(0, max(shares) * (1.55 if look.narrow else 1.4)), xlabel="questions (%)")
    return figure
