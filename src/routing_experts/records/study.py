"""``study.json``: every run of a study, and how the arms compare on the same questions."""

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from routing_experts.records.entry import Count, Entry, Positive, RecordFile, Seconds, Share, misfit
from routing_experts.records.results import RouteCount

STUDY_NAME = "study.json"


@dataclass(frozen=True)
class StudyRun(RecordFile):
    """One trained contender on the held-out questions.

    Attributes:
        arm, seed: which.
        wanted: the skip rate that it was trained for and, if routed, calibrated to; 0 for a dense one.
        skip_rate: share of all decoder layers skipped.
        raw_skip_rate: before calibration; None where nothing is calibrated.
        keep_bias: found by calibration.
        right: a character a question, "1" for a right answer.
        layer_skip_rates: of each decoder layer.
        task_accuracy, task_skip_rate: by task.
        route_information: bits that the route tells about the task.
        varied_layers: the share of layers that between 5 % and 95 % of the questions skip.
        training_seconds: of this run alone.
        question_seed, calibration_questions: what it was asked and calibrated with; None in older records.
        task_layer_skip_rates: of each decoder layer, by task.
        routes: the commonest ones.
        layers_run: a character a question, the number of layers that it ran (``from_marks``); empty where all
            questions ran as many.
        settings: of the recipe that trained it, as far as they are not the defaults, by dotted path.
        made: date, commit and processor.
    """

    arm: str
    seed: int
    wanted: Share
    accuracy: Share
    skip_rate: Share
    raw_skip_rate: Share | None
    keep_bias: float | None
    right: str
    layer_skip_rates: list[Share]
    task_accuracy: dict[str, Share]
    task_skip_rate: dict[str, Share]
    route_information: float
    varied_layers: Share
    training_seconds: Seconds
    steps: Positive
    question_seed: Count | None = None
    calibration_questions: Count | None = None
    task_layer_skip_rates: dict[str, list[Share]] = field(default_factory=dict)
    routes: list[RouteCount] = field(default_factory=list)
    layers_run: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerChoice(RecordFile):
    """Layers in the order in which fixed controls drop them.

    Attributes:
        by_importance: the least important first.
        by_harm: dropped one after the other, each time the one that costs the base least.
        untrained: by skip rate, the base's accuracy on held-out questions with so many layers dropped, ``by_harm``.
        training_questions, questions: how many were asked for the choice, and for ``untrained``.
    """

    by_importance: list[int]
    by_harm: list[int]
    untrained: dict[str, Share]
    training_questions: Positive
    questions: Positive


@dataclass(frozen=True)
class BaseAnswers(RecordFile):
    """What the base model, not trained further, says to the held-out questions.

    Attributes:
        right: a character a question, "1" for a right answer.
        tasks, task_of: the tasks, and a character a question that counts into them (``from_marks``).
        tenth_of: a character a question, from "0" for the tenth of lowest loss on the right answer to "9".
        question_seed: of the questions.
    """

    accuracy: Share
    right: str
    tasks: list[str]
    task_of: str
    tenth_of: str
    question_seed: Count


@dataclass(frozen=True)
class Contrast(Entry):
    """Accuracy of ``first`` minus ``second`` at a skip rate, over seeds, with the paired 95 % interval.

    Attributes:
        by_seed: the differences of ``seeds``.
        mixed: whether ``second`` is two models, each question drawing one, so that the rate is met on average.
    """

    first: str
    second: str
    wanted: Share
    seeds: list[int]
    difference: float
    low: float
    high: float
    by_seed: list[float]
    mixed: bool = False


@dataclass(frozen=True)
class ArmSpeed(Entry):
    """One contender timed beside the base model, which took turns with it on the same prompts.

    Attributes:
        arm, wanted, seed: which.
        phase: until the first token, or a whole answer of a few tokens.
        base_seconds, arm_seconds: every repetition, taken in turn.
        made: date, commit and processor; empty in older records.
    """

    arm: str
    wanted: Share
    seed: int
    phase: Literal["prefill", "generate"]
    batch: Positive
    base_seconds: list[Seconds]
    arm_seconds: list[Seconds]
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyRecord(RecordFile):
    """All that a study measured; the contents of ``study.json``.

    Attributes:
        untrained: by skip rate, the base's accuracy without so many layers, chosen to harm least, and no training.
        base, layers: what the base says and which layers fixed controls drop; None in older records.
        speeds: measured when nothing else ran, of the contenders whose models were at hand.
    """

    name: str
    plan: dict[str, Any]
    base_accuracy: Share
    questions: Positive
    question_seed: Count
    runs: list[StudyRun]
    contrasts: list[Contrast]
    environment: dict[str, Any]
    untrained: dict[str, Share] = field(default_factory=dict)
    base: BaseAnswers | None = None
    layers: LayerChoice | None = None
    speeds: list[ArmSpeed] = field(default_factory=list)

    @property
    def reference(self) -> str:
        """The arm that all others are held against."""
        return str(self.plan.get("reference", "routed"))

    @property
    def seeds(self) -> list[int]:
        """Those of the plan, and any other that was run."""
        return sorted({*self.plan.get("seeds", ()), *(run.seed for run in self.runs)})

    @property
    def reference_runs(self) -> dict[float, list[StudyRun]]:
        """The reference's runs that skip, by rising rate."""
        runs = [run for run in self.runs if run.arm == self.reference and run.wanted]
        rates = sorted({run.wanted for run in runs})
        return {rate: [run for run in runs if run.wanted == rate] for rate in rates}

    def is_dense(self, arm: str) -> bool:
        """Whether no run of the arm skips anything."""
        return all(run.wanted == 0 for run in self.runs if run.arm == arm)

    @classmethod
    def _checked(cls, values: Any) -> Self:
        study = super()._checked(values)
        for i, run in enumerate(study.runs):
            if len(run.right) != study.questions or set(run.right) - {"0", "1"}:
                raise misfit(f"runs[{i}].right", run.right, f"{study.questions} characters 0 or 1")
        return study
