"""``tasks.json``: what lmms-eval's tasks gave a model, with all layers and with routes."""

from dataclasses import dataclass, field
from typing import Any

from routing_experts.records.entry import Count, Entry, Positive, RecordFile, Seconds, Share

TASKS_NAME = "tasks.json"


@dataclass(frozen=True)
class Spread(Entry):
    """Timings in short: the median, and where the middle half begins and ends."""

    median: Seconds
    low: Seconds
    high: Seconds


@dataclass(frozen=True)
class SideScore(Entry):
    """One metric of one task, for a model asked in one way.

    Attributes:
        side: "dense", "routed", or "routed, 20 %" for a skip ratio of one's own.
        value: as lmms-eval gives it.
        difference, low, high: from dense, paired by sample, with the 95 % interval; None where the metric has no score
            for a single sample.
        skip_rate, layer_skip_rates: of all decoder layers, over the samples.
        seconds_to_first: until a batch's first tokens.
        seconds_a_token: behind it, of batches that decoded more than one token; None without any.
        empty: answers without a word.
        batch_sizes: that the samples were asked at; several where an earlier run's were kept.
    """

    side: str
    value: float
    skip_rate: Share
    layer_skip_rates: list[Share]
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    seconds_to_first: Spread | None = None
    seconds_a_token: Spread | None = None
    empty: Count = 0
    batch_sizes: list[Positive] = field(default_factory=list)


@dataclass(frozen=True)
class TaskScore(Entry):
    """One metric of one task."""

    task: str
    metric: str
    higher_is_better: bool
    samples: Positive
    sides: list[SideScore]


@dataclass(frozen=True)
class TaskScores(RecordFile):
    """All that ``roe evaluate --tasks`` found; the contents of ``tasks.json``."""

    model: str
    batch_size: Positive
    num_layers: Positive
    scores: list[TaskScore]
    lmms_eval: str
    environment: dict[str, Any]
    limit: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def by_task(self) -> dict[str, TaskScore]:
        """One of each task's metrics: routes, times and samples are the same for all of them."""
        return {score.task: score for score in self.scores}
