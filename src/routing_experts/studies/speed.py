"""How long contenders take, measured: each beside the base model, in turn, on the same held-out questions.

Of every arm at every rate the first seed's model is timed, if it is still in the study's folder. To be measured while
nothing else runs.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from routing_experts.evaluation.bench.work import generate_seconds, interleave, prefill_seconds
from routing_experts.evaluation.pruning import TokenPruner, image_shares, share_for
from routing_experts.evaluation.questions import records_of
from routing_experts.inference.generate import prompt_batches, to_model
from routing_experts.models.load import from_pretrained, is_routed_folder, load_base
from routing_experts.records import ArmSpeed
from routing_experts.studies.contest import Contest
from routing_experts.studies.jobs import Job, jobs_of
from routing_experts.training.folder import RunFolder

BATCHES = (1, 16)
SINGLES = 8  # questions that are timed one by one: routes differ from question to question
GENERATED = 8  # tokens
REPEATS = 7
Phase = Literal["prefill", "generate"]


def timed_jobs(contest: Contest) -> list[Job]:
    """The runs that can be timed: of the first seed, with a model at hand, and not routed by chance."""
    first = contest.study.seeds[0]
    jobs = [job for job in jobs_of(contest.study) if job.seed == first]
    jobs = [job for job in jobs if contest.study.arms[job.arm].control != "random" and contest.found(job)]
    return [job for job in jobs if _folder(contest, job).is_dir()]


def _folder(contest: Contest, job: Job) -> Path:
    """Where the model lies that a job asks."""
    return RunFolder(contest.model_job(job).folder(contest.output)).model


def arm_speeds(contest: Contest, jobs: Sequence[Job], advance: Callable[[int], None]) -> list[ArmSpeed]:
    """Each job's prefill and whole answers, alone and in a batch of mixed questions."""
    batches = {size: _prompts(contest, size) for size in BATCHES}
    found = []
    for job in jobs:
        model, context = _model_of(contest, job)
        for size, prompts in batches.items():
            for phase in ("prefill", "generate"):
                base = partial(_seconds, contest.base, prompts, phase)
                arm = partial(_within, context, model, prompts, phase)
                base_seconds, arm_seconds = interleave((base, arm), REPEATS)
                found.append(
                    ArmSpeed(
                        arm=job.arm,
                        wanted=job.rate,
                        seed=job.seed,
                        phase=phase,
                        batch=size,
                        base_seconds=base_seconds,
                        arm_seconds=arm_seconds,
                    )
                )
        advance(1)
    return found


def _prompts(contest: Contest, size: int) -> list[dict[str, Tensor]]:
    """Batches of that many questions: one of many, or several of one."""
    records = records_of(contest.questions[: SINGLES if size == 1 else size])
    base = contest.base
    return [to_model(batch, base) for batch in prompt_batches(base, contest.processor, records, size)]


def _model_of(contest: Contest, job: Job) -> tuple[Any, Callable[[], Any]]:
    """A run's model, and the context that it is called in."""
    folder = _folder(contest, job)
    model = from_pretrained(folder) if is_routed_folder(folder) else load_base(folder)
    if contest.study.arms[job.arm].control != "pruning":
        return model, nullcontext
    shares = image_shares(model, contest.processor, contest.training_questions)
    return model, TokenPruner(model, share_for(job.rate, shares, contest.num_layers)).pruned


def _within(context: Callable[[], Any], model: Any, prompts: Sequence[dict[str, Tensor]], phase: Phase) -> float:
    with context():
        return _seconds(model, prompts, phase)


def _seconds(model: Any, prompts: Sequence[dict[str, Tensor]], phase: Phase) -> float:
    """Of all prompts, one after the other."""
    if phase == "prefill":
        return sum(prefill_seconds(model, batch) for batch in prompts)
    return sum(generate_seconds(model, batch, GENERATED) for batch in prompts)
