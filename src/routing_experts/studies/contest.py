"""The runs of a study: each one's recipe completed, trained, calibrated and asked; what all share is made once.

A run that was asked leaves ``study_run.json`` in a folder of its own, so that a study that was cut short goes on where
it stopped; runs that a record holds already are not repeated either, though nothing else is left of them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from routing_experts.data.digits import DIGITS
from routing_experts.errors import ConfigError
from routing_experts.evaluation.calibration import RateMeter, calibration, with_bias
from routing_experts.evaluation.controls import most_skipped, random_routes
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.pruning import TokenPruner, image_shares, share_for
from routing_experts.evaluation.questions import Question, digits_questions
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.models.load import load_base, load_processor
from routing_experts.records import STUDY_NAME, ArmSpeed, BaseAnswers, LayerChoice, StudyRecord, StudyRun
from routing_experts.studies.base import base_answers
from routing_experts.studies.jobs import Job, jobs_of
from routing_experts.studies.layers import layer_choice
from routing_experts.studies.outcome import outcome, settings_of
from routing_experts.studies.plan import DEPENDENT, STATIC_CONTROLS, Study
from routing_experts.training.recipe import Recipe, load_recipe
from routing_experts.training.run import Trained, train

RUN_RECORD = "study_run.json"
BASE_RECORD = "base.json"
LAYERS_RECORD = "layers.json"
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class Contest:
    """What the runs of a study share.

    Args:
        study: the plan.
        output: the study's folder.
        console: where progress is shown.
        bar: a progress bar of a title and a total.
    """

    def __init__(self, study: Study, output: Path, console: Console, bar: Bar) -> None:
        self.study, self.output, self.console, self.bar = study, output, console, bar
        self.plan = load_recipe(study.recipe, study.set)
        if self.plan.data.source != DIGITS:
            raise ConfigError(
                f"recipe {study.recipe}: data.source is {self.plan.data.source!r}, but a study asks questions on the "
                "digits, whose answers it can check. Give a recipe on the digits."
            )
        self._record: StudyRecord | None = None
        self._known: dict[Job, StudyRun] = {}
        self._checked: dict[Job, StudyRun] = {}

    def learn(self, record: StudyRecord) -> None:
        """Takes a record's runs as done, in place of any that another record told of; what all share comes with it.

        Raises:
            ConfigError: if one of them is none of the plan's: whoever writes the record anew would lose it.
        """
        self._record = record
        runs, planned = {Job(run.arm, run.wanted, run.seed): run for run in record.runs}, set(jobs_of(self.study))
        strange = [job.name for job in runs if job not in planned]
        if strange:
            raise ConfigError(
                f"the record holds {len(strange)} runs that the plan does not name, such as {strange[0]}: they would "
                "be lost. Give the plan that made it, or another file (--json)."
            )
        self._known |= runs

    def run(self, job: Job) -> StudyRun:
        """Trains and asks one contender, or reads what an earlier call left of it."""
        if (found := self.found(job)) is not None:
            return found
        folder = job.folder(self.output)
        self.console.print(f"[bold]{job.arm}[/] at {job.rate:.1%}, seed {job.seed}")
        if self.study.arms[job.arm].control == "pruning":
            run = self._prune(job)
        else:
            recipe = self.recipe(job)
            run = self._ask(job, recipe, train(recipe, self.console))
        run.save(folder / RUN_RECORD)
        return run

    def found(self, job: Job) -> StudyRun | None:
        """A run that was asked already.

        Raises:
            ConfigError: if it was trained or asked by another plan.
        """
        if job not in self._checked:
            path = job.folder(self.output) / RUN_RECORD
            run = StudyRun.load(path) if path.is_file() else self._known.get(job)
            if run is None:
                return None
            self._check(job, run, path if path.is_file() else None)
            self._checked[job] = run
        return self._checked[job]

    def _check(self, job: Job, run: StudyRun, path: Path | None) -> None:
        """Raises ``ConfigError`` if a run is not one of this plan."""
        where = str(path) if path else f"the record's {job.name}"
        remedy = "Remove it to run it anew, or give another folder (--output)." if path else "Give another record."
        dropped = [layer for layer, rate in enumerate(run.layer_skip_rates) if rate == 1]
        recipe = self._recipe(job, dropped)
        wanted, found = settings_of(recipe), run.settings
        if not found:  # older records have none, but this
            wanted, found = {"training.steps": recipe.training.steps}, {"training.steps": run.steps}
        for name in sorted(wanted.keys() | found.keys()):
            there, asked = found.get(name), wanted.get(name)
            if there != asked:
                raise ConfigError(f"{where} was trained with {name} {there}, the study asks for {asked}. {remedy}")
        expected = self._known_layers(job)
        if expected is not None and sorted(expected) != dropped:
            raise ConfigError(f"{where} drops layers {dropped}, the study asks for {sorted(expected)}. {remedy}")
        for name, asked in (
            ("questions", self.study.questions),
            ("question_seed", self.study.question_seed),
            ("calibration_questions", self.study.calibration_questions),
        ):
            there = len(run.right) if name == "questions" else getattr(run, name)
            if there is not None and there != asked:
                raise ConfigError(f"{where} was asked with {name} {there}, the study has {asked}. {remedy}")

    def _known_layers(self, job: Job) -> list[int] | None:
        """What a static control drops, as far as that is known without asking or training a model."""
        control = self.study.arms[job.arm].control
        if control not in STATIC_CONTROLS or (control.startswith("least") and self._known_choice is None):
            return None
        if control == "most_skipped" and self.found(self._source(job)) is None:
            return None
        return self._layers(job)

    @property
    def known_speeds(self) -> list[ArmSpeed]:
        """What was timed earlier, by the record that was given and then by the study's folder's own."""
        own = self.output / STUDY_NAME
        records = (self._record, StudyRecord.load(own) if own.is_file() else None)
        return [one for record in records if record is not None for one in record.speeds]

    @cached_property
    def base(self) -> Any:
        """The base model."""
        return load_base(self.plan.model)

    @cached_property
    def processor(self) -> Any:
        """The base model's."""
        return load_processor(self.plan.model)

    @cached_property
    def num_layers(self) -> int:
        """L."""
        return int(self.base.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def routable(self) -> tuple[int, ...]:
        """The layers that may be skipped."""
        return self.plan.roe.layers_to_route(self.num_layers)

    @cached_property
    def questions(self) -> list[Question]:
        """Held out; the same for every run."""
        return digits_questions(self.study.questions, self.study.question_seed)

    @cached_property
    def training_questions(self) -> list[Question]:
        """Of the training data: biases, layers and shares are chosen on these."""
        return digits_questions(self.study.calibration_questions, self.plan.data.digits.seed, split="train")

    @property
    def _known_choice(self) -> LayerChoice | None:
        """Of an earlier call or record, where it was made of the same questions for the same rates."""
        path = self.output / LAYERS_RECORD
        found = LayerChoice.load(path) if path.is_file() else self._record and self._record.layers
        asked = (self.study.calibration_questions, self.study.questions)
        rates = {str(rate) for rate in self.study.rates}
        if not found or (found.training_questions, found.questions) != asked or set(found.untrained) != rates:
            return None
        return found if len(found.by_harm) >= self._deepest_harm else None

    @property
    def _deepest_harm(self) -> int:
        """The most layers that an arm drops by harm."""
        arms = [arm for arm in self.study.arms.values() if arm.control == "least_harmful"]
        return max((round(rate * self.num_layers) for arm in arms for rate in self.study.rates_of(arm)), default=0)

    @cached_property
    def choice(self) -> LayerChoice:
        """The layers that fixed controls drop: the same for every seed."""
        if (found := self._known_choice) is not None:
            return found
        choice = layer_choice(
            self.base,
            self.processor,
            self.training_questions,
            self.questions,
            self.study.rates,
            self._deepest_harm,
            self.routable,
        )
        choice.save(self.output / LAYERS_RECORD)
        return choice

    @cached_property
    def answers_of_base(self) -> BaseAnswers:
        """What the base model says to the held-out questions, and how hard it finds them."""
        path = self.output / BASE_RECORD
        known = BaseAnswers.load(path) if path.is_file() else self._record and self._record.base
        if known and (len(known.right), known.question_seed) == (self.study.questions, self.study.question_seed):
            return known
        with self.bar("base", len(self.questions)) as advance:
            found = base_answers(self.base, self.processor, self.questions, self.study.question_seed, advance)
        found.save(path)
        return found

    @cached_property
    def image_shares(self) -> list[float]:
        """Of each training question's prompt, the share of tokens that are pictures'."""
        asked_as = self.plan.data.prompt_format
        return image_shares(self.base, self.processor, self.training_questions, asked_as)

    def recipe(self, job: Job) -> Recipe:
        """What trains a run, its fixed layers chosen."""
        return self._recipe(job, self._layers(job))

    def model_job(self, job: Job) -> Job:
        """The run whose folder holds the model that a job asks: another's, where nothing is trained for it."""
        return self._source(job) if self.study.arms[job.arm].control == "pruning" else job

    def _recipe(self, job: Job, layers: Sequence[int]) -> Recipe:
        trained = self.model_job(job)
        folder = trained.folder(self.output)
        return self.study.arm_recipe(trained.arm, trained.rate, job.seed, folder, self.num_layers, layers)

    def _layers(self, job: Job) -> list[int]:
        """The layers that a static control drops."""
        arm = self.study.arms[job.arm]
        if arm.control not in STATIC_CONTROLS:
            return []
        count = round(job.rate * self.num_layers)
        if arm.control == "most_skipped":
            return most_skipped(self.run(self._source(job)).layer_skip_rates, self.routable)[:count]
        if arm.control == "early_exit":
            return list(range(self.num_layers - count, self.num_layers))
        return (self.choice.by_importance if arm.control == "least_important" else self.choice.by_harm)[:count]

    def source_of(self, job: Job) -> Job | None:
        """The run that a dependent arm's run looks at; None for any other."""
        return self._source(job) if self.study.arms[job.arm].control in DEPENDENT else None

    def _source(self, job: Job) -> Job:
        arm = self.study.arms[job.arm]
        assert arm.control in DEPENDENT
        return Job(arm.of, self.study.source_rate(arm, job.rate), job.seed)

    def _ask(self, job: Job, recipe: Recipe, trained: Trained) -> StudyRun:
        control = self.study.arms[job.arm].control
        calibrated, routes = None, None
        if control == "none":
            with self.console.status("calibrating …"):
                calibrated = self._calibrate(trained, job.rate)
        if control == "random":
            routes = random_routes(self.routable, job.rate, len(self.questions), self.num_layers, job.seed)
        return outcome(self.study, job, self._asked(job, recipe, trained.model, routes=routes), recipe, calibrated)

    def _asked(self, job: Job, recipe: Recipe, model: Any, **settings: Any) -> Evaluation:
        """As it was trained, whether routed or not."""
        with self.bar(f"{job.arm} {job.rate:.0%}", len(self.questions)) as advance:
            asked_as = recipe.data.prompt_format
            return ask(model, self.processor, self.questions, prompt_format=asked_as, advance=advance, **settings)

    def _prune(self, job: Job) -> StudyRun:
        """A dense arm's model with fewer picture tokens; it is trained now if it is not there."""
        recipe = self.recipe(job)
        self.run(self._source(job))
        model = train(recipe, self.console).model
        share = share_for(job.rate, self.image_shares, self.num_layers)
        with TokenPruner(model, share).pruned() as pruner:
            asked = self._asked(job, recipe, model)
        return outcome(self.study, job, asked, recipe, None, pruner.left_out)

    def _calibrate(self, trained: Trained, rate: float) -> tuple[float, float]:
        """The rate without a bias and the bias for the wanted one, which the model's folder then holds.

        Where too many routers decide alike, the nearest rate is taken: how far it is off is a finding, and recorded.
        """
        meter = RateMeter(trained.model, self.processor, self.training_questions)
        found = calibration(meter, None, rate, tolerance=1.0)
        with_bias(trained.model, found.keep_bias).roe_config.save(trained.folder)
        return found.raw_skip_rate, found.keep_bias
