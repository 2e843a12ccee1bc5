"""Studies: contenders that share a recipe and differ in one thing each, over several seeds and skip rates.

A study is a YAML file: a recipe, settings laid over it for all, and the arms with what sets each apart. Controls are
arms whose routes are fixed: they are trained as long, on the same records, in the same three stages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from routing_experts.config import MAX_TARGET
from routing_experts.errors import ConfigError
from routing_experts.training.recipe import SHIPPED, Recipe, load_recipe
from routing_experts.training.settings import build, read_yaml

STATIC_CONTROLS = ("most_skipped", "least_important", "least_harmful", "early_exit")
CONTROLS = ("none", "dense", *STATIC_CONTROLS, "random", "pruning")
CLAIMS = ("", "worse", "as_good")
SOURCES = {"most_skipped": ("none", "routed"), "pruning": ("dense", "dense")}  # what they look at, in code and in words
DEPENDENT = tuple(SOURCES)
STUDIES = SHIPPED / "studies"


@dataclass(frozen=True)
class Arm:
    """One contender.

    Attributes:
        control: "none" for a routed model; "dense" is tuned without routes; "most_skipped" always skips the layers
            that the arm ``of`` skips most, with the same seed and rate; "least_important" those of the lowest
            importance, "least_harmful" those without which the base answers most questions, "early_exit" the last
            ones; "random" draws routes; "pruning" runs all layers of a dense arm's model on fewer picture tokens.
        of: the arm that "most_skipped" takes its layers from, or "pruning" its model.
        set: settings by dotted path, laid over the study's.
        rates: which of the study's skip rates; all by default. A control that drops whole layers may have rates of its
            own: where the study's lie between two of them, it is compared as a mixture of both.
        about: what it is, for the table.
        claim: what the method's paper says of it beside the reference, if anything: "worse" where it lacks something
            that the paper holds necessary, "as_good" where it is the paper's own choice and the reference's is not.
        remark: why it came out as it did, once it was measured.
    """

    control: str = "none"
    of: str = "routed"
    set: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] | None = None
    about: str = ""
    claim: str = ""
    remark: str = ""

    def __post_init__(self) -> None:
        if self.control not in CONTROLS:
            raise ConfigError(f"control {self.control!r}: it must be one of {', '.join(CONTROLS)}.")
        if self.claim not in CLAIMS:
            raise ConfigError(f"claim {self.claim!r}: it must be one of {', '.join(CLAIMS[1:])}, or left out.")


@dataclass(frozen=True)
class Study:
    """A study's plan.

    Attributes:
        recipe: a recipe's file or shipped name.
        rates: shares of all decoder layers; routed arms are trained for each and then calibrated to it.
        seeds: of training.
        questions: held-out questions, the same for every run.
        question_seed: of the held-out questions.
        calibration_questions: of the training data, for biases and layer choices.
        margin: added to the target of routed arms, as a share of routed layers, as far as targets go: the mean ends a
            little below it.
        set: settings for all arms.
        arms: by name.
        reference: the arm that all others are compared with.
    """

    recipe: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    arms: dict[str, Arm]
    questions: int = 4000
    question_seed: int = 1000
    calibration_questions: int = 1000
    margin: float = 0.0
    set: dict[str, Any] = field(default_factory=dict)
    reference: str = "routed"

    def __post_init__(self) -> None:
        for name, arm in self.arms.items():
            if arm.control in SOURCES:
                self._check_source(name, arm)
            strange = [rate for rate in arm.rates or () if rate not in self.rates]
            if strange and arm.control not in STATIC_CONTROLS:
                raise ConfigError(f"arm {name} has rates {strange} that the study lacks. Name some of {self.rates}.")
        if self.reference not in self.arms:
            raise ConfigError(f"reference {self.reference!r} is no arm: name one of {', '.join(self.arms)}.")
        if self.arms[self.reference].control != "none":
            raise ConfigError(
                f"reference {self.reference!r} is a control ({self.arms[self.reference].control}): others are held "
                "against a routed arm. Name one."
            )

    def _check_source(self, name: str, arm: Arm) -> None:
        """The arm that a control looks at must be of the right kind."""
        source = self.arms.get(arm.of)
        kind, word = SOURCES[arm.control]
        taken = "layers" if kind == "none" else "model"
        if source is None or source.control != kind:
            raise ConfigError(f"arm {name} takes its {taken} from {arm.of!r}, which is no {word} arm. Name one (of).")

    def rates_of(self, arm: Arm) -> tuple[float, ...]:
        """The skip rates at which an arm is trained; a dense one has none, which counts as one run at 0."""
        return (0.0,) if arm.control == "dense" else arm.rates or self.rates

    def source_rate(self, arm: Arm, rate: float) -> float:
        """The rate at which a dependent arm looks at its source: the nearest, and of two the higher."""
        return min(self.rates_of(self.arms[arm.of]), key=lambda there: (abs(there - rate), -there))

    def arm_recipe(
        self, name: str, rate: float, seed: int, output: Path, num_layers: int, layers: Sequence[int] = ()
    ) -> Recipe:
        """What trains one run.

        Args:
            name: of the arm.
            rate: share of all decoder layers.
            seed: of training.
            output: the run's folder.
            num_layers: L.
            layers: what a static control skips.
        """
        arm = self.arms[name]
        assert arm.control != "pruning", "nothing is trained for it"
        recipe = load_recipe(self.recipe, {**self.set, **arm.set, "training.seed": seed, "output": str(output)})
        if arm.control == "dense":
            return replace(recipe, stages=load_recipe(self.recipe, {"stages": "dense"}).stages)
        roe = recipe.roe
        if arm.control in STATIC_CONTROLS:
            return replace(recipe, roe=replace(roe, gate="static", routed_layers=tuple(sorted(layers))))
        target = rate * num_layers / len(roe.layers_to_route(num_layers))
        if arm.control == "random":
            return replace(recipe, roe=replace(roe, gate="random", target_skip_ratio=target))
        aimed = max(target, min(target + self.margin, MAX_TARGET))  # a rate out of reach is refused by the recipe
        return replace(recipe, roe=replace(roe, target_skip_ratio=aimed))


def load_study(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Study:
    """Reads a study's file, or one that ships with the package by its name.

    Raises:
        ConfigError: if it is missing, is not YAML, or holds an unknown or wrong setting.
    """
    values = read_yaml(name_or_path, STUDIES, "study")
    values |= overrides or {}
    return build(Study, values, "")
