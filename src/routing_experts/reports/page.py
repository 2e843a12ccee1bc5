"""What every page shares: templates that ask nothing of the network, and figures as data URIs for each look."""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from routing_experts.reports.figures import save_figure
from routing_experts.reports.palette import LOOKS, Look

REPORT_NAME = "report.html"
FIGURES_FOLDER = "figures"


@dataclass(frozen=True)
class Drawing:
    """A figure on the page; ``sources`` are data URIs by look, and without them ``text`` says what is missing."""

    title: str
    text: str
    alternative: str = ""
    sources: dict[str, str] | None = None


def render(template: str, **values: Any) -> str:
    """A page from a template of this package; everything from records is escaped."""
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(css=Markup(_resource("report.css")), **values)


def drawing_of(
    folder: Path, name: str, draw: Callable[[Look], Figure] | None, caption: str, missing: str, alternative: str
) -> Drawing:
    """Draws a figure in every look into a folder; without ``draw`` an earlier report's files go."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if draw is None:
        for look in LOOKS:  # an earlier report's
            (folder / f"{stem}{look.suffix}.png").unlink(missing_ok=True)
        return Drawing(name, missing)
    folder.mkdir(parents=True, exist_ok=True)
    paths = save_figure(draw, folder, stem)
    return Drawing(name, caption, alternative, {suffix: data_uri(path.read_bytes()) for suffix, path in paths.items()})


def data_uri(png: bytes) -> str:
    """A picture that is part of the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
