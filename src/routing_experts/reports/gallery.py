"""Questions with both models' answers and the route that was taken: the contents of ``gallery.json``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from routing_experts.errors import ReportError
from routing_experts.records import Entry, load_json

MAX_SHOWN = 12


@dataclass(frozen=True)
class GalleryItem(Entry):
    """One question.

    Attributes:
        image: a PNG, its path relative to the run's folder; None for a question without a picture.
        answer: the right one.
        dense, routed: what the models said.
        route: per layer, whether the routed model kept it.
        names: what the two are called.
    """

    image: str | None
    question: str
    answer: str
    dense: str
    routed: str
    route: list[bool]
    names: list[str] = field(default_factory=lambda: ["dense", "routed"])

    def is_right(self, said: str) -> bool:
        """Whether a model said the right answer; case and space around it do not count."""
        return said.strip().casefold() == self.answer.strip().casefold()


def load_gallery(path: Path) -> list[GalleryItem]:
    """Reads ``gallery.json``: a list of items.

    Raises:
        ReportError: if it is missing, is not JSON, or a field is missing or does not fit; path and field are named.
    """
    return load_json(path, _items)


def _items(values: object) -> list[GalleryItem]:
    if not isinstance(values, list):
        raise ReportError(f"it holds {type(values).__name__}: expected a list of items. Write one object a question.")
    return [GalleryItem.from_dict(item, f"[{i}]") for i, item in enumerate(values)]


def layers_in_words(route: Sequence[bool]) -> str:
    """A route for those who do not see it: ``Runs layers 0, 2–5; skips 1, 6.``"""
    runs = _ranges([layer for layer, kept in enumerate(route) if kept])
    skips = _ranges([layer for layer, kept in enumerate(route) if not kept])
    return f"Runs layers {runs or 'none'}; skips {skips or 'none'}."


def _ranges(layers: Sequence[int]) -> str:
    parts = []
    for _, group in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}\N{EN DASH}{run[-1]}")
    return ", ".join(parts)
