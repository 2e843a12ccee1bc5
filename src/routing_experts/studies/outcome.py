"""What a study keeps of one run: every answer, how routes went, and by which settings it was trained."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from routing_experts.evaluation.evaluate import information, route_counts
from routing_experts.evaluation.paired import varied_share
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.records import StudyRun, as_bits, as_marks, origin, read_log
from routing_experts.studies.jobs import Job
from routing_experts.studies.plan import Study
from routing_experts.training.folder import DIVIDED, RunFolder
from routing_experts.training.recipe import DataSettings, Recipe, recipe_values

# Nothing that tells arms apart; a step's records are told, not the batches that they are divided into, nor how they
# are read.
READ = ("data.workers", "data.token_cache")
UNTOLD = ("output", "training.seed", "training.report_to", "training.logging_steps", *READ, *DIVIDED)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings that are not the defaults, by dotted path; plain values."""
    defaults, named = (_told(one) for one in (Recipe(model="", output="", data=DataSettings(records=1)), recipe))
    return {path: value for path, value in named.items() if value != defaults.get(path)}


def outcome(
    study: Study,
    job: Job,
    asked: Evaluation,
    recipe: Recipe,
    calibrated: tuple[float, float] | None,
    left_out: Sequence[float] | None = None,
) -> StudyRun:
    """An evaluation as a study holds it.

    Args:
        study, job: whose.
        asked: the held-out questions, answered.
        recipe: that trained the model.
        calibrated: the rate without a bias, and the bias; None where nothing is calibrated.
        left_out: of each question's prefill, if tokens are pruned rather than layers skipped.
    """
    by_task = asked.by_task()
    run = sum(left_out) / len(left_out) if left_out is not None else asked.skip_rate
    layers_run = [sum(answer.route) for answer in asked.answers]
    log = read_log(RunFolder(recipe.output).log)[-1]
    return StudyRun(
        arm=job.arm,
        seed=job.seed,
        wanted=job.rate,
        accuracy=asked.accuracy,
        skip_rate=run,
        raw_skip_rate=calibrated[0] if calibrated else None,
        keep_bias=calibrated[1] if calibrated else None,
        right=as_bits(asked.right),
        layer_skip_rates=asked.layer_skip_rates,
        task_accuracy={task: part.accuracy for task, part in by_task.items()},
        task_skip_rate={task: part.skip_rate for task, part in by_task.items()},
        task_layer_skip_rates={task: _rounded(part.layer_skip_rates) for task, part in by_task.items()},
        route_information=information(asked),
        varied_layers=varied_share(asked.layer_skip_rates),
        routes=route_counts(asked),
        layers_run=as_marks(layers_run) if len(set(layers_run)) > 1 else "",
        training_seconds=log.seconds,
        steps=recipe.training.steps,
        question_seed=study.question_seed,
        calibration_questions=study.calibration_questions,
        settings=settings_of(recipe),
        made=origin(),
    )


def _rounded(rates: Sequence[float]) -> list[float]:
    return [round(rate, 4) for rate in rates]


def _told(recipe: Recipe) -> dict[str, Any]:
    """What tells arms apart, as JSON would hold it, by dotted path."""
    values = _flat(json.loads(json.dumps(recipe_values(recipe))))
    told = {path: value for path, value in values.items() if path not in UNTOLD}
    return told | {"training.records_a_step": recipe.training.dialogues_on(1)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted paths; lists and what they hold stay as they are."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
