"""One run of a study: its recipe completed, trained, calibrated and asked; and the study's record from all of them.

Every run leaves ``run.json`` of its training and ``study_run.json`` of its evaluation in a folder of its own, so that a
study that was cut short goes on where it stopped.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.console import Console

from routing_experts.cli.common import progress_bar
from routing_experts.cli.layer_choice import layer_choice
from routing_experts.data.digits import DIGITS
from routing_experts.errors import ConfigError
from routing_experts.evaluation.calibration import RateMeter, calibration, with_bias
from routing_experts.evaluation.controls import most_skipped, random_routes
from routing_experts.evaluation.evaluate import ask, information
from routing_experts.evaluation.paired import paired_difference, varied_share
from routing_experts.evaluation.questions import digits_questions
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.models.load import load_base, load_processor
from routing_experts.records import Contrast, LayerChoice, StudyRecord, StudyRun, environment, read_log
from routing_experts.training.folder import RunFolder
from routing_experts.training.recipe import Recipe, load_recipe, recipe_values
from routing_experts.training.run import Trained, train
from routing_experts.training.study import STATIC_CONTROLS, Study

RUN_RECORD = "study_run.json"


@dataclass(frozen=True)
class Job:
    """An arm at a rate with a seed."""

    arm: str
    rate: float
    seed: int

    def folder(self, output: Path) -> Path:
        """Where the run lies."""
        return output / f"{self.arm}-{100 * self.rate:.4g}" / f"seed-{self.seed}"


def jobs_of(study: Study) -> list[Job]:
    """All runs, a seed after the other, routed arms before the controls that look at them."""
    order = sorted(study.arms, key=lambda name: study.arms[name].control == "most_skipped")
    return [
        Job(name, rate, seed) for seed in study.seeds for name in order for rate in study.rates_of(study.arms[name])
    ]


class Contest:
    """What the runs of a study share.

    Args:
        study: the plan.
        output: the study's folder.
        console: where progress is shown.
    """

    def __init__(self, study: Study, output: Path, console: Console) -> None:
        self.study, self.output, self.console = study, output, console
        plan = load_recipe(study.recipe, study.set)
        if plan.data.source != DIGITS:
            raise ConfigError(
                f"recipe {study.recipe}: data.source is {plan.data.source!r}, but a study asks questions on the "
                "digits, whose answers it can check. Give a recipe on the digits."
            )
        self.base, self.processor = load_base(plan.model), load_processor(plan.model)
        self.num_layers: int = self.base.config.get_text_config(decoder=True).num_hidden_layers
        self.routable = plan.roe.layers_to_route(self.num_layers)
        self.questions = digits_questions(study.questions, study.question_seed)
        self.training_questions = digits_questions(study.calibration_questions, plan.data.digits.seed, split="train")

    def run(self, job: Job) -> StudyRun:
        """Trains and asks one contender, or reads what an earlier call left of it."""
        folder = job.folder(self.output)
        record = folder / RUN_RECORD
        if record.is_file():
            return self._done(job, StudyRun.load(record))
        recipe = self._recipe(job, folder)
        trained = train(recipe, self.console)
        run = self._ask(job, recipe, trained)
        run.save(record)
        return run

    def _done(self, job: Job, run: StudyRun) -> StudyRun:
        """A run that was asked already, if it is one of this plan."""
        folder = job.folder(self.output)
        dropped = [layer for layer, rate in enumerate(run.layer_skip_rates) if rate == 1]
        planned = self.study.arm_recipe(job.arm, job.rate, job.seed, folder, self.num_layers, dropped)
        RunFolder(folder).check_recipe(recipe_values(planned))
        for name, there in (
            ("questions", len(run.right)),
            ("question_seed", run.question_seed),
            ("calibration_questions", run.calibration_questions),
        ):
            if there is not None and there != getattr(self.study, name):
                raise ConfigError(
                    f"{folder / RUN_RECORD} was asked with {name} {there}, the study has {getattr(self.study, name)}. "
                    "Remove that file to ask the run anew, or give another folder (--output)."
                )
        return run

    def is_done(self, job: Job) -> bool:
        """Whether a run was asked already."""
        return (job.folder(self.output) / RUN_RECORD).is_file()

    def record(self, name: str, runs: list[StudyRun], base: Evaluation) -> StudyRecord:
        """The study's record: all runs, and every arm against the reference at each rate."""
        study = self.study
        return StudyRecord(
            name=name,
            plan=asdict(study),
            base_accuracy=base.accuracy,
            questions=study.questions,
            question_seed=study.question_seed,
            runs=runs,
            contrasts=contrasts(study, runs),
            environment=environment(),
            untrained=self.choice.untrained,
        )

    def ask_base(self) -> Evaluation:
        """The base model on the held-out questions."""
        with progress_bar(self.console, "base", len(self.questions)) as advance:
            return ask(self.base, self.processor, self.questions, advance=advance)

    def _recipe(self, job: Job, folder: Path) -> Recipe:
        arm, layers = self.study.arms[job.arm], []
        count = round(job.rate * self.num_layers)
        if arm.control in STATIC_CONTROLS and count == 0:
            raise ConfigError(f"rate {job.rate} of {self.num_layers} layers is less than half a layer. Raise it.")
        if arm.control == "most_skipped":
            source = self.run(Job(arm.of, job.rate, job.seed))
            layers = most_skipped(source.layer_skip_rates, self.routable)[:count]
        if arm.control == "least_important":
            layers = self.choice.by_importance[:count]
        if arm.control == "least_harmful":
            layers = self.choice.by_harm[:count]
        return self.study.arm_recipe(job.arm, job.rate, job.seed, folder, self.num_layers, layers)

    @cached_property
    def choice(self) -> LayerChoice:
        """The layers that fixed controls drop: the same for every seed."""
        asked = (self.training_questions, self.questions)
        return layer_choice(self.study, self.output, self.base, self.processor, *asked, self.routable)

    def _ask(self, job: Job, recipe: Recipe, trained: Trained) -> StudyRun:
        control = self.study.arms[job.arm].control
        raw_rate, bias, routes = None, None, None
        if control == "none":
            with self.console.status("calibrating …"):
                raw_rate, bias = self._calibrate(trained, job.rate)
        if control == "random":
            routes = random_routes(self.routable, job.rate, len(self.questions), self.num_layers, job.seed)
        with progress_bar(self.console, f"{job.arm} {job.rate:.0%}", len(self.questions)) as advance:
            asked = ask(trained.model, self.processor, self.questions, routes=routes, advance=advance)
        return study_run(self.study, job, asked, recipe, raw_rate, bias)

    def _calibrate(self, trained: Trained, rate: float) -> tuple[float, float]:
        """The rate without a bias and the bias for the wanted one, which the model's folder then holds."""
        found = calibration(RateMeter(trained.model, self.processor, self.training_questions), None, rate)
        with_bias(trained.model, found.keep_bias).roe_config.save(trained.folder)
        return found.raw_skip_rate, found.keep_bias


def study_run(
    study: Study,
    job: Job,
    asked: Evaluation,
    recipe: Recipe,
    raw_rate: float | None,
    bias: float | None,
) -> StudyRun:
    """An evaluation as a study holds it."""
    by_task = asked.by_task()
    return StudyRun(
        arm=job.arm,
        seed=job.seed,
        wanted=job.rate,
        accuracy=asked.accuracy,
        skip_rate=asked.skip_rate,
        raw_skip_rate=raw_rate,
        keep_bias=bias,
        right="".join("1" if right else "0" for right in asked.right),
        layer_skip_rates=asked.layer_skip_rates,
        task_accuracy={task: part.accuracy for task, part in by_task.items()},
        task_skip_rate={task: part.skip_rate for task, part in by_task.items()},
        route_information=information(asked),
        varied_layers=varied_share(asked.layer_skip_rates),
        training_seconds=_training_seconds(recipe),
        steps=recipe.training.steps,
        question_seed=study.question_seed,
        calibration_questions=study.calibration_questions,
    )


def contrasts(study: Study, runs: list[StudyRun]) -> list[Contrast]:
    """The reference minus every other arm, where both were run at the same rate with the same seeds."""
    found = []
    for name in study.arms:
        for rate in study.rates:
            first = {run.seed: run for run in runs if (run.arm, run.wanted) == (study.reference, rate)}
            at = 0.0 if study.arms[name].control == "dense" else rate
            second = {run.seed: run for run in runs if (run.arm, run.wanted) == (name, at)}
            seeds = sorted(set(first) & set(second))
            if name != study.reference and seeds:
                pairs = [np.stack([_bits(runs_of[seed]) for seed in seeds]) for runs_of in (first, second)]
                difference = paired_difference(*pairs)
                by_seed = (pairs[0].mean(1) - pairs[1].mean(1)).tolist()
                found.append(
                    Contrast(
                        first=study.reference,
                        second=name,
                        wanted=rate,
                        seeds=seeds,
                        difference=difference.mean,
                        low=difference.low,
                        high=difference.high,
                        by_seed=by_seed,
                    )
                )
    return found


def _bits(run: StudyRun) -> np.ndarray:
    return np.array([mark == "1" for mark in run.right], dtype=float)


def _training_seconds(recipe: Recipe) -> float:
    return read_log(RunFolder(recipe.output).log)[-1].seconds
