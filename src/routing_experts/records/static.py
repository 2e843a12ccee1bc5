"""``static.json``: a static model beside the routed one that it was made of, and beside all of its layers."""

from dataclasses import dataclass
from typing import Any

from routing_experts.records.entry import Count, Entry, Positive, RecordFile, Seconds, Share

STATIC_NAME = "static.json"


@dataclass(frozen=True)
class StaticRow(Entry):
    """One model on the same questions.

    Attributes:
        name: "dense" (the same weights, all layers run), "routed" or "static".
        skip_rate: share of all decoder layers.
        parameters: of the whole model.
        seconds: by batch size, of whole answers of a few tokens; the three took turns.
    """

    name: str
    accuracy: Share
    skip_rate: Share
    parameters: Positive
    seconds: dict[str, list[Seconds]]


@dataclass(frozen=True)
class StaticExport(RecordFile):
    """What was dropped, by what, and what came of it.

    Attributes:
        dropped: layers that are gone.
        layer_skip_rates: of the routed model, on ``chosen_on`` questions; the choice was made by these.
        difference, low, high: of static minus routed accuracy, with the paired 95 % interval.
    """

    dropped: list[Count]
    layer_skip_rates: list[Share]
    chosen_on: Positive
    questions: Positive
    rows: list[StaticRow]
    difference: float
    low: float
    high: float
    environment: dict[str, Any]
