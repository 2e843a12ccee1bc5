"""``results.json``: what a run's evaluation measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from routing_experts.errors import ReportError
from routing_experts.records.entry import Count, Entry, Positive, RecordFile, Seconds, Share, misfit, save_json

RESULTS_NAME = "results.json"
GALLERY_NAME = "gallery.json"
MAX_ROUTES = 32
CALIBRATION_NAME = "calibration.json"
BUDGET_NAME = "budget.json"


@dataclass(frozen=True)
class Score(Entry):
    """A model's share of right answers."""

    accuracy: Share


@dataclass(frozen=True)
class Dense(Score):
    """The unrouted model that routing is held against: the better of the base model and the tuned one."""

    source: Literal["base", "tuned"]


@dataclass(frozen=True)
class Skipping(Score):
    """The accuracy of a model that skips this share of its decoder layers (for random routes: at random)."""

    skip_rate: Share


@dataclass(frozen=True)
class Routed(Skipping):
    """The routed model; ``layer_skip_rates`` has one share per decoder layer."""

    layer_skip_rates: list[Share]


@dataclass(frozen=True)
class Static(Skipping):
    """The same layers skipped for every question, as many as the routers skip on average."""

    skipped_layers: list[Count]


@dataclass(frozen=True)
class SpeedCase(Entry):
    """Repeated timings of one piece of work, dense and routed.

    Attributes:
        model: "this" is the run's own; "larger" one of random weights, where layers cost what they cost in practice.
        mixed: whether the rows of the batch took different routes.
    """

    name: str
    phase: Literal["prefill", "decode", "generate"]
    batch: Positive
    model: Literal["this", "larger"]
    skip_rate: Share
    mixed: bool
    dense_seconds: list[Seconds]
    routed_seconds: list[Seconds]


@dataclass(frozen=True)
class Speed(Entry):
    """Medians of the headline case, all cases, and in ``note`` why routed is not faster where it is not."""

    dense_seconds: Seconds
    routed_seconds: Seconds
    cases: list[SpeedCase]
    note: str


@dataclass(frozen=True)
class TaskResult(Entry):
    """One task's questions: accuracy dense and routed, and what the routers skipped.

    Attributes:
        low, high: the paired 95 % interval of routed minus dense.
    """

    questions: Positive
    dense: Share
    routed: Share
    skip_rate: Share
    layer_skip_rates: list[Share]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class RouteCount(Entry):
    """A route and the questions that took it; ``keeps`` has a character a layer, "1" where it ran."""

    keeps: str
    questions: Positive
    right: Share


@dataclass(frozen=True)
class SweepPoint(Skipping):
    """Accuracy and skip rate with ``keep_bias`` added to every keep logit."""

    keep_bias: float


@dataclass(frozen=True)
class Calibration(RecordFile):
    """The keep bias that was set so that the model skips a wanted share of its layers.

    Attributes:
        wanted: share of all decoder layers.
        raw_skip_rate, skip_rate: without and with the bias, on ``questions`` of the training data.
        heldout_raw_skip_rate, heldout_skip_rate: the same on held-out questions, if any were given.
    """

    wanted: Share
    keep_bias: float
    raw_skip_rate: Share
    skip_rate: Share
    heldout_raw_skip_rate: Share | None
    heldout_skip_rate: Share | None
    questions: Positive


@dataclass(frozen=True)
class BudgetCheck(Entry):
    """What a wanted skip ratio gave; nothing where the rate jumps past it.

    Attributes:
        wanted: share of all decoder layers.
        keep_bias: that the budget gives.
        skip_rate, heldout_skip_rate: on the questions of the trace, and on held-out ones if any were given.
    """

    wanted: Share
    keep_bias: float | None
    skip_rate: Share | None
    heldout_skip_rate: Share | None


@dataclass(frozen=True)
class BudgetRecord(Entry):
    """A traced budget and what its ratios give.

    Attributes:
        pairs: skip rate and keep bias, as in the model's config.
        checks: by rising ratio; 0 is the dense model, which needs no check.
    """

    pairs: list[list[float]]
    checks: list[BudgetCheck]
    questions: Positive
    heldout_questions: Positive | None


@dataclass(frozen=True)
class Results(RecordFile):
    """All that a run measured; the contents of ``results.json``.

    Attributes:
        tuned: the base model fine-tuned on the same records for as many steps; None if that was not trained.
        calibration: of the keep bias; None if it was not calibrated, or not here.
        keep_bias: with which it was measured.
        routes: those that questions took, the commonest first; ``MAX_ROUTES`` at most.
        route_information: bits that a question's route tells about its task.
    """

    base: Score
    tuned: Score | None
    dense: Dense
    routed: Routed
    static: Static
    random: Skipping
    speed: Speed
    tasks: dict[str, TaskResult]
    sweep: list[SweepPoint]
    questions: Positive
    seed: int
    environment: dict[str, Any]
    seconds_total: Seconds
    recipe: str
    num_layers: Positive
    calibration: Calibration | None = None
    keep_bias: float = 0.0
    routes: list[RouteCount] = field(default_factory=list)
    route_information: float | None = None

    def checked_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``ReportError`` if one could not be read back."""
        return self._checked(self.to_dict()).to_dict()

    def save(self, path: Path) -> None:
        """Writes the file whole, or raises ``ReportError`` and writes nothing if a value could not be read back."""
        try:
            save_json(path, self.checked_dict())
        except (TypeError, ValueError) as error:
            raise ReportError(f"{path} was not written: {error}") from error

    @classmethod
    def _checked(cls, values: Any) -> Self:
        results = super()._checked(values)
        rates = {f"tasks.{name}.layer_skip_rates": task.layer_skip_rates for name, task in results.tasks.items()}
        rates["routed.layer_skip_rates"] = results.routed.layer_skip_rates
        for where, by_layer in rates.items():
            if len(by_layer) != results.num_layers:
                raise misfit(where, by_layer, f"one rate for each of num_layers={results.num_layers} layers")
        for i, route in enumerate(results.routes):
            if len(route.keeps) != results.num_layers or set(route.keeps) - {"0", "1"}:
                raise misfit(f"routes[{i}].keeps", route.keeps, f"{results.num_layers} characters 0 or 1")
        if max(results.static.skipped_layers, default=0) >= results.num_layers:
            raise misfit("static.skipped_layers", results.static.skipped_layers, f"layers below {results.num_layers}")
        if results.dense.source == "tuned" and results.tuned is None:
            raise misfit("dense.source", "tuned", "'base', since tuned is null")
        refuse_untimed(results.speed.cases, "speed.cases")
        return results


def refuse_untimed(cases: Sequence[Any], where: str) -> None:
    """Raises ``ReportError`` at the first case that has no timing of one of its sides."""
    for i, case in enumerate(cases):
        if not case.dense_seconds or not case.routed_seconds:
            raise misfit(f"{where}[{i}]", case.name, "a timing or more in dense_seconds and routed_seconds")
